"""The backends on which the cases of an operator run, and the mark that says on which of them a case does.

reference, torch: the operator's own, on a CPU; default: what a call takes there by itself.
cpu: the native library's kernels, on each instruction set that has some of its own.
vnni: the same on sets that differ from others only in products of 8 bits.
interpreted: the Triton kernels in Triton's interpreter, which a process without a GPU chooses when it begins; its
    bfloat16 products are wrong. A process that begins with tests/ptx/plugin.py runs the compiled kernels there.
gpu: the kernels on a GPU.
"""

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from tests.kit import device, isa
from tests.kit.budget import TIMES

#: Both ways to run a kernel that is written in Triton.
TRITON = ("interpreted", "gpu")
_ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTERPRETED = pytest.mark.skipif(
    device.DEVICE == "cuda", reason="on a GPU its kernels are compiled and not interpreted"
)


@dataclass(frozen=True)
class Backend:
    """One backend: its name, what it forces (`clvp_fast.backend`), its device, its types and its instruction set."""

    name: str
    forced: str | None
    dtypes: tuple[torch.dtype, ...] = _ALL
    device: str = "cpu"
    marks: tuple[pytest.MarkDecorator, ...] = ()
    isa: str | None = None

    def times(self, dtype: torch.dtype) -> float:
        """Return how many times plain torch's error products of `dtype` may have."""
        return device.times(dtype) if self.name in TRITON else TIMES

    @property
    def compiled(self) -> bool:
        """Tell whether Triton kernels are compiled: other arguments may then give code with another order of sums."""
        return self.name == "gpu" or (self.name == "interpreted" and device.EMULATED)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.isa}" if self.isa else self.name


BACKENDS = (
    Backend("reference", "reference"),
    Backend("torch", "torch"),
    Backend("default", None),
    *(
        Backend("vnni" if name in isa.VNNI else "cpu", "cpu", _ALL[:2], marks=(isa.needs_library,), isa=name)
        for name in isa.ISAS
    ),
    Backend("interpreted", "kernel", tuple(device.DTYPES), marks=(_INTERPRETED,)),
    Backend("gpu", "kernel", _ALL[:3], "cuda", (pytest.mark.gpu,)),
)


def on(
    *names: str,
    types: str = "",
    among: tuple[torch.dtype, ...] = _ALL,
    sets: bool = True,
    served: str | None = None,
) -> pytest.MarkDecorator:
    """Mark a case that runs on these backends, each of which forces itself (the fixture `backend`).

    types: the case's arguments that are dtypes, "dtype" or "dtype, out_dtype"; each takes those of the backend, as far
    as they are `among` these.
    sets: False: the CPU's kernels on the instruction set that is chosen already, and not on each.
    served: an entry of `isa.SERVED`, of whose kernels on a CPU the others are left out.
    """
    assert set(names) <= {backend.name for backend in BACKENDS}, names
    arguments = [name.strip() for name in types.split(",") if types]
    cases = []
    for backend in _named(names, sets):
        for dtypes in product([dtype for dtype in backend.dtypes if dtype in among], repeat=len(arguments)):
            if backend.isa and served and not _serves(served, backend.isa, dtypes):
                continue
            words = (backend.id, *(str(dtype).removeprefix("torch.") for dtype in dtypes))
            cases.append(pytest.param(backend, *dtypes, id="-".join(words), marks=backend.marks))
    return pytest.mark.parametrize(["backend", *arguments], cases, indirect=["backend"])


def _serves(served: str, name: str, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Tell whether a CPU's kernel serves these types on an instruction set, by the documents."""
    return not any(isa.why_unserved(served, dtype, name) for dtype in dtypes or (torch.float32,))


def _named(names: tuple[str, ...], sets: bool) -> list[Backend]:
    found = [backend for name in names for backend in BACKENDS if backend.name == name]
    return found if sets else list({backend.name: replace(backend, isa=None) for backend in found}.values())
