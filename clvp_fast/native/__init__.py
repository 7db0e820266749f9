"""The native library of `csrc/`, loaded through ctypes: finds it, or says why it is missing.

An installed package contains it. In a checkout each part, for CPUs and for CUDA, is compiled when it is first needed,
into the user's cache, under a name that changes with its sources, flags and compilers. It is optional: without it,
operators take their torch paths. `python -m clvp_fast.native` prints its state.
"""

import ctypes
import json
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path

from clvp_fast.io.errors import sentence
from clvp_fast.io.files import (
    UnwritableError,
    build_folder_once,
    cache_folder,
    changeable_by_others,
    make_private,
    write_json,
)
from clvp_fast.native import build
from clvp_fast.native.calls import (  # structures that callers fill
    BFLOAT16 as BFLOAT16,
    FLOAT16 as FLOAT16,
    FLOAT32 as FLOAT32,
    FLOAT64 as FLOAT64,
    GELU as GELU,
    GELU_TANH as GELU_TANH,
    INT8 as INT8,
    INT16 as INT16,
    NO_ACTIVATION as NO_ACTIVATION,
    OPERATIONS,
    VERSION,
    AnyCall,
    DecoderLayer as DecoderLayer,
    LinearCall as LinearCall,
    LogMelCall as LogMelCall,
    MlpCall as MlpCall,
    NormCall as NormCall,
    PagedDecodeCall as PagedDecodeCall,
    PagedPrefillCall as PagedPrefillCall,
    PersistentDecodeCall as PersistentDecodeCall,
    RotaryAttentionCall as RotaryAttentionCall,
    SampleCall as SampleCall,
    WindowAttentionCall as WindowAttentionCall,
    WindowBlockCall as WindowBlockCall,
    number_of as number_of,
    set_prototypes,
)

#: Instruction sets of CPUs that kernels are compiled for, the best first.
ISAS = tuple(build.ISA_FLAGS)

_PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGED = _PACKAGE / "_native"
_SOURCES = _PACKAGE.parent / "csrc"
_DRIVER = "libcuda.so.1"
# Reasons why the library is missing on a CPU, until a caller of an operator is warned of them.
_untold: set[str] = set()
_VARIABLE = "the environment variable CLVP_FAST_ISA"


class NativeLibraryError(RuntimeError):
    """The native library is missing; the message says in one sentence why, and what to do."""


def library(part: str = "cpu") -> ctypes.CDLL:
    """Return the library's part for `"cpu"` or `"cuda"` with its prototypes set; compile it first if needed.

    Raises:
        NativeLibraryError: it is missing; the message says why and what to do.
        ValueError: `CLVP_FAST_ISA` names no instruction set, or one that this CPU lacks.
    """
    found, why = loaded(part)
    if found is None:
        raise NativeLibraryError(why)
    return found


@cache
def missing(device_type: str) -> str | None:
    """Return why the library cannot serve on `"cpu"` or `"cuda"`, or None if it can. Compile it if needed."""
    if device_type not in build.LIBRARIES:
        return f"the native library serves cpu and cuda, not {device_type}"
    why = no_device() if device_type == "cuda" else None
    if why is None:
        found, why = loaded(device_type)
        if found is not None:
            return _driver_refusal(found) if device_type == "cuda" else None
    if device_type == "cpu":
        _untold.add(why)
    return why


def warn_of(reason: str) -> None:
    """Warn, once per process, if `reason` is that the library cannot serve on a CPU."""
    if reason in _untold:
        _untold.discard(reason)
        warnings.warn(f"clvp_fast takes slower torch paths on the CPU: {reason}", stacklevel=5)


@cache
def isa() -> str:
    """Return the instruction set that the CPU's kernels use: its best, or the one that `CLVP_FAST_ISA` names.

    Raises as `library` does.
    """
    return library().clvp_fast_cpu_isa().decode()


def isas() -> tuple[str, ...]:
    """Return the sets of `ISAS` that this CPU and the library have, the best first. Raises as `library` does."""
    return tuple(name for name in ISAS if library().clvp_fast_has_isa(name.encode()))


def is_held_down() -> bool:
    """Tell whether the kernels use a lower instruction set than this CPU has. Raises as `library` does."""
    return isa() != isas()[0]


def choose_isa(name: str | None) -> None:
    """Choose the instruction set that the CPU's kernels use from now on; `None`: the best that this CPU has.

    Raises:
        ValueError: `name` is no instruction set of `ISAS`, or one that the CPU or the library lacks.
        NativeLibraryError: as `library`.
    """
    _check_name(name, "choose_isa()")
    _choose_isa(library(), name, "choose_isa()")


def _check_name(name: str | None, source: str) -> None:
    if name is not None and name not in ISAS:
        raise ValueError(f"{source} must be one of {', '.join(ISAS)}, not {name!r}")


def _choose_isa(found: ctypes.CDLL, name: str | None, source: str) -> None:
    isa.cache_clear()
    if found.clvp_fast_choose_isa(name and name.encode()):
        has = ", ".join(known for known in ISAS if found.clvp_fast_has_isa(known.encode()))
        raise ValueError(f"{source} is {name!r}, which this CPU lacks or the library was built without: it has {has}")


def check(code: int) -> None:
    """Raise `RuntimeError` with the library's own sentence if one of its functions returned a code other than 0.

    A positive code is an error of CUDA, which the CUDA part describes.
    """
    if code:
        told = library("cuda").clvp_fast_cuda_error if code > 0 else library().clvp_fast_error
        raise RuntimeError(told(code).decode())


class Bound:
    """A CPU kernel bound to the current values of `call`, which may be called any number of times.

    Args:
        function: its name in `csrc/clvp_fast.h`.
        threads: how many threads it uses.
        kept: objects to keep alive, because `call` holds their addresses.

    Calling it raises `RuntimeError` as `check`.
    """

    def __init__(self, function: str, call: ctypes.Structure, threads: int, *kept: object):
        self.function, self.call, self.threads, self.kept = function, call, threads, kept
        self._entrance, self._arguments = getattr(library(), function), (ctypes.byref(call), threads, None)

    def __call__(self) -> None:
        if code := self._entrance(*self._arguments):
            check(code)


class Joined:
    """Bound kernels that one call of the library runs, one after another: threads begin once for all of them.

    Args:
        kernels: at least one; all of functions in `OPERATIONS`, and with as many threads.

    Calling it raises `RuntimeError` as `check`; if one kernel is refused, none has run.
    """

    def __init__(self, kernels: Sequence[Bound]):
        self.kernels = tuple(kernels)
        calls = [AnyCall(OPERATIONS.index(one.function), ctypes.addressof(one.call)) for one in self.kernels]
        array = (AnyCall * len(calls))(*calls)
        self._entrance, self._arguments = library().clvp_fast_calls_cpu, (array, len(calls), kernels[0].threads, None)

    def __call__(self) -> None:
        if code := self._entrance(*self._arguments):
            check(code)


def joined(calls: Iterable[Callable[[], object]]) -> list[Callable[[], object]]:
    """Return calls with the same effect, in which neighbouring kernels are `Joined`; others stay as they are."""
    found: list[Callable[[], object] | list[Bound]] = []  # a list: kernels that are joined
    for call in calls:
        if not (isinstance(call, Bound) and call.function in OPERATIONS):
            found.append(call)
            continue
        before = found[-1] if found else None
        if isinstance(before, list) and before[0].threads == call.threads:
            before.append(call)
        else:
            found.append([call])
    return [Joined(one) if isinstance(one, list) else one for one in found]


@cache
def loaded(part: str) -> tuple[ctypes.CDLL | None, str]:
    """Return a part, or None and the reason."""
    forced = os.environ.get("CLVP_FAST_ISA") or None
    if part == "cpu":
        _check_name(forced, _VARIABLE)
    try:
        path = folder(part) / build.LIBRARIES[part]
        found = ctypes.CDLL(str(path))
    except NativeLibraryError as error:
        return None, str(error)
    except OSError as error:
        return None, f"the native library {path} cannot be loaded ({error}): {_anew()}"
    version = getattr(found, "clvp_fast_version", None)
    if version is not None:
        version.restype = ctypes.c_char_p
    if version is None or version() != VERSION.encode():
        return None, f"the native library {path} belongs to another version of clvp_fast: {_anew()}"
    set_prototypes(found, part)
    if part == "cpu":
        _choose_isa(found, forced, _VARIABLE)
    return found, ""


def _anew() -> str:
    rebuild = "run python -m clvp_fast.native --rebuild"
    return rebuild if is_checkout() else "install clvp-fast again"


def no_device() -> str | None:
    """Return why no CUDA device is visible, or None. Ask the driver, because torch may not be loaded."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"there is no NVIDIA driver ({_DRIVER} cannot be loaded)"
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return None if not code and count.value else f"the NVIDIA driver shows no device (CUresult {code})"


def _driver_refusal(found: ctypes.CDLL) -> str | None:
    """Return the CUDA part's complaint about the driver and the devices, or None if it can serve."""
    said = ctypes.create_string_buffer(512)
    return said.value.decode() if found.clvp_fast_cuda_missing(said, len(said)) else None


def is_checkout() -> bool:
    return (_SOURCES / build.HEADER).is_file()


@cache
def folder(part: str, /) -> Path:
    """Return the folder of a part of the library, with its header, record and build log. Raises as `library` does."""
    if is_checkout():
        return cached(part)
    where = _PACKAGED / part
    if _record(where, part) is None:
        compiler = {"cpu": "a C++ compiler", "cuda": "nvcc"}[part]
        raise NativeLibraryError(
            f"this installation of clvp-fast holds no whole {_name(part)}: reinstall it where there is {compiler}"
        )
    return where


def _name(part: str) -> str:
    return {"cpu": "native library", "cuda": "native library for CUDA"}[part]


def cached(part: str, anew: bool = False) -> Path:
    """Return the folder of the part built from the sources, in the user's cache; `anew` rebuilds it."""
    place: Path | None = None
    try:
        root = cache_folder()
        place = root / "native"
        tools = build.find_toolchain(part)
        target = place / build.content_hash(_SOURCES, tools, part, VERSION)
        if anew or _record(target, part) is None:
            make_private(place)
            _check_private(place, root)
            with _one_process(place) as alone:
                for left in place.glob(f".{target.name}-*") if alone else ():  # left by a killed process
                    shutil.rmtree(left, ignore_errors=True)
                if anew or _record(target, part) is None:
                    shutil.rmtree(target, ignore_errors=True)  # outdated or damaged
                    _build(part, target, tools, anew)
        _check_private(target / build.LIBRARIES[part], root)
    except build.BuildError as error:
        raise NativeLibraryError(f"the {_name(part)} cannot be built: {error}") from error
    except OSError as error:
        known = isinstance(error, UnwritableError)
        reason = sentence(error if known or place is None else UnwritableError.explain(error, place))
        named = "" if "CLVP_FAST_CACHE" in reason else " (the environment variable CLVP_FAST_CACHE names it)"
        raise NativeLibraryError(f"the {_name(part)} cannot be built: {reason}{named}") from error
    return target


def _check_private(path: Path, root: Path) -> None:
    if reason := changeable_by_others(path, root):
        raise build.BuildError(
            f"{reason}, and code is loaded from there: remove it, or name a folder of your own in CLVP_FAST_CACHE"
        )


def _build(part: str, target: Path, tools: build.Toolchain, anew: bool) -> None:
    """Build a part. A failure leaves a record and a log beside the library's folder, and is retried only on request."""
    failure, log = target.with_suffix(".json"), target.with_suffix(".log")
    again = f"({log} has all that it said; python -m clvp_fast.native --rebuild tries again)"
    told = _failed_before(failure)
    if told is not None and not anew:
        raise build.BuildError(f"{told['version']} did not compile it: {told['error']} {again}")
    failure.unlink(missing_ok=True)
    show = _progress(f"clvp_fast: building the {_name(part)} (once) with {tools}")
    try:
        build_folder_once(target, lambda scratch: build.build(_SOURCES, scratch, tools, part, VERSION, show))
    except build.BuildError as error:
        compiler = tools.nvcc or shlex.join(tools.cxx)
        told = {"compiler": compiler, "version": str(tools), "error": _first_error(error.log)}
        log.write_text(error.log, encoding="utf-8")
        write_json(failure, told)
        raise build.BuildError(f"{error}: {told['error']} {again}") from error


def _failed_before(failure: Path) -> dict | None:
    """Return the record of a failed build, or None if there is none or it is damaged."""
    try:
        told = json.loads(failure.read_text(encoding="utf-8"))
        return told if {"version", "error"} <= told.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):  # the disk was full when it was written
        return None


def _first_error(log: str) -> str:
    said = [line.strip() for line in log.splitlines() if not line.startswith("$ ") and line.strip()]
    return next((line for line in said if "error:" in line), said[-1] if said else "it said nothing")


def _progress(title: str):
    """Return a function that shows how many files are compiled: in one line on a terminal, else at each quarter.

    The line also has the rate and the time left.
    """
    on_terminal = sys.stderr.isatty()
    began = time.monotonic()

    def pace(done: int, total: int) -> str:
        seconds = time.monotonic() - began
        if not done or done == total:
            return ""
        return f", {done / seconds:.1f} a second, left: {timedelta(seconds=round(seconds / done * (total - done)))}"

    def show(done: int, total: int) -> None:
        if on_terminal:
            line = f"\r{title}: {done}/{total}{pace(done, total)}\x1b[K"  # clears the rest of a longer line
            print(line, end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif 4 * done // total > 4 * (done - 1) // total:
            print(f"{title}: {done}/{total}", file=sys.stderr, flush=True)

    return show


@contextmanager
def _one_process(place: Path):
    """Let one process build while others wait; yield whether this one builds.

    On a disk without locks every process builds, and one result stays.
    """
    import fcntl  # Windows lacks it, and has no library either

    with open(place / ".lock", "w") as handle:
        alone = False
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        yield alone


def record(part: str = "cpu") -> dict:
    """Return the record of the build of a part: see `build.build`. Raises as `library` does."""
    found = _record(folder(part), part)
    assert found is not None  # a complete folder has a record
    return found


def _record(where: Path, part: str) -> dict | None:
    """Return the record of the part in `where`, or None if it is missing or the library was changed."""
    try:
        record = json.loads((where / build.RECORD).read_text(encoding="utf-8"))
        whole = record["sha256"] == build.sha256(where / build.LIBRARIES[part])
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None
