"""Compiles kernels for GPUs that need not be present, through the shipped launchers.

A launcher is called with tensors on the `meta` device while Triton's driver is replaced by one that names a target and
runs nothing: what is compiled is exactly what the launcher would launch, its own choice of configuration included.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.aot.uniform_registers import unwritten

ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Driver:
    """The part of a CUDA driver that compiling needs. A device's number is its architecture: Triton caches by device.

    device: where the tensors of launchers lie.
    """

    def __init__(self, arch: int, device: str = "meta"):
        self._arch, self._device = arch, device

    def get_current_target(self):
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self):
        return self._arch

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device(self._device)


@contextmanager
def _launches(arch: int):
    """Yield a list that fills with the kernels that launchers compile for `arch`; the process keeps this driver."""
    launched = []
    run = JITFunction.run

    def compiling(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launched.append(compiled)
        return compiled

    driver.set_active(Driver(arch))
    with mock.patch.object(JITFunction, "run", compiling):
        yield launched


def printed(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([TOOLS / tool, option, path], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers a thread, and bytes of local memory, which holds only spilled registers."""
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", printed("cuobjdump", "--dump-resource-usage", cubin)))
    return {"registers": int(found["REG"]), "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"])}


def _matrix_instruction(ptx: str) -> str:
    for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if name in ptx:
            return name.split(".")[0]
    return "none"


def compile_calls(calls: Iterable[tuple[str, Callable[[], object]]], arch: int) -> list[dict]:
    """Return one row for each kernel that the calls `(label, thunk)` launch, compiled for `arch`.

    Raises `RuntimeError` in a process whose kernels are interpreted, for a call that launches nothing, and for a kernel
    whose wgmmas have operands at addresses that nothing wrote.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are interpreted in this process: start one without TRITON_INTERPRET=1 to compile")
    rows = []
    for label, thunk in calls:
        with _launches(arch) as launched:
            thunk()
        if not launched:
            raise RuntimeError(f"the call {label!r} launched no kernel")
        for place, compiled in enumerate(launched):
            instruction = _matrix_instruction(compiled.asm["ptx"])
            if instruction == "wgmma" and (lost := unwritten(printed("nvdisasm", "-c", compiled.asm["cubin"]))):
                raise RuntimeError(f"ptxas lost what these read, in {compiled.metadata.name} ({label}): {lost}")
            rows.append(
                {
                    "call": label,
                    "launch": place,
                    "kernel": compiled.metadata.name,
                    "arch": arch,
                    "num_warps": compiled.metadata.num_warps,
                    "num_stages": compiled.metadata.num_stages,
                    "shared_bytes": compiled.metadata.shared,
                    "matrix_instruction": instruction,
                    "asynchronous_copies": "cp.async" in compiled.asm["ptx"],
                    **resources(compiled.asm["cubin"]),
                }
            )
    return rows
