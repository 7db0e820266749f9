"""Rows of two machines, or of two instruction sets of one, never meet in a table, a ratio or a run."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import compare, document, harness, machine, plots, report, run
from benchmarks.harness import Machine, Provider, Task, measure
from clvp_fast import native

GENOA = {"cpu family": "25", "model": "17"}
MILAN = {"cpu family": "25", "model": "1"}


def cpu(isa, cpu_model=GENOA, forced=False, **limits):
    return {"isa": isa, "isa_forced": forced, "torch_isa": "AVX2", "torch_limits": limits, "cpu_model": cpu_model}


MACHINES = {
    "AMD EPYC (cpu family 25, model 17), avx512bf16": cpu("avx512bf16"),
    "AMD EPYC (cpu family 25, model 17), avx2 forced": cpu("avx2", forced=True),
    "AMD EPYC (cpu family 25, model 17), avx2 forced, ATen at avx2, MKL at avx2": cpu(
        "avx2", forced=True, ATEN_CPU_CAPABILITY="avx2", MKL_ENABLE_INSTRUCTIONS="AVX2"
    ),
    "AMD EPYC (cpu family 25, model 1), avx2": cpu("avx2", MILAN),
    "AMD EPYC (cpu family 25, model 1), no native library": cpu(None, MILAN),
}


def of(facts):
    return Machine("AMD EPYC", 2, 1e10, {"float32": 1e11}, facts)


def test_machines_and_instruction_sets_are_told_apart():
    assert [machine.label(of(facts).described()) for facts in MACHINES.values()] == list(MACHINES)
    assert machine.label({"name": "NVIDIA H200", "threads": 2}) == "NVIDIA H200"
    # As the rows from before rows had a model.
    assert machine.label({"name": "AMD EPYC", "isa": "avx512bf16", "isa_forced": False}) == "AMD EPYC, avx512bf16"


def test_a_limit_is_of_the_fastest_way(monkeypatch):
    """Bound a row by reading or copying, and by torch's product or ours, whichever is faster here."""
    seconds = {"matmul": 4.0, "linear": 0.5, "sum": 0.25, "copy": 2.0}

    def pretended(run):
        name = getattr(run, "func", run).__name__
        return seconds[name if name in seconds else "copy"]

    monkeypatch.setattr(machine, "seconds_of", pretended)
    found = Machine.measure("cpu", smoke=True)
    assert found.read_bytes_per_s == 2**20 / 0.25 and found.copy_bytes_per_s == 2 * 2**20 / 2.0
    assert found.matmul_flop_per_s == dict.fromkeys(("float32", "bfloat16", "float16"), 2 * 128**3 / 0.5)
    assert found.limit_seconds({"bytes": 2**22}) == 1.0 == machine.bandwidth(found.described()) / 2**22
    assert found.limit_seconds({"bytes": 2**22, "flop": 2 * 128**3 * 4}) == 2.0
    assert machine.bandwidth({"copy_bytes_per_s": 3.0}) == 3.0  # of an older row


@pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
def test_a_row_says_what_it_ran_on_and_what_was_held_down():
    code = "import json; from benchmarks import machine; print(json.dumps(machine.cpu_facts()))"
    env = {name: value for name, value in os.environ.items() if name not in machine.TORCH_LIMITS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"CLVP_FAST_ISA": "portable", "ATEN_CPU_CAPABILITY": "default"},
        cwd=harness.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    held, own, widest = json.loads(done.stdout), machine.cpu_facts(), native.isas()[0]
    # As this process began, which may be held down itself.
    assert own["isa"] == (os.environ.get("CLVP_FAST_ISA") or widest) and own["isa_forced"] is (own["isa"] != widest)
    assert own["torch_limits"] == {name: os.environ[name] for name in machine.TORCH_LIMITS if os.environ.get(name)}
    assert held["isa"] == "portable" and held["isa_forced"] is (widest != "portable")
    assert held["torch_isa"] == "DEFAULT" and held["torch_limits"] == {"ATEN_CPU_CAPABILITY": "default"}
    assert held["cpu_model"] == own["cpu_model"] and held["l2_bytes"] == own["l2_bytes"]


def row(facts, median, provider="clvp_fast float32", **more):
    seconds = {"q20": median, "median": median, "q80": median, "repeats": 3}
    shape, versions = {"candidates": 4, "length": 500}, {"torch": "1", "transformers": "2"}
    found = {"workload": "score", "shape": shape, "provider": provider, "seconds": seconds, "ratio": 1.0, "error": 0.0}
    found |= {"peak_extra_bytes": 2**20, "device": of(facts).described(), "versions": versions, "commit": "abc"}
    return found | {"utc": "2026-01-02T03:04:05+00:00"} | more


def test_each_has_a_table_of_its_own_in_every_document():
    rows = [row(facts, 1.0 + number) for number, facts in enumerate(MACHINES.values())]
    text = document.measured(rows, {})
    sections = dict(zip(re.findall("^## (.*)", text, re.M), re.split("^## .*", text, flags=re.M)[1:], strict=True))
    assert set(sections) == {*MACHINES, "NVIDIA GPU"}
    for number, name in enumerate(MACHINES):
        assert re.findall(r"\| (\d\.\d\d s) \(", sections[name]) == [f"{1 + number}.00 s"]
        assert "Not measured here: generate, decode_step, end_to_end, " in sections[name]
    assert [name for name in sections if "forced" in name] == list(sections)[3:5]  # behind those that were not
    # docs/figures.md leaves out what was held down.
    assert [f"{seconds}.00 s" for seconds in (4, 5, 1)] == re.findall(r"\d\.00 s", report.table(rows))
    tiers = {"logits_error": 0.1, "kl": 0.1, "greedy": 0.9, "provider": "float32"}
    shape = {"candidates": 4, "steps": 200, "prompt": 60, "layers": 30, "width": 512}
    tables = report.precision_table([one | tiers | {"workload": "precision", "shape": shape} for one in rows])
    assert tables.count("| a step |") == len(MACHINES)


def test_each_has_figures_of_its_own():
    def step(facts, candidates):
        shape = {"candidates": candidates, "text_tokens": 60, "stored": 250}
        return row(facts, 0.5, workload="decode_step", shape=shape, tokens=candidates)

    rows = [step(facts, candidates) for facts in MACHINES.values() for candidates in (1, 16)]
    drawings = plots.drawings(rows)
    assert len(drawings) == len(MACHINES) == len(set(drawings))
    assert {drawing["device"] for drawing in drawings.values()} == set(MACHINES)
    assert all(len(points) == 2 for drawing in drawings.values() for points in drawing["lines"].values())


def test_rows_of_two_machines_are_not_compared(tmp_path):
    for name, facts in (("one", cpu("avx512bf16")), ("two", cpu("avx2", forced=True))):
        harness.write_rows([row(facts, 1.0)], tmp_path / name / "cpu")
    with pytest.raises(ValueError, match="no row of one device, instruction set, shape and provider in common"):
        compare.compare(str(tmp_path / "one"), str(tmp_path / "two"), tmp_path)


@pytest.fixture
def measured(monkeypatch):
    """Replace every workload by one of one shape; the list gets a True for each measurement."""
    found = []

    def rows():
        found.append(True)
        return measure("score", {"n": 1}, [Provider("a", lambda: None, 0.0, 1e-3)], repeats=1)

    stand_in = SimpleNamespace(tasks=lambda device, smoke=False: [Task({"n": 1}, rows)])
    monkeypatch.setattr(run.importlib, "import_module", lambda name: stand_in)
    return found


def test_a_run_replaces_and_resumes_its_own_rows_alone(measured, monkeypatch, tmp_path):
    for times, facts in enumerate(MACHINES.values(), start=1):
        monkeypatch.setattr(Machine, "measure", lambda *arguments, facts=facts: of(facts))
        for _ in range(2):  # the second time it has its rows
            assert run.main(["score", "--results", str(tmp_path), "--resume"]) == 0
            assert len(measured) == times
    assert run.main(["score", "--results", str(tmp_path)]) == 0 and len(measured) == len(MACHINES) + 1
    newest = report.newest_rows(tmp_path)
    assert {machine.label(row["device"]) for row in newest} == set(MACHINES) and len(newest) == len(MACHINES)
    assert len(list(harness.stored_rows(tmp_path / "cpu"))) == len(MACHINES) + 1


def test_every_row_of_a_cpu_says_its_instruction_set():
    for found in harness.stored_rows(harness.RESULTS / "cpu"):
        assert found["device"]["isa"] in (*native.ISAS, None) and isinstance(found["device"]["isa_forced"], bool)
