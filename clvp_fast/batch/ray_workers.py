"""The workers of a job on a Ray cluster, `clvp-fast batch --ray`.

Importing this module imports neither Ray nor torch.
"""

import logging
import os
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from clvp_fast.batch.inputs import RowFile, Task, arrived, in_transit
from clvp_fast.batch.outcomes import Outcome, from_table, outcome_schema, to_table
from clvp_fast.batch.settings import Settings
from clvp_fast.engine.defaults import MEMORY_FRACTION

logger = logging.getLogger(__name__)

# The number of rows that go to a worker together: at most this many, or this many times its engine's batch ...
_PIECE, _WAVES = 64, 16
# ... and few enough that each worker gets this many pieces.
_TURNS = 8
# The seconds after which an unresponsive cluster is an error, and after which a message says that workers take long.
_ANSWER, _PATIENCE = 10.0, 60.0
# The beginning of a gRPC client's stream, and the type of frame with which a gRPC server answers.
_HTTP2, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), b"\x04"


class _JobActor:
    """An actor for rows of a job. Rows keep their indices; the results go to the job's folder."""

    def __init__(self, settings: Settings, memory_fraction: float):
        from clvp_fast.batch.worker import ready_worker

        self._error: Exception | None = None
        try:
            self._worker = ready_worker(settings, memory_fraction)
        except Exception as error:  # Ray would keep only its traceback, and report a dead actor
            self._error = error
        else:
            self._worker.settings = settings  # the job's, even if memory here allows only a smaller batch

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._error is not None:
            raise self._error
        return to_table(self._worker.outcomes(arrived(batch)), outcome_schema(self._worker.settings))


@dataclass(frozen=True)
class _Share:
    """The share of each worker: CPUs or a GPU, its settings, and a part of its machine's memory."""

    workers: int
    resources: dict[str, Any]  # Ray's options: "num_cpus" or "num_gpus"
    settings: Settings
    memory_fraction: float


class Cluster:
    """The workers of a job on a Ray cluster, in place of the job's own process; see `clvp_fast.batch.run`.

    Only this process's machine reads and writes the job's folder. Workers must be able to read recordings and the
    checkpoint at the same paths.

    Args:
        settings, memory_fraction: the job's.
        address: HOST:PORT of the cluster; None: the one that Ray finds, or else one on this machine, which ends with
            the job.
        workers: the most workers; None: one for each GPU, or one for each machine if there are only CPUs.

    Raises:
        ImportError: Ray is not installed. ConnectionError: no cluster answers. ValueError: an address of another kind,
            or a cluster without the resources that the settings ask for.
    """

    def __init__(
        self,
        settings: Settings,
        memory_fraction: float = MEMORY_FRACTION,
        address: str | None = None,
        workers: int | None = None,
    ):
        self._ray = _imported()
        self._started = _connect(self._ray, address)
        self._stream: Generator[Outcome, None, None] | None = None
        try:
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._share = _share(settings, memory_fraction, nodes, workers)
        except BaseException:
            self.close()
            raise
        self._described = False

    def description(self) -> dict[str, Any]:
        """Describe one worker for the job's manifest. It holds for all workers, because they take over its settings.

        Raises:
            FileNotFoundError, ValueError: as for [`Worker`].
        """
        describe = self._ray.remote(max_calls=1, **self._share.resources)(_describe)
        with _plainly(self._ray):
            answer = describe.remote(self._share.settings, self._share.memory_fraction)
            if not self._ray.wait([answer], timeout=_PATIENCE)[0]:
                logger.warning("waiting until the cluster has a worker with %s", self._share.resources)
            found = self._ray.get(answer)
        self._share = replace(self._share, settings=Settings(**found["settings"]))
        self._described = True
        return found

    def outcomes(self, path: Path, tasks: list[Task]) -> Iterator[Outcome]:
        """Yield the outcomes of tasks' rows, in the order in which workers finish them.

        A worker that dies is replaced and does its rows again, so that a row may come twice.

        Args:
            path: the file of the job's rows.

        Raises:
            FileNotFoundError, ValueError: a worker's model cannot be loaded, as for [`Worker`].
        """
        if not self._described:
            self.description()
        self._stream = self._outcomes(path.absolute(), tasks)
        return self._stream

    def _outcomes(self, path: Path, tasks: list[Task]) -> Generator[Outcome, None, None]:
        from ray.data import ActorPoolStrategy, TaskPoolStrategy, from_items

        share, file = self._share, RowFile(path)
        size = _piece_rows(share.settings, share.workers, sum(_count(task, file) for task in tasks))
        pieces = [
            {"shard": piece.shard, "rows": list(piece.rows or ())} for task in tasks for piece in _cut(task, file, size)
        ]
        workers = min(share.workers, len(pieces))
        here = self._ray.get_runtime_context().get_node_id()
        rows = from_items(pieces, override_num_blocks=len(pieces)).map_batches(
            _read,  # pyright: ignore[reportArgumentType] - Ray types a function without `fn_kwargs`
            fn_kwargs={"path": path},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,  # workers may occupy all CPUs
            compute=TaskPoolStrategy(size=1),
            label_selector={"ray.io/node-id": here},
        )
        spoken = rows.map_batches(
            _JobActor,
            fn_constructor_kwargs={"settings": share.settings, "memory_fraction": share.memory_fraction},
            batch_size=size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2
            ),
            **share.resources,
        )
        spoken.context.enable_progress_bars = False
        spoken.context.raise_original_map_exception = True
        with _quiet("ray.data"), _plainly(self._ray):
            for table in spoken.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from from_table(table)

    def close(self) -> None:
        """Stop the work on the cluster, and the cluster itself if this process started it."""
        if self._stream is not None:
            self._stream.close()
        if self._started:
            self._ray.shutdown()


def _imported():
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("a Ray cluster needs Ray: pip install '.[ray]' in a clone of clvp_fast") from error
    return ray


def _connect(ray, address: str | None) -> bool:
    """Connect to Ray, and return whether this call made the connection."""
    if ray.is_initialized():
        found = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", found):
            raise ValueError(f"this process is at work on the Ray cluster at {found}: leave {address} out")
        return False
    asked = address or os.environ.get("RAY_ADDRESS")
    if asked not in (None, "auto", "local"):
        _require_answer(asked)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConnectionError(f"no Ray cluster was found: start one with `ray start --head` ({error})") from error
    return True


def _require_answer(address: str) -> None:
    """Raise an error at once if no cluster answers; Ray would try for minutes, even if its dashboard answers."""
    host, colon, port = address.rpartition(":")
    if "/" in address or not colon or not port.isdigit():
        raise ValueError(f"the address of a Ray cluster is HOST:PORT, as `ray start --head` tells it, not {address!r}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as connection:
            connection.sendall(_HTTP2)
            head = b"" if os.environ.get("RAY_USE_TLS") == "1" else connection.recv(4)
    except OSError as error:
        raise ConnectionError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error
    if head and head[3:] != _SETTINGS:
        raise ConnectionError(f"the server at {address} is not a Ray cluster: give the port of `ray start --head`")


def _share(settings: Settings, memory_fraction: float, nodes: list[dict[str, float]], workers: int | None) -> _Share:
    """Divide a cluster of `nodes` into one share for each worker, by the nodes' resources."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if settings.device == "cuda" or (settings.device is None and gpus):
        if not gpus:
            raise ValueError("device 'cuda': the Ray cluster has no GPU; use 'cpu', or leave it out")
        return _Share(workers or gpus, {"num_gpus": 1}, replace(settings, device="cuda"), memory_fraction)
    machines = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not machines:
        raise ValueError("the Ray cluster has no CPU for workers: start it with --num-cpus")
    workers = workers or len(machines)
    threads = settings.threads or max(1, min(sum(machines) // workers, max(machines)))
    cpus = min(threads, max(machines))
    beside = min(workers, max(machines) // cpus)
    return _Share(
        workers, {"num_cpus": cpus}, replace(settings, device="cpu", threads=threads), memory_fraction / beside
    )


def _piece_rows(settings: Settings, workers: int, rows: int) -> int:
    """Return the rows of a worker's piece: enough to keep its engine full, and few enough to share them."""
    assert settings.batch_size is not None and settings.num_candidates is not None  # the first worker has set them
    at_once = settings.batch_size / settings.num_candidates
    return max(1, min(rows // (workers * _TURNS), max(_PIECE, int(_WAVES * at_once))))


def _count(task: Task, file: RowFile) -> int:
    return file.rows_of(task.shard) if task.rows is None else len(task.rows)


def _cut(task: Task, file: RowFile, size: int) -> Iterator[Task]:
    first = task.shard * file.shard_rows
    rows = task.rows if task.rows is not None else range(first, first + file.rows_of(task.shard))
    for start in range(0, len(rows), size):
        yield Task(task.shard, tuple(rows[start : start + size]))


def _read(batch: pa.Table, path: Path) -> pa.Table:
    """Return the rows of a piece; this runs on the machine with the job's folder."""
    file = RowFile(path)
    pieces = [Task(piece["shard"], tuple(piece["rows"])) for piece in batch.to_pylist()]
    return in_transit(row for piece in pieces for row in piece.rows_of(file))


def _describe(settings: Settings, memory_fraction: float) -> dict[str, Any]:
    from clvp_fast.batch.worker import Worker

    return Worker(settings, memory_fraction).description()


@contextmanager
def _plainly(ray) -> Iterator[None]:
    """Raise a worker's errors as the worker raised them, without Ray's wrapping."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a logger: the job has its own bar and its own error messages."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
