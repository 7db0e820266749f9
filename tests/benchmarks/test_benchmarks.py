"""The harness refuses what is wrong, and no number stands in README.md without its row."""

import json

import pytest
import torch

from benchmarks import harness, report, run


def test_readme_says_what_the_rows_say():
    readme = report.README.read_text(encoding="utf-8")
    assert report.updated(readme, report.newest_rows()) == readme, "run: python -m benchmarks.report"


def test_a_changed_number_in_readme_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    rows = harness.measure("import_time", {}, [provider("a"), provider("b")], repeats=1)
    harness.write_rows(rows, harness.Machine("cpu name", 2, 1e10, 1e11), "cpu", "command")
    rows = report.newest_rows(tmp_path)
    readme = report.updated(f"before {report.BEGIN} {report.END} after", rows)
    assert "| import | b |" in readme and "cpu name" in readme and report.updated(readme, rows) == readme
    rows[1]["seconds"]["median"] += 1.0
    assert report.updated(readme, rows) != readme


def provider(name, error=0.0, calls=None):
    return harness.Provider(name, lambda: calls.append(name) if calls is not None else None, error, 1e-3)


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_wrong_provider_gets_no_time(error):
    calls = []
    with pytest.raises(SystemExit, match=r"second: error .* not timed"):
        harness.measure("w", {}, [provider("first", calls=calls), provider("second", error, calls)], repeats=2)
    assert calls == []


def test_providers_take_turns():
    calls = []
    rows = harness.measure("w", {"n": 1}, [provider("a", calls=calls), provider("b", calls=calls)], repeats=2, flop=7)
    assert calls == ["a", "b"] * 3
    assert [row["provider"] for row in rows] == ["a", "b"] and rows[0]["ratio"] == 1.0 and rows[1]["flop"] == 7


def test_rows_carry_their_circumstances_and_the_newest_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    machine = harness.Machine("cpu name", 2, 1e10, 1e11)
    rows = harness.measure("w", {}, [provider("a")], repeats=1)
    harness.write_rows(rows, machine, "cpu", "first")
    path = harness.write_rows(rows, machine, "cpu", "second")
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["command"] for row in stored] == ["first", "second"]
    assert stored[0]["device"]["copy_bytes_per_s"] == 1e10 and stored[0]["commit"] and stored[0]["utc"]
    assert [row["command"] for row in report.newest_rows(tmp_path)] == ["second"]


def test_unknown_workload_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["nonsense"])
    assert "no workload nonsense: there are generate, score, import_time, linear" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_a_missing_gpu_is_told(capsys):
    with pytest.raises(SystemExit):
        run.main(["score", "--device", "cuda"])
    assert "--device cuda needs an NVIDIA GPU" in capsys.readouterr().err
