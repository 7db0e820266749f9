"""Expectations of a CPU's kernels: from its flags, `CLVP_FAST_ISA` and docs/kernels.md, and never from the package.

A test that asks the package what serves, and skips where it answers "nothing", misses a fault that refuses all calls.
"""

import os
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from clvp_fast import native

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
# Flags of /proc/cpuinfo that an instruction set takes, the best first.
_FLAGS = {
    "avx512bf16": {*_AVX512, "avx512_vnni", "avx512_bf16"},
    "avx512vnni": {*_AVX512, "avx512_vnni"},
    "avx512": _AVX512,
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx2": {"avx2", "fma"},
    "portable": set(),
}
ISAS = tuple(_FLAGS)
#: Sets with products of 8 bits of their own; all else is the code of avx512 and avx2.
VNNI = ("avx512vnni", "avxvnni")

_EVERY = set(ISAS)
_PRODUCTS = _EVERY - {"portable"}
#: Operators of which a CPU has a kernel, and the instruction sets that they serve, by the type of their numbers: the
#: table in docs/kernels.md. "many rows" are `linear` of more than 512 rows and the blocks that are made of such layers.
SERVED = {
    "log_mel": dict.fromkeys((torch.float32, torch.bfloat16), _EVERY),
    "sample": dict.fromkeys((torch.float32, torch.bfloat16), _EVERY),
    "paged_attention_decode": dict.fromkeys((torch.float32, torch.bfloat16), _EVERY),
    "paged_prefill": dict.fromkeys((torch.float32, torch.bfloat16), _EVERY),
    "add_norm": dict.fromkeys((torch.float32, torch.bfloat16), _EVERY),
    "window_attention": dict.fromkeys((torch.float32, torch.bfloat16), _EVERY),
    "rotary_attention": dict.fromkeys((torch.float32, torch.bfloat16), _PRODUCTS),
    "linear": dict.fromkeys((torch.float32, torch.bfloat16, torch.int8), _PRODUCTS),
    "many rows": dict.fromkeys((torch.float32, torch.bfloat16), _PRODUCTS),
}


@cache
def cpu_flags() -> frozenset[str]:
    """Return this CPU's flags by Linux; none on a machine that is not x86."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return frozenset(found[1].split()) if found else frozenset()


def expected_isas() -> tuple[str, ...]:
    """Return the instruction sets of this CPU, the best first."""
    return tuple(name for name, flags in _FLAGS.items() if flags <= cpu_flags())


def expected_isa() -> str:
    """Return the instruction set that kernels run on unless a program has chosen one."""
    return os.environ.get("CLVP_FAST_ISA") or expected_isas()[0]


def has_matrix_unit() -> bool:
    """Tell whether this CPU multiplies matrices of bfloat16 in hardware, so that torch's products serve that type."""
    return "amx_bf16" in cpu_flags()


@cache
def why_no_compiler() -> str | None:
    compilers = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    return None if any(map(shutil.which, compilers)) else "there is no C++ compiler, so there is no native library"


@cache
def why_no_library() -> str | None:
    """Return why this machine cannot have the native library, which is compiled into the user's cache, or None."""
    if reason := why_no_compiler():
        return reason
    try:
        home = Path(os.environ.get("CLVP_FAST_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home())
    except RuntimeError:  # this user has none
        return "there is no home, so there is no native library"
    while not home.exists():
        home = home.parent
    return None if os.access(home, os.W_OK) else "the cache cannot be written, so there is no native library"


def why_unserved(operator: str, dtype: torch.dtype = torch.float32, name: str | None = None) -> str | None:
    """Return why, by the documents, this CPU's kernel of an entry of `SERVED` does not serve here, or None.

    name: the instruction set; None: that which kernels run on.
    """
    name = name or expected_isa()
    if reason := why_no_library():
        return reason
    if name not in SERVED[operator][dtype]:
        return f"{operator} of {dtype} has no kernel on a CPU with {name}"
    products = operator in ("linear", "many rows", "rotary_attention")
    if products and dtype == torch.bfloat16 and has_matrix_unit():
        return "this CPU has a matrix unit for bfloat16, which torch's own products use"
    return None


def needs(operator: str, dtype: torch.dtype = torch.float32) -> pytest.MarkDecorator:
    """Mark a test of a CPU's kernel, to skip it where by the documents the kernel does not serve."""
    reason = why_unserved(operator, dtype)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


_REMEMBERED = (native.missing, native.isa, native.folder, native.loaded)  # the functions, also behind stand-ins


def forget_library() -> None:
    """Let this process forget that it has asked for the native library."""
    for function in _REMEMBERED:
        function.cache_clear()


def run_on(request: pytest.FixtureRequest, name: str) -> None:
    """Run the CPU's kernels on one instruction set until the fixture ends; skips the test where this CPU has none."""
    if name not in expected_isas():
        pytest.skip(f"this CPU has no {name}")
    before = native.isa()
    request.addfinalizer(lambda: native.choose_isa(before))
    native.choose_isa(name)


needs_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
needs_library = pytest.mark.skipif(why_no_library() is not None, reason=str(why_no_library()))
