"""The actor by itself, in a pipeline of a user's own, and as the workers of a job, which are killed midway."""

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clvp_fast.batch import Settings, run
from clvp_fast.batch.folder import JobFolder
from clvp_fast.batch.inputs import RowFile, Task, read_rows
from clvp_fast.batch.ray_workers import Cluster, _JobActor, _piece_rows, _share
from clvp_fast.cli import main
from clvp_fast.cli.parser import build_parser
from clvp_fast.distributed import CandidateActor
from tests.batch.jobs import QUICK, VOICE, assert_whole, failures, records, results, write_jsonl
from tests.kit.documents import blocks, commands
from tests.kit.waiting import wait_for

ROOT = VOICE.parents[1]
ROWS = 60
# Long enough to be killed midway; its voice is found from the folder where the job is begun.
JOB = QUICK | {"voice": VOICE.name, "threads": 1, "keep": None, "shard_rows": 32, "progress": False}
JOB["max_new_tokens"] = 50


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, with two CPUs, for all tests of the module."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    pytest.importorskip("ray.data", reason="Ray's data part is not installed: pip install '.[ray]'")
    os.environ.setdefault("RAY_worker_niceness", "0")  # they share the machine with other tests
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", records(ROWS))


@pytest.fixture(scope="module")
def single(corpus, tmp_path_factory):
    """Give the results of one process for the corpus."""
    out = tmp_path_factory.mktemp("single")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(VOICE.parent)
        run(corpus, out, **JOB)
    assert_whole(out, ROWS)
    return out


def assert_same(out: Path, single: Path) -> None:
    assert_whole(out, ROWS)
    assert results(out) == results(single) and failures(out) == failures(single)
    assert len(failures(out)) == 5 and len(results(out)) > 110


@pytest.fixture(scope="module")
def actor():
    return CandidateActor(**QUICK, keep=2)


def batch_of(count: int) -> dict[str, np.ndarray]:
    """Return rows in the form that Ray Data gives by default; row 1 has no voice, row 2 its own sampling."""
    return {
        "id": np.array([f"a{index}" for index in range(count)]),
        "text": np.array(["Hello there." * (1 + index) for index in range(count)], dtype=object),
        "voice": np.array(["nowhere.wav" if index == 1 else None for index in range(count)], dtype=object),
        "num_candidates": np.array([3.0 if index == 2 else np.nan for index in range(count)]),
        "speaker": np.arange(count) * 10,
        "picture": np.arange(count * 4).reshape(count, 2, 2),
    }


def comparable(table: pa.Table) -> list[dict]:
    """Return lines without fields that differ between equal runs; some forms of a batch have NaN for None."""
    lines = table.drop_columns("timings").to_pylist()
    return [{name: None if value != value else value for name, value in line.items()} for line in lines]


def test_lines_of_a_batch(actor):
    lines = actor(batch_of(4)).to_pylist()
    assert [(line["id"], line["rank"]) for line in lines] == [
        ("a0", 1), ("a0", 2), ("a1", None), ("a2", 1), ("a2", 2), ("a3", 1), ("a3", 2)
    ]  # fmt: skip
    assert [line["candidates"] for line in lines] == [2, 2, None, 3, 3, 2, 2]
    assert [line["speaker"] for line in lines] == [0, 0, 10, 20, 20, 30, 30]
    assert lines[3]["picture"] == [[8, 9], [10, 11]] and lines[6]["text"] == "Hello there." * 4
    assert lines[2]["error"] == "there is no recording at nowhere.wav" and lines[2]["codes"] is None
    assert all(line["error"] is None and len(line["codes"]) == line["length"] for line in lines if line["rank"])
    assert all(line["seed"] is not None and "row" not in line for line in lines[:2])
    assert lines[0]["score"] >= lines[1]["score"] and lines[0]["score"] != lines[5]["score"]


def test_a_rows_results_depend_on_itself_alone(actor):
    batch = batch_of(4)
    whole = comparable(actor(batch))
    part = {name: values[3:] for name, values in batch.items()}
    assert comparable(actor(part)) == whole[5:]
    table = pa.table({name: values.tolist() for name, values in batch.items()})
    assert comparable(actor(table)) == whole
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({name: list(values) for name, values in batch.items() if name != "picture"})
    assert comparable(actor(frame)) == [{key: line[key] for key in line if key != "picture"} for line in whole]


def test_an_index_and_a_seed_of_the_batch_stay(actor):
    batch = {"id": ["x", "y"], "text": ["One.", "Two."], "row": [70, 90], "seed": [5, None]}
    lines = actor(batch).to_pylist()
    assert [line["row"] for line in lines] == [70, 70, 90, 90]
    assert lines[0]["seed"] == 5 and lines[2]["seed"] > 5


@pytest.mark.parametrize(
    ("batch", "error", "says"),
    [
        ({"id": ["a"]}, ValueError, "no column 'text'; its columns are 'id'"),
        ({"text": ["a"]}, ValueError, "no column 'id'"),
        ({"id": ["a"], "text": ["b"], "score": [1]}, ValueError, "results have too: score; rename"),
        ({"id": ["a"], "text": ["b"], "x": np.array([[1], "y"], dtype=object)}, ValueError, "column 'x'"),
        ([{"id": "a", "text": "b"}], TypeError, "arrays by column, an Arrow table or a pandas frame, not list"),
    ],
)
def test_batches_that_cannot_be(actor, batch, error, says):
    with pytest.raises(error, match=says):
        actor(batch)


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="keep must be a whole number"):
        CandidateActor(keep=0)
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        CandidateActor("./no-such-folder")


def test_actors_and_settings_can_be_pickled():
    for thing in (CandidateActor, _JobActor, Settings(voice=str(VOICE), keep=3)):
        assert pickle.loads(pickle.dumps(thing)) == thing


def test_the_import_is_light():
    code = "import sys, clvp_fast.distributed; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_without_ray(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"a Ray cluster needs Ray: pip install '\.\[ray\]'"):
        run(corpus, tmp_path / "out", ray=True, voice=VOICE, progress=False)


GPUS = [{"CPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 8.0}]
CPUS = [{"CPU": 16.0}, {"CPU": 8.0}, {"memory": 1.0}]


def test_each_worker_has_its_share_of_the_cluster():
    settings = Settings()
    share = _share(settings, 0.9, GPUS, None)
    assert (share.workers, share.resources, share.settings.device) == (16, {"num_gpus": 1}, "cuda")
    assert share.settings.threads is None and share.memory_fraction == 0.9
    assert _share(settings, 0.9, GPUS, 3).workers == 3
    share = _share(settings, 0.9, CPUS, None)
    assert (share.workers, share.resources) == (2, {"num_cpus": 12})
    assert (share.settings.device, share.settings.threads, share.memory_fraction) == ("cpu", 12, 0.9)
    share = _share(Settings(threads=4), 0.8, CPUS, 5)
    assert (share.workers, share.resources, share.memory_fraction) == (5, {"num_cpus": 4}, 0.2)
    assert _share(settings, 0.9, CPUS, 1).settings.threads == 16
    assert _share(settings, 0.9, CPUS, 100).settings.threads == 1
    assert _share(Settings(threads=64), 0.9, CPUS, None).resources == {"num_cpus": 16}
    assert _share(Settings(device="cpu"), 0.9, GPUS, None).workers == 3
    with pytest.raises(ValueError, match="the Ray cluster has no GPU; use 'cpu', or leave it out"):
        _share(Settings(device="cuda"), 0.9, CPUS, None)
    with pytest.raises(ValueError, match="no CPU for workers"):
        _share(settings, 0.9, [{"memory": 1.0}], None)


def test_a_worker_is_sent_enough_rows_for_full_batches():
    settings = Settings(num_candidates=16, batch_size=16)
    assert _piece_rows(settings, 2, 10**6) == 64
    assert _piece_rows(Settings(num_candidates=16, batch_size=512), 8, 10**6) == 512
    assert _piece_rows(settings, 2, 160) == 10 and _piece_rows(settings, 2, 3) == 1


def test_addresses_where_no_cluster_is(corpus, tmp_path, capsys, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests have begun
    with socket.socket() as closed, socket.create_server(("127.0.0.1", 0)) as other:
        closed.bind(("127.0.0.1", 0))  # and listens not
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n"), daemon=True).start()
        for address, says in (
            (f"127.0.0.1:{closed.getsockname()[1]}", "no Ray cluster answers at 127.0.0.1:"),
            (f"127.0.0.1:{other.getsockname()[1]}", "is not a Ray cluster: give the port of `ray start --head`"),
            ("http://127.0.0.1:8265", "is HOST:PORT, as `ray start --head` tells it, not 'http"),
        ):
            argv = ["batch", str(corpus), "--voice", str(VOICE), "--out", str(tmp_path / "out"), "--ray", address]
            assert main(argv) == 1
            assert says in (told := capsys.readouterr().err) and "--debug" not in told


@pytest.mark.slow
def test_a_pipeline_of_ones_own(ray):
    data = ray.data.from_items([{"id": f"p{i}", "text": f"Hello {i}.", "speaker": i} for i in range(6)])
    spoken = data.map_batches(
        CandidateActor,
        fn_constructor_kwargs=QUICK | {"keep": 2, "threads": 1},
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=1),
        batch_size=4,
    )
    lines = sorted((line for line in spoken.iter_rows() if line["rank"] == 1), key=lambda line: line["id"])
    here = CandidateActor(**QUICK, keep=2, threads=1)
    wanted = here({"id": [f"p{i}" for i in range(6)], "text": [f"Hello {i}." for i in range(6)]}).to_pylist()
    wanted = [line for line in wanted if line["rank"] == 1]
    assert [line["speaker"] for line in lines] == list(range(6))
    for line, other in zip(lines, wanted, strict=True):
        assert list(line["codes"]) == other["codes"]
        assert [line[name] for name in ("id", "score", "seed")] == [other[name] for name in ("id", "score", "seed")]


def test_the_example_of_the_document(ray, tmp_path, monkeypatch):
    (example,) = [one for one in blocks("docs/batch.md", "python") if "CandidateActor" in one]
    assert "num_gpus=1" in example
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example.replace("num_gpus=1", "num_cpus=1"), "batch.md", "exec"), names)
    found = sorted((line["id"], line["chapter"], line["error"]) for line in names["best"])
    assert found == [("canoe", 1, None), ("sheet", 2, None)]
    assert all(len(line["codes"]) == line["length"] for line in names["best"])


def test_the_commands_of_the_document():
    of_a_cluster = [line for line in commands("docs/batch.md") if line.endswith(" --ray")]
    (parsed,) = [build_parser().parse_args(line.split()[1:]) for line in of_a_cluster]
    assert parsed.ray is True and (ROOT / parsed.input).is_file() and (ROOT / parsed.voice).is_file()


def workers_of(process: int) -> list[int]:
    """Return the processes below one that run actors of jobs."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if b"_JobActor" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue  # it has ended

    def is_below(one: int) -> bool:
        return one == process or (one in parents and is_below(parents[one]))

    return [one for one in found if is_below(one)]


# A driver that dies after its first shard, by itself: another process might kill it too late, when all is done.
DYING = """
import os, signal
from clvp_fast.batch import run
from clvp_fast.batch.folder import JobFolder
write = JobFolder.write_shard
def write_and_die(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
JobFolder.write_shard = write_and_die
"""


@pytest.mark.slow
def test_a_worker_is_killed(ray, corpus, single, tmp_path, monkeypatch):
    killed: list[int] = []
    write = JobFolder.write_shard

    def kill_and_write(*arguments):
        """Kill a worker as the first of two shards is written, while rows of the other are still to be done."""
        if not killed:
            killed.append(wait_for(lambda: workers_of(os.getpid()))[0])
            os.kill(killed[0], signal.SIGKILL)
        write(*arguments)

    monkeypatch.setattr(JobFolder, "write_shard", kill_and_write)
    monkeypatch.chdir(VOICE.parent)  # where Ray was not started
    summary = run(corpus, tmp_path, ray=True, workers=2, **JOB)
    wait_for(lambda: not Path(f"/proc/{killed[0]}").exists())
    assert summary["this_run"]["rows"] == ROWS
    assert_same(tmp_path, single)
    assert ray.is_initialized()


@pytest.mark.slow
def test_the_driver_is_killed_and_the_job_goes_on_anywhere(ray, corpus, single, tmp_path, monkeypatch):
    monkeypatch.chdir(VOICE.parent)
    out = tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    code = f"{DYING}run({str(corpus)!r}, {str(out)!r}, ray={address!r}, workers=1, **{JOB!r})"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    driver = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, timeout=240)
    assert driver.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    shutil.copytree(out, tmp_path / "alone")
    summary = run(corpus, tmp_path / "alone", **JOB)
    assert 0 < summary["this_run"]["rows"] < ROWS
    assert_same(tmp_path / "alone", single)
    summary = run(corpus, out, ray=True, **JOB)
    assert 0 < summary["this_run"]["rows"] < ROWS
    assert_same(out, single)


@pytest.mark.slow  # CI runs it: a cluster's workers die here, which takes as long as all others together
def test_a_checkpoint_that_a_worker_cannot_load(ray, corpus, tmp_path):
    """Let the first worker report it; where only another one lacks it, let that one report it."""
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        run(corpus, tmp_path / "out", ray=True, checkpoint="./no-such-folder", voice=VOICE, progress=False)
    known = Settings(num_candidates=2, max_new_tokens=5, batch_size=8, threads=1, device="cpu")
    rows = tmp_path / "rows.parquet"
    RowFile.write(rows, read_rows(corpus), 32)
    with closing(Cluster(replace(known, checkpoint="./no-such-folder"))) as cluster:  # as if the first had it
        cluster._described = True
        with pytest.raises(FileNotFoundError, match="no-such-folder"):
            list(cluster.outcomes(rows, [Task(0)]))
