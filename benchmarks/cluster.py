"""A corpus through the job of `clvp-fast batch`, by one process and by the workers of a local Ray.

With the demo's model: the same rows by a process with one thread, by one with two, and by two workers with one thread
each (on GPUs by a process, and by a worker for each). A process has its model already; Ray and its workers begin with
the job and end with it. `start` lasts until the first row is done, `work` from there on. The error is the share of rows
whose best candidate differs from the first provider's.

Without a model, workers answer at once with codes that follow from the row, so `work` is only reading rows, passing
them on and writing shards. Rows over its seconds are the highest rate of a job, however many workers it has.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.corpus import VOICE, WORDS
from benchmarks.harness import Provider, Task, task
from benchmarks.providers import Absent
from clvp_fast.batch import Settings, job, ray_workers
from clvp_fast.batch.inputs import RowFile, arrived
from clvp_fast.batch.outcomes import Outcome, outcome_schema, to_table
from clvp_fast.batch.rows import Row
from clvp_fast.batch.worker import Worker

# Rows, candidates of each, and tokens of a candidate; rows of the job without a model.
SHAPES = {"cpu": (48, 16, 64), "cuda": (4000, 16, 200)}
SMOKE = (6, 2, 4)
IDLE, SMOKE_IDLE = 10_000, 40
WORKERS = {"cpu": 2, "cuda": None}
# A process and a worker use one GPU at the same time.
MEMORY_FRACTION = 0.4


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    rows, candidates, new_tokens = SMOKE if smoke else SHAPES[device]
    settings = Settings(device=device, voice=VOICE, num_candidates=candidates, max_new_tokens=new_tokens, batch_size=16)
    runs = _Runs(settings, WORKERS[device])
    makers = {}
    for threads in (1, 2) if device == "cpu" else (None,):
        name = "clvp_fast batch, one process" + (f", threads: {threads}" if threads else "")
        makers[name] = partial(runs.here, name, rows, threads)
    name = "clvp_fast batch, Ray, " + ("two workers, threads: 1" if device == "cpu" else "a worker a GPU")
    makers[name] = partial(runs.cluster, name, rows)
    shape = {"rows": rows, "candidates": candidates, "new_tokens": new_tokens, "model": "random"}
    yield task("cluster", shape, makers, 1 if smoke else 2)
    rows, runs = SMOKE_IDLE if smoke else IDLE, _Runs(settings, WORKERS[device])
    here, cluster = "clvp_fast batch, one process", "clvp_fast batch, Ray"
    makers = {here: partial(runs.here_idle, here, rows), cluster: partial(runs.cluster, cluster, rows, IdleActor)}
    yield task("cluster", {"rows": rows, "model": "none"}, makers, 1 if smoke else 2)


class _Runs:
    """Jobs over a corpus, and how their results compare."""

    def __init__(self, settings: Settings, workers: int | None):
        self._settings, self._workers = settings, workers
        self._first: dict[int, list[int]] | None = None

    def here(self, name: str, rows: int, threads: int | None) -> Provider:
        worker = Worker(replace(self._settings, threads=threads), MEMORY_FRACTION)

        def executor() -> job.Here:
            if threads is not None:
                torch.set_num_threads(threads)
            return job.Here(worker)

        return self._provider(name, rows, threads, executor)

    def here_idle(self, name: str, rows: int) -> Provider:
        return self._provider(name, rows, 1, lambda: _Idle(replace(self._settings, threads=1)))

    def cluster(self, name: str, rows: int, actor: type = ray_workers._JobActor) -> Provider:
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise Absent("Ray is not installed") from error
        threads = 1 if self._settings.device == "cpu" else None
        settings = replace(self._settings, threads=threads)

        def executor() -> ray_workers.Cluster:
            return ray_workers.Cluster(settings, MEMORY_FRACTION, "local", self._workers)

        with patch.object(ray_workers, "_JobActor", actor):
            return self._provider(name, rows, threads, executor, actor)

    def _provider(self, name: str, rows: int, threads: int | None, executor: Callable, actor=None) -> Provider:
        told: dict = {}
        settings = replace(self._settings, threads=threads)

        def run() -> dict[int, list[int]]:
            with patch.object(ray_workers, "_JobActor", actor or ray_workers._JobActor):
                return _job(settings, rows, executor, told)

        before = torch.get_num_threads()
        found = run()
        torch.set_num_threads(before)
        self._first = self._first or found
        different = sum(found.get(row) != codes for row, codes in self._first.items()) / rows
        return Provider(name, run, different, 0.0, counted=told)


def _job(settings: Settings, rows: int, executor: Callable, told: dict) -> dict[int, list[int]]:
    """Run a job, and return the codes of the best candidate by row; `told` gets the parts of the job's time."""
    rng = random.Random(0)
    texts = (" ".join(rng.choices(WORDS.split(), k=rng.randint(3, 15))) for _ in range(rows))
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "corpus.jsonl"), Path(folder, "out")
        source.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
        with patch.object(job, "_executor", lambda *_: _Timed(executor, told)):
            job.run(source, out, progress=False, **settings.as_dict())
        lines = pq.read_table(out / "shards", columns=["row", "codes"]).to_pylist()
    return {line["row"]: line["codes"] for line in lines}


class _Timed:
    """An executor, with the parts of its time in `told["parts"]`."""

    def __init__(self, executor: Callable, told: dict):
        self._begun, self._told = perf_counter(), told
        self._executor = executor()
        self.description, self.close = self._executor.description, self._executor.close

    def outcomes(self, path: Path, tasks: list) -> Iterator[Outcome]:
        first = None
        for outcome in self._executor.outcomes(path, tasks):
            first = first or perf_counter()
            yield outcome
        self._told["parts"] = {"start": first - self._begun, "work": perf_counter() - first}


class _Idle:
    """Replaces a worker's engine, and answers at once."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def description(self) -> dict:
        return {"settings": self._settings.as_dict(), "checkpoint": "none", "versions": {}}

    def close(self) -> None:
        """Do nothing, because nothing is open."""

    def outcomes(self, path: Path, tasks: list) -> Iterator[Outcome]:
        file = RowFile(path)
        return (_outcome(row, self._settings) for task in tasks for row in task.rows_of(file))


class IdleActor:
    """The same for a cluster's actor."""

    def __init__(self, settings: Settings, memory_fraction: float):
        self._settings = settings

    def __call__(self, batch: pa.Table) -> pa.Table:
        outcomes = [_outcome(row, self._settings) for row in arrived(batch)]
        return to_table(outcomes, outcome_schema(self._settings))


def _codes(row: int) -> np.ndarray:
    return np.arange(row, row + 200, dtype=np.int32) % 8192


def _outcome(row: Row, settings: Settings) -> Outcome:
    codes = _codes(row.index)
    numbers = {"rank": 1, "candidate": 0, "candidates": settings.num_candidates, "tokens": 200, "seed": row.index}
    line = {"row": row.index, "id": row.id, "codes": codes, "length": len(codes), "stopped": False, "score": 0.5}
    timings = dict.fromkeys(("prepare", "queue", "decode", "rank"), 0.0)
    return Outcome(row.index, row.id, (line | numbers | {"settings": settings.digest, "timings": timings},))
