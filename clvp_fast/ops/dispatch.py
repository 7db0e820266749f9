"""The choice of the code that an operator runs: its reference, or one of its implementations.

An `Operator` has several versions of one hot path, all with the same positional signature:

- `reference`: plain torch that states the mathematics, in any dtype up to float64;
- `implementations`, best first: kernels (`"triton"`, `"cuda"` for a GPU, `"cpu"` for the native library's), for
  inference only, and loaded at first use; the last is `"torch"`, as fast as torch allows, differentiable, on any
  device.

A call takes the first implementation that serves and pays. Reference and torch are called inline, so that autograd,
`torch.compile` and `torch.export` see plain torch; a kernel runs behind the registered `torch.ops.clvp_fast.<name>`,
which the compiler keeps as one opaque call. `CLVP_FAST_BACKEND`, read once at import, or `with clvp_fast.backend(...)`
forces `"reference"`, `"torch"`, `"kernel"` (the first implementation that serves and is not torch) or one
implementation by its name; a forced backend that cannot serve raises. Triton's interpreter, for tests on a CPU, runs a
kernel only when it is forced.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.autograd import forward_ad

from clvp_fast.ops.binding import BoundCall, Results, Scratch, copying
from clvp_fast.ops.choice import Choice, Choices

BACKENDS = ("reference", "torch", "kernel")
KERNELS = ("triton", "cuda", "cpu")
LIBRARY = torch.library.Library("clvp_fast", "DEF")
OPERATORS: dict[str, "Operator"] = {}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS + KERNELS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS + KERNELS)}, not {name!r}")
    return name


# None chooses the best backend that serves. It is a module global, so that compiled code is guarded on it.
_forced: str | None = os.environ.get("CLVP_FAST_BACKEND") or None
if _forced is not None:
    _checked(_forced, "the environment variable CLVP_FAST_BACKEND")


@contextmanager
def backend(name: str | None):
    """Force one backend for every operator of the process; `None`: the default choice.

    `"reference"`, `"torch"`, `"kernel"` (the first kernel that serves), or the kernels of one kind: `"triton"`,
    `"cuda"` or `"cpu"`. It can be nested, and restores the former choice on exit. Raises `ValueError` for an unknown
    name. An operator that the forced backend cannot serve raises `RuntimeError` with the reason when it is called.
    """
    global _forced
    if name is not None:
        _checked(name, "backend()")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def situation() -> tuple:
    """Return the facts besides a call's arguments on which a choice depends; calls are bound again when they change."""
    return _forced, _is_forward(), torch.get_num_threads()


def _is_forward() -> bool:
    """Tell whether forward-mode derivatives are computed (`torch.func.jvp`), which only torch's own functions support.

    This also holds under `torch.no_grad()`. Torch's fused attention does not support them; references, which are plain
    torch, do. Torch has no public name for the level.
    """
    return getattr(forward_ad, "_current_level", -1) >= 0


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Tell whether autograd must record an operator on these tensors (`None` stands for an absent argument)."""
    return gradient(*tensors) is not None


def gradient(*tensors: torch.Tensor | None) -> str | None:
    """Return why autograd rules out the kernels for a call with these tensors, or `None`."""
    if _is_forward() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return "an input requires grad"
    return None


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def autocasts(device: torch.device) -> bool:
    """Tell whether torch's own functions cast their arguments on `device` now, so that dtypes need not match."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


def interpreted() -> bool:
    """Tell whether Triton's kernels run in its interpreter on a CPU, as in tests that force kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing_for_triton(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on `device`, or `None`."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install '.[kernels]' in a clone)"
    if device.type == "cpu":
        if not interpreted():
            return "kernels need an NVIDIA GPU (or, for tests, TRITON_INTERPRET=1)"
        return None if _forced in ("kernel", "triton") else "Triton's interpreter runs a kernel only when it is forced"
    return missing_on_gpu(device)


def missing_on_gpu(device: torch.device) -> str | None:
    """Return why the package's kernels cannot run on `device`, which is not a CPU, or `None`."""
    if device.type != "cuda":
        return f"kernels need an NVIDIA GPU, not a {device.type} device"
    if torch.version.cuda is None:
        return "kernels need an NVIDIA GPU, and this torch is built for another"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"kernels need compute capability 8.0 or newer, and {device} has {major}.{minor}"
    return None


def device_guard(device: torch.device) -> AbstractContextManager:
    """Return a context that makes `device` torch's current one, for launches, streams and events; a CPU needs none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def uncast(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast on `device`, for work that one thread does for many."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def missing_natively(device: torch.device) -> str | None:
    """Return why the native library's kernels for a CPU cannot run on `device`, or `None`."""
    if device.type != "cpu":
        return f"it serves a CPU, not a {device.type} device"
    from clvp_fast import native

    return native.missing("cpu")


def missing_for_cuda(device: torch.device) -> str | None:
    """Return why the native library's kernels for a GPU cannot run on `device`, or `None`."""
    if reason := missing_on_gpu(device):
        return reason
    from clvp_fast import native

    return native.missing("cuda")


_MISSING = {
    "triton": missing_for_triton,
    "cuda": missing_for_cuda,
    "cpu": missing_natively,
    "torch": lambda device: None,
}


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator. `run`, `why_not` and `pays` take the schema's arguments by position.

    name: "triton", "cuda" or "cpu"; or "torch", which serves every call and comes last.
    run: allocates the results and launches; imports `clvp_fast.kernels` or the native library when it is called.
    why_not: tells why it does not serve these arguments (a dtype, a size), or returns `None`.
    why_not_type: tells why it serves no tensors of a dtype on a device, or returns `None`; the part of `why_not` that
        is known before a call.
    pays: tells whether it is used for a call when nothing is forced; `None`: for every call that it serves.
    calls: the calls for which `pays` is true, in words for `explain`.
    warns: tells whether a call that it does not serve, on a device where it runs, deserves a warning.
    missing: tells why it cannot run on a device, or returns `None`; by default this follows from its name.
    bind: makes a call without arguments (`Operator.bind`) from result tensors, a `Scratch` and the arguments; or
        returns `None` if `run` must see the arguments at each call. By default `run` is called and its results are
        copied.
    pays_bound: as `pays`, for a bound call, which costs the host less, or nothing once it is captured.
    """

    name: str
    run: Callable
    why_not: Callable[..., str | None] = lambda *args: None
    why_not_type: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    pays: Callable[..., bool] | None = None
    calls: str = ""
    warns: bool = True
    missing: Callable[[torch.device], str | None] | None = None
    bind: Callable[..., BoundCall | None] | None = None
    pays_bound: Callable[..., bool] | None = None

    def missing_on(self, device: torch.device) -> str | None:
        """Return why it cannot run on `device`, or `None`."""
        return (self.missing or _MISSING[self.name])(device)


class Operator:
    """One operator of the package, registered as `torch.ops.clvp_fast.<name>`.

    Args:
        name: the operator's name; its module, kernel file, tests and benchmark share it.
        schema: arguments and results as `torch.library` writes them, such as `"(Tensor x, float eps) -> Tensor"`. A
            tensor that the operator writes is declared `Tensor(a!)`; no result may alias an argument.
        reference: the oracle; it takes the schema's arguments by position.
        fake: returns empty tensors with the results' shapes and dtypes for the same arguments.
        implementations: best first, torch's last.
        unaliased: torch's implementation for the registered operator, if torch's `run` may return an argument.
        yields: tells whether a call that a forced kernel cannot serve takes torch's implementation instead of raising.
            `None`: none does.
        parts: the operators that torch's implementation consists of, if it is nothing else; each raises its own errors.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable,
        fake: Callable,
        implementations: tuple[Implementation, ...],
        unaliased: Callable | None = None,
        yields: Callable[..., bool] | None = None,
        parts: tuple[str, ...] = (),
    ):
        self.name = name
        self.reference = reference
        self._unaliased = unaliased
        self._yields = yields
        self._parts = parts
        self._warned: set[str] = set()
        self.use(implementations)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self._registered, "CPU")
        LIBRARY.impl(name, self._registered_on_gpu, "CUDA")
        torch.library.register_fake(f"clvp_fast::{name}", fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.clvp_fast, name).default
        OPERATORS[name] = self

    def use(self, implementations: tuple[Implementation, ...]) -> None:
        """Set these implementations, and forget on which devices the former ones run."""
        *kernels, plain = self.implementations = tuple(implementations)
        self.torch = plain.run
        self._refusals: dict[tuple[str, torch.device, str | None], str | None] = {}
        # The kernels to try, by forced backend and by CPU or not; there is at least one, which gives the reason.
        self._asked = {}
        for on_cpu in (False, True):
            made = tuple(each for each in kernels if (each.name == "cpu") == on_cpu) or tuple(kernels)
            for backend in (None, *BACKENDS):
                self._asked[backend, on_cpu] = tuple(kernels) if on_cpu and backend == "kernel" else made
            for backend in KERNELS:
                self._asked[backend, on_cpu] = tuple(each for each in kernels if each.name == backend)

    def _registered(self, *args):
        # A compiled graph may pass anything, and a direct caller has chosen, so that `pays` is not asked.
        device = args[0].device
        for each in self._asked[_forced, device.type == "cpu"]:
            if self._refusal(each.name, device) is None and each.why_not(*args) is None:
                return each.run(*args)
        return (self._unaliased or self.torch)(*args)

    def _registered_on_gpu(self, *args):
        # Kernels are launched on torch's current device, whatever device their tensors are on.
        with device_guard(args[0].device):
            return self._registered(*args)

    @torch.compiler.assume_constant_result
    def _refusal(self, name: str, device: torch.device) -> str | None:
        """Return why the named implementation cannot run on `device`, or `None`. Warn once if it should run."""
        key = (name, device, _forced)
        if key not in self._refusals:
            (found,) = (each for each in self.implementations if each.name == name)
            reason = self._refusals[key] = found.missing_on(device)
            if reason is not None and device.type == "cuda" and name != "cpu":
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

    def choose(self, args: tuple, training: str | None = None, always: bool = False) -> Callable:
        """Return the callable for one call with the schema's arguments `args`, whose first is a tensor.

        `training` says why the call is not inference (kernels serve only inference), or is `None`. With `always`, it is
        the first implementation that serves, also for a call for which that does not pay. Warns once if a
        kernel runs on the device but does not serve these arguments. Raises `RuntimeError` if a kernel is forced and
        cannot serve.
        """
        chosen = self._choose(args, training, always=always)
        if chosen is None:
            return self.reference
        return self.registered if chosen.name in KERNELS else chosen.run

    def bind(self, args: tuple, out: Results, scratch: Scratch, always: bool = False) -> BoundCall:
        """Return a call without arguments that computes `args` into `out`; the implementation is chosen here, once.

        This is for inference. The tensors of `args` and `out` must stay where they are; their values are read at each
        call. On a GPU their device must then be the current one. `situation()` returns what else the choice depends on.

        Args:
            args: the schema's arguments, of which the first is a tensor.
            out: the result tensor, or one for each result, with `None` for one that is not wanted.
            scratch: holds intermediate values.
            always: as for `choose`.

        Raises as `choose`.
        """
        chosen = self._choose(args, bound=True, always=always)
        if chosen is None:
            return copying(partial(self.reference, *args), out)
        call = None if chosen.bind is None else chosen.bind(out, scratch, *args)
        return copying(partial(chosen.run, *args), out) if call is None else call

    def _choose(
        self, args: tuple, training: str | None = None, bound: bool = False, always: bool = False
    ) -> Implementation | None:
        """Return the implementation for one call; `None`: the reference."""
        forced = _forced
        if forced == "reference" or _is_forward():
            return None
        plain = self.implementations[-1]
        if forced == "torch" or (training is not None and (forced is None or self._yields is not None)):
            return plain
        device, why, absent = args[0].device, training, None
        if training is None:
            for each in self._asked[forced, device.type == "cpu"]:
                pays = each.pays_bound if bound and each.pays_bound is not None else each.pays
                if forced is None and not always and pays is not None and not pays(*args):
                    continue
                absent = self._refusal(each.name, device)
                if absent is None:
                    reason = each.why_not(*args)
                    if reason is None:
                        return each
                    if forced is None and each.warns:
                        self._warn(reason)
                    why = why or reason
        if forced is None or (self._yields is not None and self._yields(*args)):
            return plain
        raise RuntimeError(
            f"the kernel of clvp_fast.{self.name} was forced and cannot serve on {device}: "
            f"{why or absent or self._no_kernel()}; choose backend 'torch' or 'reference', or force none"
        )

    def _no_kernel(self) -> str:
        kernels = ", ".join(each.name for each in self.implementations[:-1])
        return f"{_forced} is forced, and it has {kernels}" if kernels else "there is no kernel for this operator yet"

    def explain(self, device: torch.device, dtype: torch.dtype) -> Choice:
        """Return the choice that `choose` makes for inference with tensors of `dtype` on `device`."""
        # `_refusal` would warn, but an explanation must not: a call that takes the slower path still has to warn.
        kernel, why, absent = None, None, None
        for each in self._asked[_forced, device.type == "cpu"]:
            absent = each.missing_on(device)
            if absent is None:
                reason = each.why_not_type(device, dtype)
                if reason is None:
                    kernel = each
                    break
                why = why or reason
        why = why or absent or self._no_kernel()
        refused = {} if kernel else {"kernel": why}
        chosen = "kernel" if _forced in KERNELS else _forced or ("kernel" if kernel else "torch")
        if chosen == "kernel" and not kernel and self._yields:
            parts = (OPERATORS[part].explain(device, dtype).backend for part in self._parts)
            chosen = "torch" if all(parts) else "kernel"
        for name in BACKENDS:
            if name != chosen and name not in refused:
                refused[name] = f"{_forced} is forced" if _forced else f"{chosen} is faster"
        calls = kernel.calls if chosen == "kernel" and kernel and _forced is None else ""
        serves = None if chosen in refused else chosen
        ran = kernel.name if kernel and serves == "kernel" else serves
        return Choice(self.name, str(device), str(dtype).removeprefix("torch."), serves, refused, calls, ran)


def explain(
    name: str | None = None, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Choices:
    """Return which backend each operator, or the one called `name`, uses on `device`, and why not the others.

    `device` defaults to the GPU if there is one, else the CPU. `dtype` is that of all floating point tensors of a call;
    by default there is one row for float32 and bfloat16, or two if they differ. The answer is for inference. Raises
    `ValueError` for an unknown operator, and for a dtype that is not floating point.
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
