"""The harness refuses what is wrong, and the tables of docs/figures.md and of the precision tiers say what rows say."""

import sys

import pytest
import torch

from benchmarks import harness, machine, models, report


def test_the_table_of_precision_tiers():
    assert report.precision_table([]) == "Not measured yet."
    shape = {"candidates": 4, "steps": 200, "prompt": 60, "layers": 30, "width": 512}
    where = {"device": {"name": "cpu", "threads": 2}, "versions": {"torch": "1"}, "commit": "abc", "shape": shape}
    row = where | {"workload": "precision", "provider": "bfloat16", "error": 0.0061, "seconds": {"median": 0.047}}
    row |= {"logits_error": 0.0083, "kl": 0.00041, "greedy": 0.99625}
    table = report.precision_table([row, row | {"provider": "refused", "seconds": None}])
    assert "| bfloat16 | 0.0083 | 0.0061 | 4.1e-04 | 99.6% ± 0.2 | 47.0 ms |" in table and "refused" not in table
    assert "4 candidates, 200 steps behind a prompt of 60, 30 layers of 512 channels, on cpu" in table


def test_a_changed_number_in_a_document_is_seen(tmp_path):
    rows = harness.measure("import_time", {}, [provider("a"), provider("b")], repeats=1)
    here = harness.Machine("cpu name", 2, 1e10, {"float32": 1e11})
    harness.write_rows(harness.with_context(rows, here, "command"), tmp_path / "cpu")
    rows = report.newest_rows(tmp_path)
    readme = report.updated("before <!-- measured:begin --> <!-- measured:end --> after", rows)
    assert "| import | b |" in readme and "cpu name" in readme and report.updated(readme, rows) == readme
    rows[1]["seconds"]["median"] += 1.0
    assert report.updated(readme, rows) != readme


def test_figures_show_the_chosen_shapes_in_a_readable_unit_and_each_commit():
    where = {"device": {"name": "cpu", "threads": 2}, "versions": {"torch": "1", "transformers": "2"}}
    what = {"ratio": 2.0, "error": 1e-6, "peak_extra_bytes": None, "provider": "a"}
    shapes = [{"clips": clips, "n_fft": 1024, "seconds": 6, "threads": 1} for clips in (64, 256)]
    rows = [
        where | what | {"workload": "log_mel", "shape": shape, "seconds": {"median": 0.0123}, "commit": "abc"}
        for shape in (*shapes, shapes[0] | {"n_fft": 512})
    ]
    table = report.table(rows)
    assert table.count("log-mel of") == 1 and "| log-mel of 64 clips of 6 s, threads: 1 | a | 12.3 ms |" in table
    assert "at commit abc; models" in table
    other = where | what | {"workload": "import_time", "shape": {}, "seconds": {"median": 1.5}, "commit": "def"}
    table = report.table([*rows, other])
    assert "log_mel on cpu" in table and "at commit abc; import_time on" in table and "commit def" in table
    assert "| import | a | 1.50 s |" in table


def provider(name, error=0.0, calls=None):
    return harness.Provider(name, lambda: calls.append(name) if calls is not None else None, error, 1e-3)


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_wrong_provider_gets_no_time(error):
    calls = []
    wrong, right = harness.measure("w", {}, [provider("a", error, calls), provider("b", calls=calls)], repeats=2)
    assert calls == ["b"] * 3
    assert wrong["provider"] == "a" and wrong["seconds"] is None and "not timed" in wrong["refused"]
    assert right["provider"] == "b" and right["compared_with"] == "b" and right["seconds"]["repeats"] == 2
    assert harness.measure("w", {}, [provider("a", error)], repeats=1)[0]["seconds"] is None


def test_providers_take_turns():
    calls = []
    rows = harness.measure("w", {"n": 1}, [provider("a", calls=calls), provider("b", calls=calls)], repeats=2, flop=7)
    assert calls == ["a", "b"] * 3
    assert [row["provider"] for row in rows] == ["a", "b"] and rows[0]["ratio"] == 1.0 and rows[1]["flop"] == 7


def test_rows_carry_their_circumstances_and_the_newest_count(tmp_path):
    here = harness.Machine("cpu name", 2, 1e10, {"float32": 1e11})
    rows = harness.measure("w", {"n": 1}, [provider("a"), provider("b")], repeats=1)
    both = [harness.with_context(rows, here, "first"), harness.with_context(rows[:1], here, "second")]
    both[0] = [row | {"utc": "2026-01-01T00:00:00+00:00"} for row in both[0]]
    for rows in both:
        path = harness.write_rows(rows, tmp_path / "cpu")
    stored = list(harness.stored_rows(tmp_path / "cpu"))
    assert [row["command"] for row in stored] == ["first", "first", "second"] and path.name == "w.jsonl"
    assert stored[0]["device"]["copy_bytes_per_s"] == 1e10 and stored[0]["commit"] and stored[0]["utc"]
    assert len(stored[0]["source"]) == 16
    # Providers without a row in the newest run of a task are no longer shown.
    assert [(row["command"], row["provider"]) for row in report.newest_rows(tmp_path)] == [("second", "a")]
    path.write_text(path.read_text()[:-20])  # killed while it wrote
    assert [row["command"] for row in harness.stored_rows(tmp_path / "cpu")] == ["first", "first"]
    # Later rows begin a line of their own.
    harness.write_rows(harness.with_context(both[0][1:], here, "third"), tmp_path / "cpu")
    assert [row["command"] for row in harness.stored_rows(tmp_path / "cpu")] == ["first", "first", "third"]
    assert not path.read_text().startswith("\n") and "\n\n" not in path.read_text()


def test_a_fraction_of_the_limit_stands_in_rows_that_count(monkeypatch):
    monkeypatch.setattr(harness, "seconds_of", lambda run: 8.0)
    here = harness.Machine("cpu name", 2, 1e10, {"float32": 1e11, "bfloat16": 4e11})
    four_times = harness.Provider("a", lambda: None, 0.0, 1e-3, calls=4)
    rows = harness.measure("w", {}, [four_times], repeats=1, bytes=5e9, flop=2e11, dtype="bfloat16")
    rows += harness.measure("w", {}, [four_times], repeats=1, bytes=5e9, flop=2e11)
    rows += harness.measure("w", {}, [four_times], repeats=1)
    # One provider's counts replace the common ones.
    half = harness.Provider("half", lambda: None, 0.0, 1e-3, calls=4, counted={"bytes": 2.5e9, "flop": 0})
    rows += harness.measure("w", {}, [half], repeats=1, bytes=5e9, flop=2e11)
    # Memory that is read in the turns itself.
    read = torch.zeros(5 * 10**6)
    rows += harness.measure("w", {}, [four_times], repeats=2, bytes=5e6, read=read)
    stored = harness.with_context(rows, here, "command")
    assert [row["seconds"]["median"] for row in stored] == [2.0] * 5
    assert [row.get("fraction_of_limit") for row in stored] == [0.25, 1.0, None, 0.125, 1.0]
    assert [row.get("read_bytes_per_s") for row in stored] == [None] * 4 + [2.5e6]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's memory")
def test_memory_freed_earlier_does_not_hide_the_peak():
    def run():
        return [bytearray(b"x" * 2**16) for _ in range(2000)]

    kept = run()
    del kept[:-1]  # free now, and below what is still in use
    assert machine.peak_extra_bytes(run) > 0.9 * 2000 * 2**16


def test_a_model_is_made_once_however_its_arguments_are_written():
    model = models.our_model("cpu", torch.float32, True)
    assert model is models.our_model("cpu", smoke=True) is models.our_model(device="cpu", smoke=True)
    assert model is not models.our_model("cpu", torch.bfloat16, True)
