"""`clvp-fast bench`: in a clone it measures, elsewhere it says why it cannot."""

import json
from types import SimpleNamespace

import pytest
import torch

import clvp_fast
from benchmarks import run
from benchmarks.harness import Machine, Provider, Task, measure


@pytest.fixture
def workload(monkeypatch):
    """Replace every workload; `error` is its provider's, `raised` the exception of its second shape."""
    state = SimpleNamespace(error=0.0, raised=None)

    def second():
        if state.raised is not None:
            raise state.raised
        return measure("score", {"n": 2}, [Provider("a", lambda: None, state.error, 1e-3)], repeats=1)

    def first():
        return measure("score", {"n": 1}, [Provider("a", lambda: None, 0.0, 1e-3)], repeats=1)

    module = SimpleNamespace(tasks=lambda device, smoke: [Task({"n": 1}, first), Task({"n": 2}, second)])
    monkeypatch.setattr(run.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(Machine, "measure", lambda *arguments: Machine("m", 1, 1.0, {"float32": 1.0}))
    return state


def test_the_list(cli):
    outcome = cli("bench", "--list")
    assert outcome.code == 0 and outcome.out.startswith("generate ") and "\nlog_mel " in outcome.out
    assert json.loads(cli("bench", "--list", "--json").out) == run.WORKLOADS


def test_rows_are_written_and_printed(cli, workload, tmp_path):
    outcome = cli("bench", "score", "--results", tmp_path, "--json")
    document = json.loads(outcome.out)
    assert outcome.code == 0 and [row["shape"]["n"] for row in document["rows"]] == [1, 2]
    written = (tmp_path / "cpu/score.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == document["rows"] and document["folder"] == str(tmp_path / "cpu")
    assert "score a" in outcome.err and "score a" in cli("bench", "score", "--results", tmp_path).out
    compared = cli("bench", "--compare", tmp_path / "cpu", tmp_path / "cpu")
    assert compared.code == 0 and "0 slower and 0 faster" in compared.out
    both = json.loads(cli("bench", "--compare", tmp_path / "cpu", tmp_path / "cpu", "--json").out)
    assert [one["ratio"] for one in both] == [1.0, 1.0]


def test_a_wrong_provider_is_an_error_behind_the_rows_of_the_others(cli, workload, tmp_path):
    workload.error = 1.0
    outcome = cli("bench", "score", "--results", tmp_path)
    assert outcome.code == 1 and "wrong or failed: score n=2" in outcome.err
    assert "error: 1 shapes gave a wrong result or none" in outcome.err
    assert len((tmp_path / "cpu/score.jsonl").read_text().splitlines()) == 2


def test_an_interrupt_keeps_what_was_measured(cli, workload, tmp_path):
    workload.raised = KeyboardInterrupt()
    outcome = cli("bench", "score", "--results", tmp_path)
    assert outcome.code == 130 and "--resume goes on behind them" in outcome.err and "Traceback" not in outcome.err
    assert len((tmp_path / "cpu/score.jsonl").read_text().splitlines()) == 1


def test_impossible_options_are_refused_in_a_sentence(fails, workload, tmp_path):
    assert fails("bench", "sing").startswith("no workload sing: there are generate, ")
    assert "is no file or folder of rows" in fails("bench", "--compare", "nowhere", "nothing")
    assert fails("bench", "score", "--providers", "vllm").startswith("no provider vllm: there are ours, torch, sdpa, ")
    (tmp_path / "file").write_text("")
    assert "choose another place with --results" in fails("bench", "score", "--results", tmp_path / "file")
    if not torch.cuda.is_available():
        assert fails("bench", "score", "--device", "cuda").startswith("--device cuda needs an NVIDIA GPU")


def test_providers_are_chosen(cli, workload, tmp_path):
    outcome = cli("bench", "score", "--results", tmp_path, "--providers", "ours", "--json")
    assert [row["chosen_providers"] for row in json.loads(outcome.out)["rows"]] == [["ours"]] * 2
    outcome = cli("bench", "score", "--results", tmp_path, "--providers", "torch")
    assert outcome.code == 0 and "none of the providers asked for does it here: score n=1; score n=2" in outcome.err


def test_a_wheel_says_that_it_has_no_benchmarks(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(clvp_fast, "__file__", str(tmp_path / "clvp_fast/__init__.py"))
    assert fails("bench", "--list").startswith(
        f"the benchmarks are not part of the installed package ({tmp_path}): run"
    )
