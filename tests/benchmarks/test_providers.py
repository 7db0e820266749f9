"""Choice of the providers that a run measures; a missing one does not cost others their rows."""

import json
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks import harness, providers, report, run
from benchmarks.harness import Machine, Provider, task
from benchmarks.providers import Absent, group_of, only


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("clvp_fast kernel, float64", "ours"),
        ("scheduler, lag 0", "ours"),
        ("float32, int8 weights", "ours"),
        ("torch.stft, matmul, log", "torch"),
        ("torch, compiled", "torch"),
        ("torchaudio, log, norms", "torchaudio"),
        ("SDPA math, dense keys", "sdpa"),
        ("transformers' processors", "transformers"),
        ("FlashInfer, shared prefix", "flashinfer"),
        ("flashmel, no log, no norms", "flashmel"),
        ("ONNX Runtime float32, no draw", "onnx"),
        ("OpenVINO int8 weights, no draw", "openvino"),
        ("CTranslate2 int8, no draw", "ctranslate2"),
        ("llama.cpp q8_0, no draw", "llama"),
        ("asrfront", "asrfront"),
        ("", "ours"),
    ],
)
def test_a_name_begins_with_its_group(name, group):
    assert group_of(name) == group


def test_a_name_tells_the_bits_of_weights():
    names = {
        32: ("clvp_fast float32", "llama.cpp float32", "torch, compiled"),
        16: ("torch bfloat16, no draw", "llama.cpp float16", "bfloat16, float8 pages"),
        8: ("clvp_fast bfloat16, int8 weights", "llama.cpp q8_0", "ONNX Runtime blocks of int8"),
    }
    for bits, of_bits in names.items():
        assert [providers.bits(name) for name in of_bits] == [bits] * 3


def test_groups_are_read_in_one_order_and_forgotten_behind_the_run():
    assert providers.parsed("torch, ours,torch") == ("ours", "torch")
    with only(("ours",)):
        assert providers.is_chosen("clvp_fast") and not providers.is_chosen("torch")
        with only(None):
            assert providers.is_chosen("torch")
        assert not providers.is_chosen("torch")
    assert providers.is_chosen("torch")


@pytest.fixture
def workload(monkeypatch):
    """Make a workload of two shapes, where asrfront is in the first alone; `made` are the providers that were made."""
    made = []

    def make(name):
        made.append(name)
        if name.startswith("FlashInfer"):
            raise ModuleNotFoundError("No module named 'flashinfer'")
        if name.endswith("one launch"):
            raise Absent("no persistent step here")
        broken = name == "flashmel"
        return Provider(name, (lambda: 1 / 0) if broken else (lambda: None), 0.0, 1e-3)

    def tasks(device, smoke=False):
        names = ["clvp_fast", "torch", "FlashInfer, paged", "flashmel", "clvp_fast, one launch"]
        for n, more in ((0, ["asrfront"]), (1, [])):
            makers = {name: partial(make, name) for name in names + more}
            yield task("score", {"n": n}, makers, 1, {"SDPA cudnn": "for a GPU"})

    monkeypatch.setattr(Machine, "measure", lambda *arguments: Machine("m", 1, 1.0, {"float32": 1.0}))
    monkeypatch.setattr(run.importlib, "import_module", lambda name: SimpleNamespace(tasks=tasks))
    return made


ABSENT = {
    "FlashInfer, paged": "ModuleNotFoundError: No module named 'flashinfer'",
    "flashmel": "ZeroDivisionError: division by zero",
    "clvp_fast, one launch": "no persistent step here",
    "SDPA cudnn": "for a GPU",
}


def rows_of(folder):
    return list(harness.stored_rows(folder / "cpu"))


def test_absent_providers_are_named_and_the_others_measured(workload, tmp_path, capsys):
    assert run.main(["score", "--results", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert [row["provider"] for row in rows] == ["clvp_fast", "torch", "asrfront", "clvp_fast", "torch"]
    assert all(row["seconds"] and row["absent"] == ABSENT for row in rows)
    said = capsys.readouterr().out
    for name, why in ABSENT.items():
        assert f"{name:<44} absent: {why}" in said


def test_one_of_ours_that_breaks_is_a_failure():
    def broken():
        raise RuntimeError("an illegal instruction")

    with pytest.raises(RuntimeError, match="illegal"):
        task("w", {}, {"clvp_fast": broken}, 1).rows()
    late = task("w", {}, {"clvp_fast": lambda: Provider("clvp_fast", broken, 0.0, 1.0)}, 1)
    with pytest.raises(RuntimeError, match="illegal"):
        late.rows()


def test_only_what_is_asked_for_is_made_measured_and_named(workload, tmp_path, capsys):
    assert run.main(["score", "--results", str(tmp_path), "--providers", "torch,sdpa"]) == 0
    assert workload == ["torch", "torch"]
    rows = rows_of(tmp_path)
    assert [row["provider"] for row in rows] == ["torch"] * 2
    assert all(row["chosen_providers"] == ["torch", "sdpa"] and row["ratio"] == 1 for row in rows)
    said = capsys.readouterr().out
    assert "SDPA cudnn" in said and "FlashInfer" not in said and rows[0]["absent"] == {"SDPA cudnn": "for a GPU"}


def test_a_shape_that_none_of_them_does_is_told(workload, tmp_path, capsys):
    assert run.main(["score", "--results", str(tmp_path), "--providers", "asrfront"]) == 0
    assert [row["shape"]["n"] for row in rows_of(tmp_path)] == [0]
    assert "not measured, for none of the providers asked for does it here: score n=1" in capsys.readouterr().err


def test_a_part_of_a_task_is_no_run_of_it(workload, tmp_path):
    words = ["score", "--results", str(tmp_path)]
    assert run.main(words) == 0
    path = tmp_path / "cpu/score.jsonl"
    before = [row | {"utc": "2026-01-01T00:00:00+00:00"} for row in rows_of(tmp_path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in before))
    assert run.main([*words, "--providers", "ours"]) == 0
    # Documents show the last run of all, and a run of all does not leave out what only a part has rows of.
    assert {row["provider"] for row in report.newest_rows(tmp_path)} == {"clvp_fast", "torch", "asrfront"}
    path.unlink()
    assert run.main([*words, "--providers", "ours"]) == 0
    workload.clear()
    assert run.main([*words, "--providers", "ours", "--resume"]) == 0 and workload == []
    assert run.main([*words, "--providers", "torch", "--resume"]) == 0 and workload == ["torch", "torch"]
    assert run.main([*words, "--resume"]) == 0 and workload.count("clvp_fast") == 2
    workload.clear()
    assert run.main([*words, "--providers", "ours", "--resume"]) == 0 and workload == []


def test_versions_of_rivals_stand_in_rows_where_they_are_installed(monkeypatch):
    monkeypatch.setattr(harness, "RIVALS", ("numpy", "no-such-package-anywhere"))
    harness._versions_of_rivals.cache_clear()
    assert list(harness._versions_of_rivals()) == ["numpy"]
    harness._versions_of_rivals.cache_clear()


def test_a_party_is_gone_before_the_next_is_made():
    there = set()

    class Run:
        def __init__(self, name):
            self.name = name
            there.add(name)

        def __call__(self):
            assert there == {"a", "b"} if self.name in "ab" else there == {"c"}

        def __del__(self):
            there.discard(self.name)

    def make(name):
        if name.startswith("torch"):
            raise Absent("not here")
        return Provider(name, Run(name), 0.0, 1.0)

    makers = {name: partial(make, name) for name in ("a", "c", "b", "torch x")}
    rows = task("w", {}, makers, 2, {"torch y": "for a GPU"}, parties=[["a", "b"], ["torch x", "c"]]).rows()
    assert [row["provider"] for row in rows] == ["a", "c", "b"] and not there
    assert all(row["compared_with"] == "a" for row in rows)
    first = rows[0]["seconds"]["median"]
    assert [row["ratio"] for row in rows] == [first / row["seconds"]["median"] for row in rows]
    assert all(row["absent"] == {"torch y": "for a GPU", "torch x": "not here"} for row in rows)
