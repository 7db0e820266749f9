"""A job without a model: what it is given, what is told of its rows, and what of it is a row's and what its own."""

import itertools
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clvp_fast.batch import job
from clvp_fast.batch.failures import LONGEST
from clvp_fast.batch.folder import Journal
from clvp_fast.batch.inputs import RowFile
from clvp_fast.batch.progress import JobProgress, job_bar
from clvp_fast.io.files import UnwritableError
from clvp_fast.native import NativeLibraryError
from tests.batch.jobs import VOICE, NoModel, assert_whole, failures, records, results, write_jsonl


def test_columns_without_a_meaning_are_told(run, tmp_path, caplog):
    rows = [{"id": 1, "text": "Hello.", "temprature": 0.5}, {"id": 2, "text": "Bye.", "speaker": "x"}]
    run(write_jsonl(tmp_path / "wide.jsonl", rows))
    assert "say nothing to the job: 'speaker', 'temprature'" in caplog.text


def test_unwritable_folder(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableError, match="a file stands where the folder should be"):
        run(out=tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard_rows": 0}, "shard_rows must be a whole number from 1 up, not 0"),
        ({"shard_rows": True}, "shard_rows must be a whole number from 1 up, not True"),
        ({"workers": 2}, "workers is for a Ray cluster"),
        ({"ray": False, "workers": 2}, "workers is for a Ray cluster"),
        ({"ray": True, "workers": 0}, "workers must be a whole number from 1 up"),
        ({"keep": 0}, "keep must be a whole number from 1 up"),
        ({"top_p": 2.0}, "top_p must be above 0 and at most 1"),
        ({"dtype": "int8"}, "dtype must be one of 'float32'"),
        ({"device": "tpu"}, "device must be one of None, 'cpu', 'cuda'"),
        ({"voice": ""}, "a path is empty: it must be that of"),
        ({"out": ""}, "a path is empty: it must be that of"),
        ({"source": ""}, "a path is empty: it must be that of"),
    ],
)
def test_bad_settings(run, out, options, said):
    with pytest.raises(ValueError, match=r"must be|is for") as caught:
        run(**options)
    assert said in str(caught.value)
    assert not out.exists()


def test_rows_that_come_twice_are_counted_once(run, monkeypatch, out, undisturbed):
    """Let all rows come twice, as a cluster that loses a worker does some rows again."""
    outcomes = NoModel.outcomes

    def twice(self, path, tasks):
        for outcome in outcomes(self, path, tasks):
            yield outcome
            yield outcome

    monkeypatch.setattr(NoModel, "outcomes", twice)
    shown = []
    monkeypatch.setattr(JobProgress, "count", lambda self, outcome: shown.append(outcome.row))
    found = run()["this_run"]
    assert sorted(shown) == list(range(50))  # on the bar too
    assert {name: found[name] for name in ("rows", "candidates", "tokens")} == {
        "rows": 50,
        "candidates": 92,
        "tokens": 46 * 7,
    }
    assert_whole(out, 50)
    assert (results(out), failures(out)) == undisturbed
    assert run(retry_failed=True)["this_run"]["rows"] == 4
    assert (results(out), failures(out)) == undisturbed


def test_counts_of_a_run_are_of_its_rows(run, no_model, monkeypatch, out):
    """Begin the bar and the counts where the last run stopped in the middle of a shard."""
    no_model.options["stop_after"] = 13
    with pytest.raises(KeyboardInterrupt):
        run()
    no_model.options.clear()
    bars = []

    def seen(what, total, done, hidden):
        bars.append((what, total, done))
        return job_bar(what, total, done, hidden)

    monkeypatch.setattr(job, "job_bar", seen)
    assert run()["this_run"]["rows"] == 37
    assert ("speaking", 50, 13) in bars
    assert run(retry_failed=True)["this_run"]["rows"] == 4
    assert ("speaking", 50, 46) in bars


@pytest.mark.parametrize("after", [0, 5, 8, 20])
def test_faults_of_the_job_keep_what_is_finished(run, no_model, monkeypatch, out, undisturbed, after):
    """They come out as they are, none of the rows has failed for them, and the job goes on."""
    outcomes = NoModel.outcomes

    def faulty(self, path, tasks):
        for number, outcome in enumerate(outcomes(self, path, tasks)):
            if number == after:
                raise NativeLibraryError("the library cannot be had: install g++")
            yield outcome

    monkeypatch.setattr(NoModel, "outcomes", faulty)
    with pytest.raises(NativeLibraryError, match="install g"):
        run()
    assert all("library" not in failure["error"] for failure in failures(out))
    monkeypatch.setattr(NoModel, "outcomes", outcomes)
    run()
    assert len(no_model.made[-1].asked) == 50 - after
    assert (results(out), failures(out)) == undisturbed


def test_a_full_disk_hides_no_fault(run, monkeypatch):
    """Report the error that stopped the job, even if earlier rows cannot be written; journals are closed."""
    closed = []

    def faulty(self, path, tasks):
        yield from itertools.islice(outcomes(self, path, tasks), 5)
        monkeypatch.setattr(Journal, "add", full)
        raise NativeLibraryError("the library cannot be had: install g++")

    def full(self, outcomes):
        raise UnwritableError(28, "the disk is full")

    outcomes, close = NoModel.outcomes, Journal.close
    monkeypatch.setattr(NoModel, "outcomes", faulty)
    monkeypatch.setattr(Journal, "close", lambda self: closed.append(close(self)))
    with pytest.raises(NativeLibraryError, match="install g"):
        run()
    assert closed == [None]


def test_recordings_in_cells(null_job, tmp_path, monkeypatch):
    """They are copied into the job's folder, once each, so that the job goes on without its input."""
    content = VOICE.read_bytes()
    cells = [{"bytes": content, "path": "a.wav"}] * 5 + [{"bytes": b"\xff" * 600_000, "path": None}]
    table = pa.table({"id": list("abcdef"), "text": ["Hello."] * 6, "voice": cells})
    pq.write_table(table, tmp_path / "corpus.parquet")
    monkeypatch.chdir(tmp_path)
    summary = job.run("corpus.parquet", "out", progress=False)
    assert (summary["spoken"], summary["failed"]) == (5, 1)
    rows = RowFile(tmp_path / "out/rows.parquet").shard(0)
    assert all(Path(row.voice).is_absolute() for row in rows)  # it may go on from another working folder
    (failure,) = failures(tmp_path / "out")
    assert "cannot be read as a recording" in failure["error"] and len(failure["error"]) < LONGEST
    assert sorted(len(path.read_bytes()) for path in (tmp_path / "out/voices").iterdir()) == [len(content), 600_000]


def test_full_disk_while_rows_are_copied(null_job, tmp_path, monkeypatch):
    """Blame the job, though the error comes while a row is read."""
    table = pa.table({"id": ["a"], "text": ["Hello."], "voice": pa.array([VOICE.read_bytes()], pa.binary())})
    pq.write_table(table, tmp_path / "corpus.parquet")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(UnwritableError, match="the disk is full"):
            job.run(tmp_path / "corpus.parquet", tmp_path / "out", progress=False)
    assert job.run(tmp_path / "corpus.parquet", tmp_path / "out", progress=False)["spoken"] == 1


def test_reasons_are_counted(null_job, tmp_path):
    """List the most frequent reason first."""
    rows = [{"id": index, "voice": str(VOICE)} for index in range(2)]
    rows += [{"id": index, "text": "Hello.", "top_k": "many"} for index in range(5, 8)]
    summary = job.run(write_jsonl(tmp_path / "corpus.jsonl", rows), tmp_path / "out", progress=False)
    assert [found["rows"] for found in summary["failures"]] == [3, 2]
    assert summary["failures"][1]["error"] == "the row has no text"


def test_remarks_are_counted(null_job, tmp_path):
    rows = [{"id": index, "text": f"東 {index}.", "voice": str(VOICE)} for index in range(3)]
    rows.append({"id": "x", "text": "Hello.", "voice": str(VOICE)})
    summary = job.run(write_jsonl(tmp_path / "corpus.jsonl", rows), tmp_path / "out", progress=False)
    said = "characters of other scripts were written in Latin letters: 東"
    assert {"remark": said, "rows": 3} in summary["remarks"]


def test_a_folder_named_demo(run, no_model, tmp_path, monkeypatch):
    """Take 'demo' for the checkpoint that the package builds, wherever the job runs."""
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    no_model.options["stop_after"] = 5
    for name, settings in (("demo", "demo"), ("./demo", str(tmp_path / "demo"))):
        with pytest.raises(KeyboardInterrupt):
            run(out=tmp_path / f"out-{settings.count('/')}", checkpoint=name)
        assert no_model.made[-1].settings.checkpoint == settings


def test_checkpoints_of_a_home_folder(run, no_model, tmp_path, monkeypatch):
    """They are looked for there, and are the same wherever the job goes on from."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    no_model.options["stop_after"] = 5
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint="~/mine")
    assert no_model.made[-1].settings.checkpoint == str(tmp_path / "mine")


def test_shards_with_latents_are_small(run, no_model, tmp_path):
    """Put few rows into a shard where each takes megabytes."""
    no_model.options["stop_after"] = 0
    for latents, rows in ((False, 1024), (True, 64)):
        with pytest.raises(KeyboardInterrupt):
            run(out=tmp_path / f"{latents}", latents=latents, shard_rows=None)
        assert json.loads((tmp_path / f"{latents}/manifest.json").read_text())["shard_rows"] == rows


def test_bars(run, monkeypatch):
    """Show no bar for checking a new folder, and end the bar when all shards are checked."""
    bars, reached = [], []

    def seen(what, total, done, hidden):
        bars.append((what, total, hidden))
        return job_bar(what, total, done, True)

    monkeypatch.setattr(job, "job_bar", seen)
    run(progress=True)
    assert bars == [("reading", 1, False), ("checking", 7, True), ("speaking", 50, False)]
    monkeypatch.setattr(JobProgress, "reach", lambda self, done: reached.append(done))
    run(progress=True)
    assert bars[3:] == [("checking", 7, False)] and reached == [1, 2, 3, 4, 5, 6, 7]


def test_links_are_kept(run, no_model, tmp_path):
    """Keep a link, because its target may have another name, such as a hash, and may move."""
    (tmp_path / "blob").mkdir()
    (tmp_path / "speaker").symlink_to("blob")
    no_model.options["stop_after"] = 5
    with pytest.raises(KeyboardInterrupt):
        run(voice=tmp_path / "speaker")
    assert no_model.made[-1].settings.voice == str(tmp_path / "speaker")


def test_memory_is_flat(run, tmp_path):
    """Four times the rows, no more memory: what is held are the shards that are not complete."""

    def peak(count):
        source = write_jsonl(tmp_path / f"{count}.jsonl", records(count))
        tracemalloc.start()
        try:
            run(source, tmp_path / f"out-{count}", shard_rows=50)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(2000) < 1.2 * peak(500)


def test_bad_input(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no input at"):
        run(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        run(tmp_path / "empty.jsonl", tmp_path / "nothing")
    (tmp_path / "corpus.txt").write_text("Hello.")
    with pytest.raises(ValueError, match=r"its name must end in \.jsonl"):
        run(tmp_path / "corpus.txt", tmp_path / "nothing")


def test_ids_stay_inside(run, tmp_path):
    """Name no file by an id, whatever it is, and return it as it was."""
    ids = [
        "../../up",
        "/etc/passwd",
        "a/b",
        "nul\0l",
        "🙂 ünïcode",
        "x" * 1_000_000,
        " ",
        "part-000000.parquet",
        "é",
        "e\u0301",
    ]
    source = write_jsonl(tmp_path / "ids.jsonl", [{"id": name, "text": "Hello."} for name in ids])
    before = set(tmp_path.iterdir())
    run(source)
    assert [line["id"] for line in results(tmp_path / "out")] == ids
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out"}
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        ".lock",
        "manifest.json",
        "rows.parquet",
        "summary.json",
        "failures.jsonl",
        "overview.png",
        "shards/part-000000.parquet",
        "shards/part-000001.parquet",
    }
