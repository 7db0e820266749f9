"""A job without a model: stopped anywhere and begun again, damaged, disturbed, and asked for something else."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clvp_fast.batch import job
from clvp_fast.batch.folder import JobFolder, Journal
from clvp_fast.batch.outcomes import outcome_schema
from clvp_fast.batch.overview import draw_overview
from clvp_fast.io.files import UnwritableError
from tests.batch.deaths import SHARD_ROWS
from tests.batch.jobs import NoModel, assert_whole, failures, records, results, rewrite, write_jsonl


def test_whole(run, out, monkeypatch):
    monkeypatch.setattr("clvp_fast.batch.summary.draw_overview", draw_overview)
    summary = run()
    assert_whole(out, 50)
    assert len(failures(out)) == 4 and failures(out)[0]["row"] == 7 and failures(out)[0]["id"] == "row-7"
    assert "nowhere.wav" in failures(out)[0]["error"]
    assert sorted(path.name for path in (out / "shards").iterdir()) == [f"part-{i:06}.parquet" for i in range(7)]
    assert summary == json.loads((out / "summary.json").read_text())
    found = {name: summary[name] for name in ("rows", "spoken", "failed", "candidates", "tokens")}
    assert found == {"rows": 50, "spoken": 46, "failed": 4, "candidates": 92, "tokens": 46 * 7}
    assert summary["this_run"]["rows"] == 50 and summary["this_run"]["tokens_per_second"] > 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert sum(shard["spoken"] + shard["failed"] for shard in manifest["shards"]) == 50
    assert all((out / shard["file"]).stat().st_size == shard["bytes"] for shard in manifest["shards"])
    assert (out / "overview.png").read_bytes()[:4] == b"\x89PNG"


def test_counts_are_of_rows_however_many_are_kept(run):
    summary = run(keep=2)
    assert (summary["spoken"], summary["candidates"], summary["tokens"]) == (46, 92, 46 * 7)


def test_rows_of_a_shard_come_longest_first(run, no_model, corpus):
    run()
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for shard in range(6):
        asked = no_model.made[0].asked[8 * shard : 8 * shard + 8]
        assert sorted(asked) == list(range(8 * shard, 8 * shard + 8))
        buckets = [len(texts[row]) // 32 for row in asked]
        assert buckets == sorted(buckets, reverse=True)
    assert no_model.made[0].asked != sorted(no_model.made[0].asked)


def test_done_is_not_done_again(run, no_model, out):
    run()
    before = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    summary = run()
    assert len(no_model.made) == 1  # not even a model was loaded
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == before
    assert summary["this_run"]["rows"] == 0 and summary["spoken"] == 46


def test_interrupted_anywhere(run, no_model, out, undisturbed):
    """Interrupt after each number of rows in turn: no row is done twice, and none is lost."""
    asked = []
    for stop_after in [0, 1, 3, 7, 8, 2, 9]:
        no_model.options["stop_after"] = stop_after
        with pytest.raises(KeyboardInterrupt):
            run()
        asked += no_model.made[-1].asked
    no_model.options.clear()
    run()
    asked += no_model.made[-1].asked
    assert sorted(asked) == list(range(50))
    assert_whole(out, 50)
    assert (results(out), failures(out)) == undisturbed


@pytest.mark.parametrize("moments", [["either"], pytest.param(["before", "behind"], marks=pytest.mark.slow)])
def test_dead_at_every_write(corpus, tmp_path, run, moments):
    """End the process before or after each rename of a file in a job."""
    run(out=tmp_path / "out", shard_rows=SHARD_ROWS)
    expected = results(tmp_path / "out"), failures(tmp_path / "out")
    command = [sys.executable, "-m", "tests.batch.deaths", str(corpus), str(tmp_path / "dead"), *moments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert found.returncode == 0, found.stderr
    died = found.stdout.split()
    # Rows, manifest, failures, a journal and a shard for each of three shards, and the four files at the end.
    assert len(died) == len(moments) * (3 + 2 * 3 + 4), died
    for name in died:
        assert_whole(tmp_path / "dead" / name, 50)
        assert (results(tmp_path / "dead" / name), failures(tmp_path / "dead" / name)) == expected, name


def test_failures_are_told_while_the_job_runs(run, no_model, out):
    no_model.options["stop_after"] = 12
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [failure["row"] for failure in failures(out)] == [7]  # the first shard's, and the second is not whole


def test_torn_journal(run, no_model, monkeypatch, out, undisturbed):
    """Read a journal as far as it was written, whatever its last bytes are."""
    monkeypatch.setattr(job, "_JOURNAL_SECONDS", 0.0)
    no_model.options["stop_after"] = 6
    with pytest.raises(KeyboardInterrupt):
        run()
    (journal,) = (out / "unfinished").iterdir()
    content, schema = journal.read_bytes(), outcome_schema(no_model.made[-1].settings)
    whole = [outcome.row for outcome in Journal.read(journal, schema)]
    assert whole == no_model.made[-1].asked
    read = set()
    for cut in range(0, len(content), 37):
        for tail in (b"", b"\0" * 64, content[:64]):
            journal.write_bytes(content[:cut] + tail)
            rows = [outcome.row for outcome in Journal.read(journal, schema)]
            assert rows == whole[: len(rows)] and len(rows) <= cut * 6 / len(content) + 1
            read.add(len(rows))
    assert read == set(range(6))
    no_model.options.clear()
    journal.write_bytes(content[: len(content) // 2] + b"\0" * 64)
    run()
    assert 0 < 50 - len(no_model.made[-1].asked) < 6
    assert_whole(out, 50)
    assert (results(out), failures(out)) == undisturbed


def flip(content):
    content[200] ^= 0xFF


def cut(content):
    del content[len(content) // 2 :]


def empty(content):
    content.clear()


@pytest.mark.parametrize("change", [flip, cut, empty])
def test_damaged_shard_is_made_again(run, no_model, out, caplog, change):
    run()
    expected = results(out)
    rewrite(out / "shards/part-000002.parquet", change)
    with caplog.at_level(logging.WARNING):
        run()
    assert "part-000002.parquet is damaged" in caplog.text and "its rows are spoken again" in caplog.text
    assert sorted(no_model.made[-1].asked) == list(range(16, 24))
    assert results(out) == expected
    assert_whole(out, 50)


def test_shard_of_another_place(run, no_model, out):
    run()
    expected = results(out)
    shards = out / "shards"
    (shards / "part-000003.parquet").write_bytes((shards / "part-000001.parquet").read_bytes())
    run()
    assert sorted(no_model.made[-1].asked) == list(range(24, 32))
    assert results(out) == expected


def test_retry_failed(run, no_model, monkeypatch, out):
    run()
    spoken = results(out)
    assert len(failures(out)) == 4
    monkeypatch.setattr(NoModel, "__init__", _with_voices(NoModel.__init__, ()))
    run()
    assert len(no_model.made) == 1 and len(failures(out)) == 4
    run(retry_failed=True)
    assert no_model.made[-1].asked == [7, 18, 29, 40]
    assert failures(out) == []
    assert_whole(out, 50)
    assert [line for line in results(out) if line["row"] % 11 != 7] == spoken


def test_ended_right_before_a_shard_is_written(run, no_model, monkeypatch, out, undisturbed):
    """Speak no row again, as the journal has all, except failed rows on request."""

    def ended(*_):
        raise KeyboardInterrupt

    for retry_failed in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(JobFolder, "write_shard", ended)
            with pytest.raises(KeyboardInterrupt):
                run()
        run(retry_failed=retry_failed)
        assert sorted(no_model.made[-1].asked) == [*([7] if retry_failed else []), *range(8, 50)]
        assert (results(out), failures(out)) == undisturbed
        shutil.rmtree(out)


def test_retry_that_is_stopped(run, no_model, out):
    """Keep failures until their rows are spoken."""
    run()
    expected = (results(out), failures(out))
    no_model.options["stop_after"] = 2
    with pytest.raises(KeyboardInterrupt):
        run(retry_failed=True)
    assert [failure["row"] for failure in failures(out)] == [7, 18]  # they have failed again, and two are not tried yet
    no_model.options.clear()
    run()
    assert (results(out), failures(out)) == expected
    assert not list((out / "unfinished").iterdir())
    run(retry_failed=True)
    assert (results(out), failures(out)) == expected
    assert_whole(out, 50)


def _with_voices(init, broken):
    def changed(self, *args, **options):
        init(self, *args, **options)
        self.broken_voices = broken

    return changed


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"temperature": 0.9}, "temperature was 0.8 and is 0.9"),
        ({"num_candidates": 4}, "num_candidates was 16 and is 4"),
        ({"dtype": "bfloat16"}, "dtype was 'float32' and is 'bfloat16'"),
        ({"batch_size": 3}, "batch_size was 8 and is 3"),
        ({"seed": 1, "keep": 2}, "keep was 1 and is 2; seed was 0 and is 1"),
        ({"shard_rows": 9}, "shard_rows was 8 and is 9"),
    ],
)
def test_other_settings_are_refused(run, out, changed, named):
    run()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="begun with other settings") as caught:
        run(**changed)
    assert named in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_later_runs_keep_the_settings_of_the_first(run, no_model, out):
    """Use in later runs what the first run determined; it may also be named in the call."""
    no_model.options["stop_after"] = 5
    with pytest.raises(KeyboardInterrupt):
        run()
    assert no_model.made[-1].settings.batch_size == 8
    no_model.options.clear()
    run(batch_size=8, device="cpu")
    assert_whole(out, 50)


def test_other_input_is_refused(run, corpus):
    run()
    write_jsonl(corpus, records(51))
    with pytest.raises(ValueError, match="its content has changed"):
        run()


def test_other_checkpoint_is_refused(run, no_model, monkeypatch):
    no_model.options["stop_after"] = 5
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(NoModel, "description", lambda self: _described(self, checkpoint="other"))
    with pytest.raises(ValueError, match="checkpoint demo is not what the job was begun with"):
        run()


def test_other_versions_are_told(run, no_model, monkeypatch, caplog):
    no_model.options["stop_after"] = 5
    with pytest.raises(KeyboardInterrupt):
        run()
    no_model.options.clear()
    monkeypatch.setattr(NoModel, "description", lambda self: _described(self, versions={"torch": "2"}))
    run()
    assert "torch was 1 when the job was begun, and is 2" in caplog.text


def _described(executor, **changed):
    return {"settings": executor.settings.as_dict(), "checkpoint": "digest", "versions": {"torch": "1"}} | changed


def test_damaged_manifest(run, out):
    run()
    for content in ("{", "{}", "[]", '{"format": "clvp_fast.batch.1", "versions": 1}'):
        (out / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            run()
    for versions, named in (({}, "an unknown version"), ({"clvp_fast": "0.0.9"}, r"0\.0\.9")):
        manifest = {"format": "clvp_fast.batch.1", "versions": versions}
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(
            ValueError,
            match=rf"of the format 'clvp_fast\.batch\.1', .*: finish it with the clvp_fast that began it .{named}.,",
        ):
            run()
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"has results, but .*manifest\.json is missing"):
        run()


def test_damaged_rows(run, no_model, out, caplog):
    no_model.options["stop_after"] = 20
    with pytest.raises(KeyboardInterrupt):
        run()
    no_model.options.clear()
    rewrite(out / "rows.parquet", cut)
    run()
    assert "rows.parquet is damaged" in caplog.text
    assert_whole(out, 50)


def test_two_processes(run, out, tmp_path):
    """Another process, and another job of this one."""
    run()
    with JobFolderHeld(out) as held, pytest.raises(BlockingIOError, match=rf"^process {held.pid} on \S+ is at work on"):
        run()
    folder = JobFolder(out)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
        run()
    folder.close()
    run()


class JobFolderHeld:
    """Another process that works on a folder."""

    def __init__(self, out: Path):
        code = "import sys, pathlib; from clvp_fast.batch.folder import JobFolder; "
        code += "folder = JobFolder(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid

    def __enter__(self):
        assert self._process.stdout.readline() == "held\n"
        return self

    def __exit__(self, *_):
        self._process.kill()  # the lock goes with the process
        self._process.wait()


def test_full_disk(run, monkeypatch, out, undisturbed):
    """Wherever it fills up, a sentence says so, and the job goes on when there is room."""
    monkeypatch.setattr(job, "_JOURNAL_SECONDS", 0.0)
    write = pq.write_table
    written = 0

    def full(table, path, **options):
        nonlocal written
        written += 1
        if written == 3:
            Path(path).write_bytes(b"PAR1 half")
            raise OSError(28, "No space left on device")
        write(table, path, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UnwritableError, match="the disk is full"):
        run()
    assert len(list((out / "shards").iterdir())) == 2
    run()
    assert_whole(out, 50)
    assert (results(out), failures(out)) == undisturbed


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
def test_file_that_may_not_grow(tmp_path, corpus):
    """Meet the system's own refusal, at whatever write it comes first."""
    code = """
import resource, signal, sys
from pathlib import Path
from clvp_fast.batch import job
from tests.batch.deaths import SHARD_ROWS
from tests.batch.jobs import NoModel
job._executor = lambda settings, *_: NoModel(settings)
job._JOURNAL_SECONDS = 0.0
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    job.run(sys.argv[1], sys.argv[2], progress=False, shard_rows=8)
except OSError as error:
    print(type(error).__name__, error)
"""
    told = []
    for size in (100, 4000, 7000):
        out = tmp_path / f"out-{size}"
        command = [sys.executable, "-c", code, str(corpus), str(out), str(size)]
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert found.returncode == 0, found.stderr
        assert "UnwritableError" in found.stdout and "cannot write into" in found.stdout, (size, found.stdout)
        told.append(found.stdout)
        assert not list(out.rglob("*.parquet.part"))
