"""Every shipped configuration compiles for the GPUs that are promised, without spilling registers."""

import json
import re
from itertools import product
from pathlib import Path

import pytest

from benchmarks.aot.__main__ import FAMILIES, TRITON_FAMILIES, in_new_process
from benchmarks.aot.compiling import ARCHITECTURES
from benchmarks.aot.native_library import parse, rows as native_rows
from benchmarks.aot.tables import DOCUMENT, RESULTS, with_tables
from benchmarks.aot.uniform_registers import unwritten
from clvp_fast import native
from clvp_fast.native import build
from clvp_fast.native.build import CUDA_SOURCES
from tests.kit.isa import needs_library

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Calls in which sm_90 must use its asynchronous matrix instruction, and those among them that are too small for it.
MATRIX = {
    "rotary_attention": ("bf16", "one query"),
    "paged_attention": ("prefill, 16 × 64, b", "-"),
    "window_attention": ("8 × 8", "-"),
}


# Minutes of compiling: `make test` has the families of few calls, for one architecture.
LONG = ("rotary_attention", "mlp")


@pytest.mark.parametrize(
    "family, arch",
    [
        pytest.param(family, arch, marks=[pytest.mark.slow] if family in LONG or arch != 90 else [])
        for family, arch in product(TRITON_FAMILIES, ARCHITECTURES)
    ],
)
def test_every_configuration_compiles_without_spills(family, arch):
    rows = in_new_process(family, arch)
    assert rows
    spilled = [f"{row['kernel']} ({row['call']}): {row['spilled_bytes']} B" for row in rows if row["spilled_bytes"]]
    assert not spilled, spilled
    assert max(row["shared_bytes"] for row in rows) <= SHARED_LIMIT[arch]
    if arch == 90 and family in MATRIX:
        named, small = MATRIX[family]
        wanted = [row for row in rows if named in row["call"] and small not in row["call"]]
        assert wanted and all(row["matrix_instruction"] == "wgmma" for row in wanted), wanted
    # A row has the same bits over int8 weights for any number of rows: of one instruction, not of several.
    int8 = [row for row in rows if "int8" in row["call"] or (family == "linear" and " weights, " not in row["call"])]
    assert {row["matrix_instruction"] for row in int8} <= {"mma"}
    if family in ("mlp", "linear"):
        found = {row["matrix_instruction"] for row in rows if row not in int8}
        assert found == {{80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]}, "over other weights it has the same, too"


def test_the_document_shows_the_rows():
    document = DOCUMENT.read_text()
    assert all(f"<!-- compiled: {family} -->" in document for family in FAMILIES)
    assert with_tables(document) == document


def test_every_family_is_compiled():
    kernels = {path.stem for path in (Path(__file__).parents[2] / "kernels").glob("*.py")}
    # Those of pages are one family, and two files launch nothing.
    assert kernels - {"target", "pages"} == {*TRITON_FAMILIES, "paged_prefill"}


def _needs_nvcc():
    try:
        build.find_toolchain("cuda")
    except build.BuildError as error:
        pytest.skip(str(error))
    assert native.library("cuda")


# nvcc takes a minute where nothing is cached: CI runs the CUDA part's tests behind the step that compiles it.
@needs_library
@pytest.mark.parametrize("part", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_the_native_library_compiles_without_warnings(part):
    if part == "cuda":
        _needs_nvcc()
    log = (native.folder(part) / build.LOG).read_text()
    assert "-Wall" in log and "-Wextra" in log
    said = [line for line in log.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)]
    assert not said, said


@pytest.mark.slow
def test_the_native_kernels_compile_without_spills():
    _needs_nvcc()
    for family, arch in product(CUDA_SOURCES, ARCHITECTURES):
        rows = native_rows(family, arch)
        assert rows
        held_elsewhere = [row for row in rows if row["spilled_bytes"] or row["stack_bytes"]]
        assert not held_elsewhere, held_elsewhere
        assert max(row["shared_bytes"] for row in rows) <= SHARED_LIMIT[arch]


@pytest.mark.slow
@pytest.mark.parametrize("family", CUDA_SOURCES)
def test_the_recorded_rows_are_those_of_the_sources(family):
    _needs_nvcc()
    recorded = [json.loads(line) for line in (RESULTS / f"{family}.jsonl").read_text().splitlines()]
    found = [{"family": family, **row} for arch in ARCHITECTURES for row in native_rows(family, arch)]
    if recorded[0]["nvcc"] != native.record("cuda")["nvcc_version"]:
        pytest.skip(f"the rows were recorded with nvcc {recorded[0]['nvcc']}")
    assert [row | {"utc": None} for row in recorded] == [row | {"utc": None} for row in found], (
        f"run: python -m benchmarks.aot {family} --write"
    )


def test_the_log_of_ptxas_is_parsed():
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kILi1024EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z1kILi1024EEvPf
    512 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 141 registers, used 1 barriers, 512 bytes cumulative stack size, 4096 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1kILi256EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z1kILi256EEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 360 bytes cmem[0]
"""
    small, large = parse(log)
    assert {**small, "kernel": ""} == {
        "kernel": "", "arch": 80, "registers": 40, "shared_bytes": 0, "stack_bytes": 0, "spilled_bytes": 0
    }  # fmt: skip
    assert {**large, "kernel": ""} == {
        "kernel": "", "arch": 80, "registers": 141, "shared_bytes": 4096, "stack_bytes": 512, "spilled_bytes": 32
    }  # fmt: skip
    assert "256" in small["kernel"] and "1024" in large["kernel"]


def test_a_register_that_nothing_wrote_is_found():
    """Check ptxas 12.8's code of rotary attention of 40 channels with 32 turning, and the correct code."""
    sass = """
.text.kernel:
        /*0000*/                   ULDC.64 UR24, c[0x0][0x208] ;
        /*0010*/                   UMOV UR8, URZ ;
        /*0020*/                   USGXT.U32 UR30, UR24, 0xe ;
        /*0030*/                   UMOV UR31, 0xc0000010 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   UIADD3 UR26, UP0, UR30, 0x20, URZ ;
        /*0060*/                   UIADD3.X UR27, UR8, -0x3ffffff0, URZ, UP0, !UPT ;
.L_x_1:
        /*0070*/              @!P2 LDG.E.U16 R140, desc[UR24][R24.64+0x20] ;
        /*0080*/                   HGMMA.64x16x16.F32 R128, R24, gdesc[UR28].tnspB, R128 ;
        /*0090*/                   HGMMA.64x16x16.F32 R128, R28, gdesc[UR24].tnspB, R128, gsb0 ;
        /*00a0*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
        /*00b0*/                   EXIT ;
"""
    assert unwritten(sass) == []
    lost = sass.replace("UR26, UP0, UR30,", "UR26, UP0, UR26,").replace("UR27, UR8,", "UR27, UR27,")
    assert [line[:4] for line in unwritten(lost)] == ["0050", "0060"]
    on_one_path = sass.replace(
        "        /*00b0*/                   EXIT", "        /*00b0*/                   UMOV UR4, UR26"
    )
    assert [line[:4] for line in unwritten(on_one_path)] == ["00b0"]
    # Both operands in shared memory: all four registers are read.
    both = sass.replace("R24, gdesc[UR28].tnspB", "gdesc[UR28]")
    assert [line[:4] for line in unwritten(both)] == ["0080"]
