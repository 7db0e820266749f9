"""Which code an operator runs: its reference, its torch path, or its kernel.

An `Operator` holds one hot path three times, with one positional signature:

- `reference`: plain torch that states the mathematics, any dtype up to float64;
- `torch_path`: as fast as torch allows, differentiable, on any device;
- `kernel`: Triton, or C++ and CUDA, inference only, loaded at first use, run behind the registered
  `torch.ops.clvp_fast.<name>`.

The first two are called inline, so that autograd, `torch.compile` and `torch.export` see plain torch; the kernel runs
behind the registered operator, which the compiler keeps as one opaque call. By default a kernel serves where it can,
and the torch path everywhere else. `CLVP_FAST_BACKEND=reference|torch|kernel`, read once at import, or
`with clvp_fast.backend(...)` forces one; a forced backend that cannot serve raises. Triton's interpreter, for tests on
a CPU, runs a kernel only when it is forced.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch.autograd import forward_ad

BACKENDS = ("reference", "torch", "kernel")
LIBRARY = torch.library.Library("clvp_fast", "DEF")
OPERATORS: dict[str, "Operator"] = {}
_NO_KERNEL = "there is no kernel for this operator yet"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, not {name!r}")
    return name


# None: the best backend that serves. A module global, so that compiled code is guarded on it.
_forced: str | None = os.environ.get("CLVP_FAST_BACKEND") or None
if _forced is not None:
    _checked(_forced, "the environment variable CLVP_FAST_BACKEND")


@contextmanager
def backend(name: str | None):
    """Force `"reference"`, `"torch"` or `"kernel"` for every operator of the process; `None`: the default choice.

    Nests, and restores the former choice on exit. Raises `ValueError` for an unknown name. An operator that the forced
    backend cannot serve raises `RuntimeError`, with the reason, when it is called.
    """
    global _forced
    if name is not None:
        _checked(name, "backend()")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to follow an operator on these tensors (`None` entries are absent arguments)."""
    if _is_forward():
        return True
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def _is_forward() -> bool:
    """Whether derivatives are computed forward (`torch.func.jvp`), which functions of torch's alone can follow.

    They are with `torch.no_grad()` too. Its fused attention cannot, and references have none. torch has no public name
    for the level.
    """
    return getattr(forward_ad, "_current_level", -1) >= 0


def autocasts(device: torch.device) -> bool:
    """Whether torch's own functions cast what they are given on `device` now; dtypes then need not match."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def forced() -> str | None:
    """The backend that is forced, or `None`."""
    return _forced


def interpreted() -> bool:
    """Whether a kernel that runs on a CPU now is a Triton kernel in the interpreter: for tests, and when forced."""
    return _forced == "kernel" and os.environ.get("TRITON_INTERPRET") == "1"


def missing_for_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, or `None`."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install 'clvp-fast[kernels]')"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "kernels need an NVIDIA GPU (or, for tests, TRITON_INTERPRET=1)"
        return None if _forced == "kernel" else "Triton's interpreter runs a kernel only when it is forced"
    return missing_on_gpu(device)


def missing_on_gpu(device: torch.device) -> str | None:
    """Why the package's kernels cannot run on `device`, which is no CPU, or `None`."""
    if device.type != "cuda":
        return f"kernels need an NVIDIA GPU, not a {device.type} device"
    if torch.version.cuda is None:
        return "kernels need an NVIDIA GPU, and this torch is built for another"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"kernels need compute capability 8.0 or newer, and {device} has {major}.{minor}"
    return None


def device_guard(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is torch's current one, where launches, streams and events go; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def uncast(device: torch.device) -> AbstractContextManager:
    """A context without autocast on `device`, for what many threads share and one of them runs."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def runs_natively(device: torch.device) -> bool:
    """Whether an operator with two kernels runs that of the native library on `device`, a CPU, and not Triton's."""
    return device.type == "cpu" and not interpreted()


def missing_for_either(device: torch.device) -> str | None:
    """Why neither Triton's kernel on a GPU nor the native library's on a CPU can run on `device`, or `None`."""
    if not runs_natively(device):
        return missing_for_triton(device)
    from clvp_fast import native

    return native.missing("cpu")


class Operator:
    """One operator of the package, registered as `torch.ops.clvp_fast.<name>`.

    Args:
        name: the operator's name; its module, kernel file, tests and benchmark share it.
        schema: arguments and results as `torch.library` writes them, such as `"(Tensor x, float eps) -> Tensor"`. A
            tensor that the operator writes is declared `Tensor(a!)`; no result may alias an argument.
        reference: the oracle. Takes the schema's arguments by position, as do the next four.
        torch_path: the path without a kernel.
        unaliased: the torch path for the registered operator, where `torch_path` may return an argument.
        fake: the results' shapes and dtypes, as empty tensors.
        kernel: allocates the results and launches; imports `clvp_fast.kernels` when called. `None`: there is none.
        unserved: tells why the kernel cannot serve these arguments (a dtype, a size), or returns `None`.
        unserved_type: tells why it serves no tensors of a dtype on a device, or returns `None`: the part of `unserved`
            that is known before a call.
        calls: which calls the kernel is for where nothing is forced and it is not for all, as `explain` says it.
        yields: whether calls take the torch path, and do not raise, where the kernel is forced and cannot serve.
        missing: tells why the kernel cannot run on a device, or returns `None`.
        expected_on: types of the devices where a missing kernel is worth a warning.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable,
        torch_path: Callable,
        fake: Callable,
        unaliased: Callable | None = None,
        kernel: Callable | None = None,
        unserved: Callable[..., str | None] = lambda *args: None,
        unserved_type: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None,
        calls: str = "",
        yields: bool = False,
        missing: Callable[[torch.device], str | None] = missing_for_triton,
        expected_on: tuple[str, ...] = ("cuda",),
    ):
        self.name = name
        self.reference = reference
        self.torch_path = torch_path
        self._unaliased = unaliased or torch_path
        self.kernel = kernel
        self._unserved = unserved
        self._unserved_type = unserved_type
        self._calls = calls
        self._yields = yields
        self._missing = missing
        self._expected_on = expected_on
        self._refusals: dict[tuple[torch.device, bool], str | None] = {}
        self._warned: set[str] = set()
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self._registered, "CPU")
        LIBRARY.impl(name, self._registered_on_gpu, "CUDA")
        torch.library.register_fake(f"clvp_fast::{name}", fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.clvp_fast, name).default
        OPERATORS[name] = self

    def _registered(self, *args):
        refused = self.refusal(args[0].device) or self._unserved(*args)
        return (self._unaliased if refused else self.kernel)(*args)

    def _registered_on_gpu(self, *args):
        # Kernels are launched on the current device, wherever their tensors lie.
        with device_guard(args[0].device):
            return self._registered(*args)

    @torch.compiler.assume_constant_result
    def refusal(self, device: torch.device) -> str | None:
        """Why the kernel cannot serve on `device`, or `None` where it serves. Warns, once, if it should have served."""
        if self.kernel is None:
            return _NO_KERNEL
        key = (device, _forced == "kernel")
        if key not in self._refusals:
            reason = self._refusals[key] = self._missing(device)
            if reason is not None and device.type in self._expected_on:
                self._warn(reason)
            if reason is not None and device.type == "cpu":
                from clvp_fast import native

                native.warn_of(reason)
        return self._refusals[key]

    @torch.compiler.assume_constant_result
    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"clvp_fast.{self.name} takes the slower torch path: {reason}", stacklevel=4)

    def choose(self, args: tuple, training: str | None = None) -> Callable:
        """The callable for one call with the schema's arguments `args`, of which the first is a tensor.

        `training` says why the call is not inference (kernels serve inference alone), or is `None`. Warns, once, where
        a kernel serves on the device but not these arguments.
        Raises `RuntimeError` where the kernel is forced and cannot serve.
        """
        if _forced == "reference" or _is_forward():
            return self.reference
        if _forced == "torch" or (self.kernel is None and _forced is None):
            return self.torch_path
        device = args[0].device
        reason = training or self.refusal(device)
        if reason is None:
            reason = self._unserved(*args)
            if reason is None:
                return self.registered
            if _forced is None:
                self._warn(reason)
        if _forced == "kernel":
            raise RuntimeError(
                f"the kernel of clvp_fast.{self.name} was forced and cannot serve on {device}: {reason}; "
                "choose backend 'torch' or 'reference', or force none"
            )
        return self.torch_path

    def without_kernel(self) -> Callable:
        """The path that is taken where a kernel is not even wanted: the torch path, if the reference is not."""
        return self.reference if _forced == "reference" or _is_forward() else self.torch_path

    def with_kernel(self) -> Callable:
        """What `choose` gives for inference that the kernel is known to serve."""
        return getattr(self, {"reference": "reference", "torch": "torch_path"}.get(_forced, "registered"))

    def explain(self, device: torch.device, dtype: torch.dtype) -> "Choice":
        """What `choose` does for inference with tensors of `dtype` on `device`."""
        # Not `refusal`, which warns: who asks is told, and a call that takes the slower path still warns.
        reason = _NO_KERNEL if self.kernel is None else self._missing(device) or self._unserved_type(device, dtype)
        refused = {} if reason is None else {"kernel": reason}
        chosen = _forced or ("torch" if reason else "kernel")
        if chosen == "kernel" and reason and self._yields:
            chosen = "torch"
        for name in BACKENDS:
            if name != chosen and name not in refused:
                refused[name] = f"{_forced} is forced" if _forced else f"{chosen} is faster"
        calls = self._calls if chosen == "kernel" and _forced is None else ""
        serves = None if chosen in refused else chosen
        return Choice(self.name, str(device), str(dtype).removeprefix("torch."), serves, refused, calls)


@dataclass(frozen=True)
class Choice:
    """An operator's backend on a device, and why each other one is not used.

    dtype: of the tensors, as "float32"; "float32, bfloat16" where the same holds for both.
    backend: `None` where the forced one cannot serve.
    calls: which calls the backend is for; empty: for all that it takes.
    """

    operator: str
    device: str
    dtype: str
    backend: str | None
    refused: dict[str, str]
    calls: str = ""


class Choices(list):
    """A list of `Choice` that prints as a table."""

    def __str__(self) -> str:
        rows = [("operator", "device", "dtype", "backend", "for, and not used")]
        for choice in self:
            told = [f"for {choice.calls}"] if choice.calls else []
            told += [f"{name}: {reason}" for name, reason in choice.refused.items()]
            rows.append((choice.operator, choice.device, choice.dtype, choice.backend or "none", "; ".join(told)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
        ]
        return "\n".join(lines)


def explain(
    name: str | None = None, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Choices:
    """Tell which backend each operator, or the one called `name`, uses on `device`, and why not the others.

    `device` defaults to the GPU if there is one, else the CPU. `dtype` is that of all floating point tensors of a call;
    by default there is a row for float32 and bfloat16, or two where they differ. Calls are those of inference.
    Raises `ValueError` for an unknown operator, and for a dtype that is no floating point type.
    """
    if name is not None and name not in OPERATORS:
        raise ValueError(f"there is no operator {name!r}; there are {', '.join(sorted(OPERATORS))}")
    device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating point type such as torch.bfloat16, or None, not {dtype!r}")
    dtypes = (torch.float32, torch.bfloat16) if dtype is None else (dtype,)
    choices = Choices()
    for key in sorted(OPERATORS) if name is None else (name,):
        first, *others = (OPERATORS[key].explain(device, each) for each in dtypes)
        if all(replace(other, dtype=first.dtype) == first for other in others):
            first, others = replace(first, dtype=", ".join(choice.dtype for choice in (first, *others))), []
        choices += (first, *others)
    return choices


def unserved_by_triton(name: str, dtype: torch.dtype) -> str | None:
    """Why a Triton kernel does not take the tensor `name` of `dtype`, or `None`."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return f"{name} must be float32, float16 or bfloat16, not {dtype}"


def unserved_natively(dtype: torch.dtype) -> str | None:
    """Why a kernel of the native library does not take tensors of `dtype` on a CPU, or `None`."""
    return None if dtype in (torch.float32, torch.bfloat16) else f"on a CPU it serves float32 and bfloat16, not {dtype}"


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`[..., width]` as `[rows, width]` with columns at stride 1, as kernels take it: a view where there is one."""
    x = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def shape_error(name: str, expected: str, tensor: torch.Tensor) -> ValueError:
    """The error for a tensor argument of the wrong shape."""
    return ValueError(f"{name} must have shape {expected}, not {list(tensor.shape)}")


def check_same(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor, dtype: bool = True) -> None:
    """Raise unless `tensor` lies on the device of `like` and, if asked, has its dtype."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} and {like_name} on {like.device}: move them to one device")
    if dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, not {tensor.dtype}")


def check_residual(residual: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless `residual` lies where `x` does and has its dtype or, beside a half type, float32."""
    if residual.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        check_same("residual", residual, "x", x, dtype=False)
    else:
        check_same("residual", residual, "x", x)


def check_floating(name: str, dtype: torch.dtype | None) -> None:
    """Raise unless `dtype` is None or a type of real numbers."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating point type, not {dtype}")
