"""The native library of `csrc/`, loaded through ctypes: where it is found, and the prototypes of its functions.

An installed package carries it. In a checkout it is compiled at first use into the user's cache, under a name that
changes with the sources, the flags and the compilers. `python -m clvp_fast.native` prints what there is.
"""

import argparse
import ctypes
import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from clvp_fast import native_build
from clvp_fast.files import UnwritableError, build_folder_once, cache_folder

#: `enum clvp_fast_dtype` of csrc/clvp_fast.h.
FLOAT32, FLOAT64, INT16, FLOAT16, BFLOAT16, INT8 = range(6)
#: `enum clvp_fast_activation`.
NO_ACTIVATION, GELU_TANH, GELU = range(3)

#: Instruction sets of a CPU that kernels are compiled for, the best first.
ISAS = tuple(native_build.ISA_FLAGS)

_PACKAGE = Path(__file__).resolve().parent
_PACKAGED = _PACKAGE / "_native"
_SOURCES = _PACKAGE.parent / "csrc"


class NativeLibraryError(RuntimeError):
    """The native library cannot be had; the message says in one sentence what is missing and what to do."""


class LogMelCall(ctypes.Structure):
    """`struct clvp_fast_log_mel` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("samples", c_void_p),
        ("lengths", c_void_p),
        ("window", c_void_p),
        ("twiddles", c_void_p),
        ("mel_filters", c_void_p),
        ("bands", c_void_p),
        ("mel_norms", c_void_p),
        ("features", c_void_p),
        ("clip_maxima", c_void_p),
        ("batch", c_int64),
        ("time", c_int64),
        ("samples_stride", c_int64),
        ("hop_length", c_int64),
        ("frames", c_int64),
        ("n_fft", c_int32),
        ("num_mels", c_int32),
        ("samples_dtype", c_int32),
        ("compute_dtype", c_int32),
        ("features_dtype", c_int32),
        ("decibels", c_int32),
        ("log_floor", c_double),
        ("top_db", c_double),
    )


class PagedDecodeCall(ctypes.Structure):
    """`struct clvp_fast_paged_decode` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("q", c_void_p),
        ("k_new", c_void_p),
        ("v_new", c_void_p),
        ("k_pages", c_void_p),
        ("v_pages", c_void_p),
        ("out", c_void_p),
        ("block_table", c_void_p),
        ("seq_lens", c_void_p),
        ("prefix_table", c_void_p),
        ("prefix_lens", c_void_p),
        ("prefix_index", c_void_p),
        ("q_strides", c_int64 * 2),
        ("k_new_strides", c_int64 * 2),
        ("v_new_strides", c_int64 * 2),
        ("page_strides", c_int64 * 3),
        ("block_table_stride", c_int64),
        ("prefix_table_stride", c_int64),
        ("num_candidates", c_int64),
        ("num_pages", c_int64),
        ("num_prefixes", c_int64),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("page_size", c_int32),
        ("max_pages", c_int32),
        ("max_prefix_pages", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
    )


class LinearCall(ctypes.Structure):
    """`struct clvp_fast_linear` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("x_stride", c_int64),
        ("weight_stride", c_int64),
        ("rows", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int32),
        ("weight_dtype", c_int32),
        ("activation", c_int32),
    )


class MlpCall(ctypes.Structure):
    """`struct clvp_fast_mlp` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("x", c_void_p),
        ("w_in", c_void_p),
        ("b_in", c_void_p),
        ("w_out", c_void_p),
        ("b_out", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("x_stride", c_int64),
        ("w_in_stride", c_int64),
        ("w_out_stride", c_int64),
        ("rows", c_int64),
        ("in_features", c_int64),
        ("inner_features", c_int64),
        ("out_features", c_int64),
        ("dtype", c_int32),
        ("out_dtype", c_int32),
        ("activation", c_int32),
        ("item_rows", c_int32),
        ("gated", c_int32),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("eps", c_float),
    )


class WindowAttentionCall(ctypes.Structure):
    """`struct clvp_fast_window_attention` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("q_strides", c_int64 * 4),
        ("k_strides", c_int64 * 4),
        ("v_strides", c_int64 * 4),
        ("bias_strides", c_int64 * 3),
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("shift", c_int32),
        ("dtype", c_int32),
        ("bias_dtype", c_int32),
        ("scale", c_float),
    )


class WindowBlockCall(ctypes.Structure):
    """`struct clvp_fast_window_block` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("x", c_void_p),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("w_qkv", c_void_p),
        ("b_qkv", c_void_p),
        ("bias", c_void_p),
        ("w_out", c_void_p),
        ("b_out", c_void_p),
        ("out", c_void_p),
        ("w_qkv_stride", c_int64),
        ("w_out_stride", c_int64),
        ("bias_strides", c_int64 * 3),
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("shift", c_int32),
        ("dtype", c_int32),
        ("eps", c_float),
    )


class SampleCall(ctypes.Structure):
    """`struct clvp_fast_sample` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("logits", c_void_p),
        ("seen", c_void_p),
        ("done", c_void_p),
        ("sampled", c_void_p),
        ("temperature", c_void_p),
        ("top_p", c_void_p),
        ("typical_p", c_void_p),
        ("min_p", c_void_p),
        ("repetition_penalty", c_void_p),
        ("top_k", c_void_p),
        ("seed", c_void_p),
        ("candidate", c_void_p),
        ("step", c_void_p),
        ("tokens", c_void_p),
        ("logits_stride", c_int64),
        ("seen_stride", c_int64),
        ("rows", c_int64),
        ("vocab_size", c_int64),
        ("pad_token", c_int64),
        ("dtype", c_int32),
        ("do_sample", c_int32),
    )


class DecoderLayer(ctypes.Structure):
    """`struct clvp_fast_decoder_layer` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            "input_norm_weight",
            "input_norm_bias",
            "qkv_weight",
            "qkv_bias",
            "out_weight",
            "out_bias",
            "post_norm_weight",
            "post_norm_bias",
            "mlp_in_weight",
            "mlp_in_bias",
            "mlp_out_weight",
            "mlp_out_bias",
            "k_pages",
            "v_pages",
        )
    )


class PersistentDecodeCall(ctypes.Structure):
    """`struct clvp_fast_persistent_decode` of csrc/clvp_fast.h, which explains the fields."""

    _fields_ = (
        ("layers", c_void_p),
        ("token_table", c_void_p),
        ("position_table", c_void_p),
        ("first_norm_weight", c_void_p),
        ("first_norm_bias", c_void_p),
        ("final_norm_weight", c_void_p),
        ("final_norm_bias", c_void_p),
        ("head_weight", c_void_p),
        ("head_bias", c_void_p),
        ("tokens", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("prefix_table", c_void_p),
        ("prefix_lens", c_void_p),
        ("prefix_index", c_void_p),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("workspace", c_void_p),
        ("page_strides", c_int64 * 3),
        ("block_table_stride", c_int64),
        ("prefix_table_stride", c_int64),
        ("num_pages", c_int64),
        ("num_prefixes", c_int64),
        ("num_candidates", c_int32),
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("vocab_size", c_int32),
        ("num_positions", c_int32),
        ("page_size", c_int32),
        ("max_pages", c_int32),
        ("max_prefix_pages", c_int32),
        ("contiguous_positions", c_int32),
        ("dtype", c_int32),
        ("layer_eps", c_float),
        ("first_eps", c_float),
        ("final_eps", c_float),
        ("scale", c_float),
    )


def library() -> ctypes.CDLL:
    """The library with its prototypes set, compiled first where that is needed.

    Raises:
        NativeLibraryError: there is none; the message says why and what to do.
        ValueError: `CLVP_FAST_ISA` names no instruction set, or one that this CPU lacks.
    """
    found, why = _loaded()
    if found is None:
        raise NativeLibraryError(why)
    return found


@cache
def missing(device_type: str) -> str | None:
    """Why the library cannot serve on `"cpu"` or `"cuda"`, or None where it can. Compiles it where that is needed."""
    found, why = _loaded()
    if found is None:
        return why
    if device_type == "cuda":
        if hasattr(found, "clvp_fast_log_mel_cuda"):
            return None
        return f"the native library was built without CUDA: {record()['no_cuda']} (see {folder() / native_build.LOG})"
    return None if device_type == "cpu" else f"the native library serves cpu and cuda, not {device_type}"


@cache
def isa() -> str:
    """Tells the instruction set that a CPU's kernels run on: its best, or the one that `CLVP_FAST_ISA` names.

    Raises as `library` does.
    """
    return library().clvp_fast_cpu_isa().decode()


def isas() -> tuple[str, ...]:
    """Tells which of `ISAS` this CPU and the library have, the best first. Raises as `library` does."""
    return tuple(name for name in ISAS if library().clvp_fast_has_isa(name.encode()))


def choose_isa(name: str | None) -> None:
    """Chooses the instruction set that a CPU's kernels run on from now on; `None`: the best that this CPU has.

    Raises:
        ValueError: `name` is no instruction set of `ISAS`, or one that the CPU or the library lacks.
        NativeLibraryError: as `library`.
    """
    _choose_isa(library(), name, "choose_isa()")


def _choose_isa(found: ctypes.CDLL, name: str | None, source: str) -> None:
    if name is not None and name not in ISAS:
        raise ValueError(f"{source} must be one of {', '.join(ISAS)}, not {name!r}")
    isa.cache_clear()
    if found.clvp_fast_choose_isa(name and name.encode()):
        has = ", ".join(known for known in ISAS if found.clvp_fast_has_isa(known.encode()))
        raise ValueError(f"{source} is {name!r}, which this CPU lacks or the library was built without: it has {has}")


def check(code: int) -> None:
    """Raises `RuntimeError` with the library's own sentence if a function of it returned other than 0."""
    if code:
        raise RuntimeError(library().clvp_fast_error(code).decode())


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    try:
        path = folder() / native_build.LIBRARY
        found = ctypes.CDLL(str(path))
        found.clvp_fast_log_mel_cpu.argtypes = [POINTER(LogMelCall), c_int32, c_char_p]
        found.clvp_fast_log_mel_cpu.restype = c_int
        found.clvp_fast_paged_decode_cpu.argtypes = [POINTER(PagedDecodeCall), c_int32, c_char_p]
        found.clvp_fast_paged_decode_cpu.restype = c_int
        found.clvp_fast_linear_cpu.argtypes = [POINTER(LinearCall), c_int32, c_char_p]
        found.clvp_fast_linear_cpu.restype = c_int
        found.clvp_fast_mlp_cpu.argtypes = [POINTER(MlpCall), c_int32, c_char_p]
        found.clvp_fast_mlp_cpu.restype = c_int
        found.clvp_fast_window_attention_cpu.argtypes = [POINTER(WindowAttentionCall), c_int32, c_char_p]
        found.clvp_fast_window_attention_cpu.restype = c_int
        found.clvp_fast_window_block_cpu.argtypes = [POINTER(WindowBlockCall), c_int32, c_char_p]
        found.clvp_fast_window_block_cpu.restype = c_int
        found.clvp_fast_sample_cpu.argtypes = [POINTER(SampleCall), c_int32, c_char_p]
        found.clvp_fast_sample_cpu.restype = c_int
        found.clvp_fast_cpu_isa.argtypes = []
        found.clvp_fast_cpu_isa.restype = c_char_p
        found.clvp_fast_has_isa.argtypes = [c_char_p]
        found.clvp_fast_has_isa.restype = c_int
        found.clvp_fast_choose_isa.argtypes = [c_char_p]
        found.clvp_fast_choose_isa.restype = c_int
        found.clvp_fast_error.argtypes = [c_int]
        found.clvp_fast_error.restype = c_char_p
        if hasattr(found, "clvp_fast_log_mel_cuda"):
            found.clvp_fast_log_mel_cuda.argtypes = [POINTER(LogMelCall), c_void_p]
            found.clvp_fast_log_mel_cuda.restype = c_int
            found.clvp_fast_persistent_decode_cuda.argtypes = [POINTER(PersistentDecodeCall), c_void_p]
            found.clvp_fast_persistent_decode_cuda.restype = c_int
            found.clvp_fast_persistent_decode_workspace.argtypes = [POINTER(PersistentDecodeCall)]
            found.clvp_fast_persistent_decode_workspace.restype = c_int64
    except NativeLibraryError as error:
        return None, str(error)
    except (OSError, AttributeError) as error:
        return None, f"the native library {path} cannot be loaded ({error}): remove its folder to have it built anew"
    _choose_isa(found, os.environ.get("CLVP_FAST_ISA") or None, "the environment variable CLVP_FAST_ISA")
    return found, ""


@cache
def folder() -> Path:
    """The folder of the library, its header, its record and its build log. Raises as `library` does."""
    if (_SOURCES / native_build.HEADER).is_file():
        return _cached(_SOURCES)
    if _record(_PACKAGED) is None:
        raise NativeLibraryError(
            "this installation of clvp-fast holds no whole native library: reinstall it where there is a C++ compiler"
        )
    return _PACKAGED


def _cached(sources: Path) -> Path:
    """The folder of the library made from `sources`, in the user's cache."""
    try:
        place = cache_folder() / "native"
        tools = native_build.find_toolchain()
        target = place / native_build.content_hash(sources, tools)
        if _record(target) is None:
            place.mkdir(parents=True, exist_ok=True)
            with _one_process(place):
                if _record(target) is None:
                    shutil.rmtree(target, ignore_errors=True)  # damaged
                    _build(sources, target, tools)
    except RuntimeError as error:  # no compiler, a build that failed, a user without a home
        raise NativeLibraryError(f"the native library cannot be built: {error}") from error
    except OSError as error:
        reason = error if isinstance(error, UnwritableError) else UnwritableError.explain(error, place)
        raise NativeLibraryError(
            f"the native library cannot be built: {reason} (the environment variable CLVP_FAST_CACHE names it)"
        ) from error
    return target


def _build(sources: Path, target: Path, tools: native_build.Toolchain) -> None:
    """A failure leaves its log beside the place of the library, and is not tried again while the log is there."""
    log = target.with_suffix(".log")
    again = f"{log} has what it said; remove that file to try again"
    if log.exists():
        raise native_build.BuildError(f"{tools.cxx_version} did not compile it; {again}")
    named = f"{tools.cxx_version}" + (f" and nvcc {tools.nvcc_version}" if tools.nvcc else "")
    print(f"clvp_fast: building the native library (once) with {named}", file=sys.stderr, flush=True)
    try:
        build_folder_once(target, lambda scratch: native_build.build(sources, scratch, tools))
    except native_build.BuildError as error:
        log.write_text(error.log, encoding="utf-8")
        raise native_build.BuildError(f"{error}; {again}") from error


@contextmanager
def _one_process(place: Path):
    """Lets one process build while others wait. Where a disk knows no locks, each builds and one result stays."""
    import fcntl  # not on Windows, where there is no library either

    with open(place / ".lock", "w") as handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def record() -> dict:
    """What the library was built with: the fields of `native_build.Toolchain`. Raises as `library` does."""
    return _record(folder())


def _record(where: Path) -> dict | None:
    """The record of the library in `where`, or None if it is not there, or not as it was built."""
    try:
        record = json.loads((where / native_build.RECORD).read_text(encoding="utf-8"))
        whole = record["sha256"] == native_build.sha256(where / native_build.LIBRARY)
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clvp_fast.native", description="Builds the library if needed.")
    parser.add_argument("--require", choices=("cpu", "cuda"), default="cpu", help="what it must serve; else exit 1")
    arguments = parser.parse_args(argv)
    absent = missing("cpu") or missing(arguments.require)
    if absent:
        print(absent, file=sys.stderr)
        return 1
    built, cuda = record(), missing("cuda")
    print(f"library  {folder() / native_build.LIBRARY}")
    print(f"cpu      {isa()} here; {built['cxx_version']}")
    served = ", ".join(f"sm_{arch}" for arch in built["architectures"]) + f"; nvcc {built['nvcc_version']}"
    print(f"cuda     {cuda or served}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
