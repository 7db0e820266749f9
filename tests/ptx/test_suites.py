"""Every kernel has its tests here, and the rows are of kernels that are."""

import pytest

from tests.ptx import native, suites
from tests.ptx.parse import instructions_of


def test_every_kernel_has_a_suite():
    kernels = {path.stem for path in suites.KERNELS.glob("*.py")} - suites.NO_KERNELS
    assert kernels | set(suites.NATIVE) == set(suites.SUITES)


def test_every_file_of_kernel_tests_belongs_to_a_suite():
    """Look at tests whose cases run on Triton's backends, except tests of the choice of them."""
    named = {name for kernel in suites.SUITES for name in suites.files(kernel)}
    found = {
        f"tests/ops/{path.name}"
        for path in (suites.ROOT / "tests/ops").glob("test_*.py")
        if "*TRITON" in path.read_text()
    }
    assert found <= named and all((suites.ROOT / name).exists() for name in named)


def test_rows_are_of_kernels():
    assert {kernel for kernel, _ in suites.rows()} <= set(suites.SUITES)


def test_the_page_shows_the_rows():
    page = suites.PAGE.read_text()
    assert suites.with_table(page) == page


@pytest.mark.parametrize(
    "statement",
    [
        "from clvp_fast.kernels.target import x",
        "from clvp_fast.kernels import target",
        "import clvp_fast.kernels.target as t",
        "from .target import x",
        "from . import target",
        "def f():\n    from clvp_fast.kernels import target",
    ],
)
def test_a_source_is_what_it_imports_too(monkeypatch, tmp_path, statement):
    (tmp_path / "target.py").write_text("x = 1\n")
    (tmp_path / "norm.py").write_text(f"import torch\n{statement}\n")
    monkeypatch.setattr(suites, "KERNELS", tmp_path)
    before = suites.source_hash("norm", 80)
    (tmp_path / "target.py").write_text("x = 2\n")
    assert suites.source_hash("norm", 80) != before


def test_a_source_is_its_code_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "KERNELS", tmp_path)
    path = tmp_path / "norm.py"
    path.write_text('"""Head."""\n\n\ndef f(x):\n    """Add one."""\n    return x + 1  # one\n')
    before = suites.source_hash("norm", 80)
    path.write_text('"""Another\n\nhead."""\n# why\n\ndef f(x):\n    """Add 1."""\n\n    return x + 1\n')
    assert suites.source_hash("norm", 80) == before
    path.write_text('"""Head."""\n\n\ndef f(x):\n    return x + 2\n')
    assert suites.source_hash("norm", 80) != before
    beside = 'class A:\n    """Ä."""; x = {}\n    def f(x): """One.\n\n    Two."""; return x + {}\n'
    codes = {suites._code(beside.format(*numbers), True) for numbers in ((1, 1), (2, 1), (1, 2))}
    assert len(codes) == 3
    assert suites._code('f("a//b", 1);', False) != suites._code('f("a//b", 2);', False)
    assert suites._code("a = 1; // one\n/* two */ b = 2;\n", False) == suites._code("a = 1;\nb   = 2;", False)
    assert suites._code("a = 1;", False) != suites._code("a = 2;", False)


PTX = """// {0}
	.file	1 "/{0}/csrc/cuda/log_mel.cu"
.entry _ZN9clvp_fast43_GLOBAL__N__{0}0f1ce0_10_log_mel_cu_{0}002ba57log_melILi256EsEEv17clvp_fast_log_mel(
	.loc	1 {0} 5, function_name $L__info_string{0}, inlined_at 1 60 5
	// begin inline asm
	mov.u32 	%r1, {1};
"""


def test_a_source_of_csrc_is_what_is_executed():
    """Hold edits of comments and the path of the folder to be no change, and another instruction to be one."""
    of = instructions_of
    assert of(PTX.format(57, 1)) == of(PTX.format(61, 1)) != of(PTX.format(57, 2))
    assert "_log_mel_cu_7log_melILi256E" in of(PTX.format(57, 1)) and "mov.u32" in of(PTX.format(57, 1))


def test_a_kernel_of_csrc_without_nvcc_is_not_told_to_be_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(native, "missing", lambda: "there is no nvcc")
    assert suites.changed(90) == [name for name in suites.SUITES if name not in suites.NATIVE]


def test_a_changed_kernel_is_one_without_the_row_of_its_source(monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(suites, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(suites, "_executed_hash", lambda kernel, target: "what nvcc would take its time to make")
    suites.PAGE.write_text("<!-- checked -->\n<!-- end -->\n")
    assert suites.changed(80) == list(suites.SUITES)
    passed = dict(tests=1, seconds=1, ran=1, instructions=1, compiler="triton 3.7.1")
    suites.write(dict(kernel="norm", target="sm_80", source=suites.source_hash("norm", 80), **passed))
    suites.write(dict(kernel="mlp", target="sm_80", source="another", **passed))
    suites.write(dict(kernel="linear", target="sm_90", source=suites.source_hash("linear", 90), **passed))
    assert suites.changed(80) == [name for name in suites.SUITES if name != "norm"]


def test_the_core_has_a_test_of_every_kernel():
    for target in suites.TARGETS:
        lines = suites.core(target)
        assert lines == sorted(set(lines)) and all("[interpreted" in line or "_as_ptx" in line for line in lines)
    for kernel in suites.SUITES:
        assert any(line.startswith(tuple(suites.files(kernel))) for line in suites.core(80)), kernel
