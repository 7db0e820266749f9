"""`python -m tests.ptx` with arguments that make no sense, without its tools, and with files that others left."""

import json
import sys

import pytest

from tests.ptx import __main__ as commands, native, suites


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["check", "foo"], "no kernel foo; there are embedding, linear"),
        (["mutate", "norm", "Mlp"], "no kernel Mlp"),
        (["core", "norm"], "takes no kernel"),
        (["core", "--arch", "70"], "invalid choice: 70"),
        (["mutate", "--seconds", "-5"], "a number from 0 on, got -5"),
        (["mutate", "--seconds", "nan"], "a number from 0 on, got nan"),
        (["check", "--workers", "0"], "a number from 1 on, got 0"),
    ],
)
def test_bad_arguments(capsys, arguments, what):
    with pytest.raises(SystemExit) as stopped:
        commands.main(arguments)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and what in told.splitlines()[-1]


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "tests.ptx.__main__")
    with pytest.raises(SystemExit, match="there is no triton here"):
        __import__("tests.ptx.__main__")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Let rows and pages lie in an empty folder; give it."""
    for name in ("ROWS", "MUTATED"):
        monkeypatch.setattr(suites, name, tmp_path / name)
        (tmp_path / name).touch()
    for name, mark in (("PAGE", "checked"), ("FAULTS_PAGE", "faults")):
        monkeypatch.setattr(suites, name, tmp_path / name)
        (tmp_path / name).write_text(f"<!-- {mark} -->\n<!-- end -->\n")
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    return tmp_path


def test_without_nvcc_kernels_of_csrc_are_skipped_with_the_reason(monkeypatch, elsewhere, capsys):
    monkeypatch.setattr(native, "missing", lambda: "there is no nvcc")
    assert commands.main(["check", "log_mel", "--arch", "80"]) == 0
    assert commands.main(["mutate", "log_mel", "--arch", "80", "--seconds", "1"]) == 0
    assert capsys.readouterr().out.count("log_mel           skipped: there is no nvcc") == 2
    assert suites.rows() == {} and suites.faults() == []


def test_surveys_of_kernels_that_are_gone_are_passed_over(elsewhere):
    """Do SECONDS=0, which reads the folder alone."""
    folder = elsewhere / "out/ptx-mutants"
    folder.mkdir(parents=True)
    row = dict(fault=["k", "p", 1, "comparison"], where="norm.py:2:3", text="setp", seen="a test")
    for name in ("norm-sm_80-" + suites.source_hash("norm", 80), "norm-sm_80-0f", "gone-sm_80-1f", "notes"):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert commands.main(["mutate", "--seconds", "0"]) == 0
    assert [(one["kernel"], one["target"], one["faults"]) for one in suites.faults()] == [("norm", "sm_80", 1)]


def test_a_kill_while_rows_are_written_leaves_the_former_ones(monkeypatch, elsewhere):
    row = dict(kernel="norm", target="sm_80", source="1f", tests=1, seconds=1, ran=1, instructions=1, compiler="triton")
    suites.write(row)

    def killed(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(suites.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        suites.write(row | {"source": "2f"})
    assert suites.rows()["norm", "sm_80"]["source"] == "1f"
