"""`run`: a resumable job that turns a corpus into ranked candidates in a folder of Parquet shards."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from clvp_fast.batch.folder import FORMAT, JobFolder, Journal
from clvp_fast.batch.inputs import RowFile, Task, digest_of, read_rows, require_file
from clvp_fast.batch.outcomes import Outcome, outcome_schema, shard_schema
from clvp_fast.batch.progress import JobProgress, job_bar
from clvp_fast.batch.settings import Settings
from clvp_fast.batch.summary import write_summary
from clvp_fast.engine.defaults import MEMORY_FRACTION
from clvp_fast.io.files import UnwritableError, replacing, user_path
from clvp_fast.io.names import RESERVED
from clvp_fast.io.waits import waiting

logger = logging.getLogger(__name__)

#: The number of rows of a shard; latents take megabytes per row.
SHARD_ROWS, SHARD_ROWS_WITH_LATENTS = 1024, 64
# The seconds between two writes of a shard's journal. A sudden end loses only the results since then, and the rows
# under way.
_JOURNAL_SECONDS = 1.0


def run(
    input: str | Path,
    out: str | Path,
    *,
    retry_failed: bool = False,
    shard_rows: int | None = None,
    ray: str | bool | None = None,
    workers: int | None = None,
    memory_fraction: float = MEMORY_FRACTION,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Make candidates for all rows of a file, and write the best of each into Parquet files below `out`/shards.

    A run may be stopped at any moment, by a signal, a full disk or a power cut. Called again with the same arguments,
    it does the missing rows; the results are those of a run that was not stopped. Rows that cannot be spoken go to
    `out`/failures.jsonl with the reason, and the others go on.

    A line of the results is one kept candidate: `id` and `row` of the input (counted from 0, in this order), `rank`
    (from 1), `candidate` (its index) and `candidates` (their number), `codes` (speech tokens before the stop token),
    `length`, `stopped` (it drew the stop token), `score`, `tokens` (drawn for the whole row), `seed`, `settings` (a
    hash), `timings` in seconds, `remarks` (sentences on what was cut, resampled, left out or written in Latin letters
    in its text and voice). With `embeddings` there are also `text_embedding` and `speech_embedding` `[projection_dim]`;
    with `latents` also `latents` `[codes and the silence after them, hidden_size]` for Tortoise's diffusion.

    Args:
        input: a file of JSON lines, CSV or Parquet, recognized by its name, with columns `id`, `text`, `voice` (a
            recording, a folder of recordings of one speaker, or a saved voice; relative to the input's folder) and
            optionally `num_candidates`, `max_new_tokens`, `temperature` and so on, as in [`SamplingParams`], for rows
            with settings of their own. In Parquet `voice` may also hold the recordings themselves, as bytes or as
            `{"bytes", "path"}`.
        out: the job's folder.
        retry_failed: try the rows again that failed before.
        shard_rows: rows of the input per file of results; by default 1024, with latents 64.
        ray: work on a Ray cluster: its address, or True for the one that Ray finds, else one on this machine.
        workers: the most workers of the cluster; by default one for each GPU, or on CPUs one for each machine.
        memory_fraction: the share of free memory that may be used beside the weights.
        progress: show a bar on stderr.
        settings: those of [`Settings`]: `checkpoint`, `voice`, `keep`, `num_candidates`, `dtype` and so on.

    Returns:
        The content of `out`/summary.json: counts of rows, candidates, tokens and failures, seconds, rates.

    Raises:
        ValueError, FileNotFoundError: an unusable input, checkpoint or setting, or another one than the job in `out`
            was begun with; the message says which.
        UnwritableError: `out` cannot be written, or the disk is full.
        BlockingIOError: another process works on `out`.
    """
    given = Settings(**_absolute(settings))
    source = user_path(input)
    for name, value in (("shard_rows", shard_rows), ("workers", workers)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number from 1 up, not {value!r}")
    if workers is not None and not ray:
        raise ValueError("workers is for a Ray cluster: give ray=True or its address, or leave workers out")
    require_file(source)
    with closing(JobFolder(user_path(out))) as folder:
        manifest = folder.read_manifest()
        identity = _identity(source, manifest, given, shard_rows)
        if manifest is not None:
            given = given.going_on_from(manifest["settings"])
        elif not ray and given.voice is not None and not Path(given.voice).exists():  # workers may have other disks
            raise FileNotFoundError(f"there is no voice at {given.voice}: a job's voice is fixed when it begins")
        rows = _rows(folder, source, identity["shard_rows"], manifest, progress)
        if manifest is None and given.voice is None:
            _require_voices(rows)
        job = None if manifest is None else _Job(folder, rows, given, retry_failed, progress)
        if job is None or job.tasks:
            with waiting(f"loading {given.checkpoint}", hidden=not progress):
                executor = _executor(given, memory_fraction, ray, workers)
            with closing(executor):
                found = executor.description()
                _check_checkpoint(manifest, found)
                if job is None:
                    manifest = {"format": FORMAT, **identity, "rows": rows.num_rows, **found}
                    folder.write_json("manifest.json", manifest)
                    job = _Job(folder, rows, Settings(**found["settings"]), retry_failed, progress)
                with job_bar("speaking", rows.num_rows, job.rows_done, hidden=not progress) as bar:
                    job.work(executor.outcomes(folder.rows, job.tasks), bar)
        assert manifest is not None  # read, or written just now
        return write_summary(folder, manifest, job.now, job.seconds)


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with absolute paths; links are kept, because their targets may move."""
    places = {}
    for name in ("checkpoint", "voice"):
        place = settings.get(name)
        if not isinstance(place, (str, Path)):
            continue
        if name == "voice" or (str(place) not in RESERVED and user_path(place).exists()):
            places[name] = os.path.abspath(user_path(place))
    return settings | places


def _identity(source: Path, manifest: dict | None, given: Settings, shard_rows: int | None) -> dict[str, Any]:
    """Return the facts about the job that are known before its rows are read, equal to those of `manifest` if any."""
    digest = digest_of(source)
    if manifest is None:
        default = SHARD_ROWS_WITH_LATENTS if given.latents else SHARD_ROWS
        about = {"path": os.path.abspath(source), "bytes": source.stat().st_size, "digest": digest}
        return {"input": about, "shard_rows": shard_rows or default}
    if digest != manifest["input"]["digest"]:
        raise ValueError(
            f"{source} is not what the job was begun with: its content has changed. Choose another folder for it"
        )
    if shard_rows not in (None, manifest["shard_rows"]):
        raise ValueError(
            f"the job was begun with other settings: shard_rows was {manifest['shard_rows']} and is {shard_rows}. "
            "Leave it out to go on"
        )
    return {"input": manifest["input"], "shard_rows": manifest["shard_rows"]}


def _check_checkpoint(manifest: dict | None, found: dict[str, Any]) -> None:
    if manifest is None:
        return
    if manifest["checkpoint"] != found["checkpoint"]:
        name = found["settings"]["checkpoint"]
        raise ValueError(
            f"checkpoint {name} is not what the job was begun with: its content has changed. Choose another folder"
        )
    for name, version in found["versions"].items():
        before = manifest["versions"].get(name)
        if before != version:
            logger.warning("%s was %s when the job was begun, and is %s: results may differ", name, before, version)


def _rows(folder: JobFolder, source: Path, shard_rows: int, manifest: dict | None, progress: bool) -> RowFile:
    """Return the job's copy of its rows; make it at the job's beginning, and again if it is damaged."""
    if manifest is not None:
        try:
            return RowFile(folder.rows)
        except (OSError, pa.ArrowException) as error:
            logger.warning("%s is damaged (%s) and is made again from the input", folder.rows, error)
    unused: set[str] = set()
    with job_bar("reading", 1, 0, hidden=not progress) as bar, replacing(folder.rows) as path:
        RowFile.write(path, read_rows(source, bar.reach, unused, folder.keep_voice), shard_rows)
    if unused:
        logger.warning("columns of %s that say nothing to the job: %s", source, ", ".join(map(repr, sorted(unused))))
    rows = RowFile(folder.rows)
    if not rows.num_rows:
        raise ValueError(f"{source} has no rows")
    return rows


def _require_voices(rows: RowFile) -> None:
    """Raise an error for rows without a voice: a job's voice is fixed when it begins."""
    count, first = rows.without_voice()
    if count:
        raise ValueError(
            f"{count} of {rows.num_rows} rows name no voice (the first is row {first}), and the job has none for them: "
            "give the job a voice, or each row one"
        )


def _executor(settings: Settings, memory_fraction: float, ray: str | bool | None, workers: int | None):
    """Return the executor: this process, or a cluster."""
    if ray:
        from clvp_fast.batch.ray_workers import Cluster

        return Cluster(settings, memory_fraction, None if ray is True else ray, workers)
    from clvp_fast.batch.worker import Worker

    return Here(Worker(settings, memory_fraction))


class Here:
    """This process as the only worker."""

    def __init__(self, worker):
        self._worker = worker

    def description(self) -> dict[str, Any]:
        """Describe the worker, for the job's manifest."""
        return self._worker.description()

    def outcomes(self, path: Path, tasks: list[Task]) -> Iterator[Outcome]:
        """Yield the outcomes of the tasks' rows, taking rows as there is room for them."""
        if self._worker.settings.device == "cuda":
            self._worker.engine.warm_up()
        rows = RowFile(path)
        return self._worker.outcomes(row for task in tasks for row in task.rows_of(rows))

    def close(self) -> None:
        """Do nothing, because nothing outlives the process."""


class _Shard:
    """An incomplete shard, with the known outcomes of its rows."""

    def __init__(self, folder: JobFolder, shard: int, rows: int, known: list[Outcome], schema: pa.Schema):
        self.rows = rows
        self.done = {outcome.row: outcome for outcome in known}
        self._journal = Journal(folder.journal_path(shard), known, schema)
        self._waiting: list[Outcome] = []

    def add(self, outcome: Outcome) -> bool:
        """Add an outcome, and return whether it is new: a cluster that loses a worker may do a row twice."""
        if outcome.row in self.done:
            return False
        self.done[outcome.row] = outcome
        self._waiting.append(outcome)
        return True

    def write(self) -> None:
        """Write the rows that were added to the journal."""
        waiting, self._waiting = self._waiting, []
        self._journal.add(waiting)

    def close(self) -> None:
        self._journal.close()


class _Job:
    """The missing part of a job; writes its outcomes into the folder.

    Attributes:
        tasks: the missing rows.
        rows_done: rows that were done before.
        now: `rows`, `candidates` and `tokens` of this run; seconds: its duration.
    """

    def __init__(self, folder: JobFolder, rows: RowFile, settings: Settings, retry_failed: bool, progress: bool):
        """Check the existing shards: complete ones are done, damaged ones are not."""
        self._folder, self._rows, self._digest = folder, rows, settings.digest
        self._result_schema, self._outcome_schema = shard_schema(settings), outcome_schema(settings)
        self._shards: dict[int, _Shard] = {}
        self._whole: set[int] = set()  # shards that were completed in this run
        self._written_at = 0.0
        self.tasks: list[Task] = []
        self.rows_done = 0
        self.now = Counter(rows=0, candidates=0, tokens=0)
        self.seconds = 0.0
        with job_bar("checking", rows.num_shards, 0, hidden=not (progress and folder.has_shards())) as bar:
            folder.write_failures(self._look_through(retry_failed, bar))

    def _look_through(self, retry_failed: bool, bar: JobProgress) -> Iterator[dict[str, Any]]:
        """Find the tasks, and keep the failures of complete shards that are not tried again."""
        for shard in range(self._rows.num_shards):
            yield from self._look_at(shard, retry_failed)
            bar.reach(shard + 1)

    def _look_at(self, shard: int, retry_failed: bool) -> list[dict[str, Any]]:
        rows, journal = self._rows.rows_of(shard), self._folder.journal_path(shard)
        about = self._checked(shard, rows)
        if about is not None:
            journal.unlink(missing_ok=True)
            again = tuple(failure["row"] for failure in about["failures"]) if retry_failed else ()
            self.rows_done += rows - len(again)
            if again:
                self.tasks.append(Task(shard, again))
            return [] if again else about["failures"]
        if journal.exists():
            entry = self._open(shard, Journal.read(journal, self._outcome_schema))
            if len(entry.done) == rows:  # the job ended right before the shard was written
                self._complete(shard)
                return self._look_at(shard, retry_failed)
            self.rows_done += len(entry.done)
            first = shard * self._rows.shard_rows
            self.tasks.append(Task(shard, tuple(row for row in range(first, first + rows) if row not in entry.done)))
        else:
            self.tasks.append(Task(shard))
        return []

    def _checked(self, shard: int, rows: int) -> dict[str, Any] | None:
        try:
            return self._folder.check_shard(shard, rows, self._digest)
        except ValueError as error:
            logger.warning("%s: its rows are spoken again", error)
            self._folder.shard_path(shard).unlink()
            return None

    def work(self, outcomes: Iterable[Outcome], bar: JobProgress) -> None:
        """Write the outcomes of the tasks into the folder.

        Raises:
            UnwritableError: they cannot be written; earlier ones are kept.
        """
        started = time.perf_counter()
        try:
            for outcome in outcomes:
                if self._receive(outcome):
                    bar.count(outcome)
        finally:
            self.seconds = time.perf_counter() - started
            for shard in self._shards.values():
                with suppress(UnwritableError):
                    shard.write()
                shard.close()
        if self._shards:
            raise RuntimeError(f"nothing came back of rows in shards {sorted(self._shards)}: run the job again")

    def _receive(self, outcome: Outcome) -> bool:
        number = outcome.row // self._rows.shard_rows
        if number in self._whole:  # the row was done twice
            return False
        shard = self._shards.get(number)
        if shard is None:
            # The shard is complete except for failures that are tried again: take its known outcomes.
            whole = self._folder.shard_path(number).exists()
            shard = self._open(number, self._folder.read_shard(number) if whole else [])
        if not shard.add(outcome):
            return False
        self.now.update(rows=1, **outcome.drawn)
        if len(shard.done) == shard.rows:
            self._complete(number)
            self._whole.add(number)
        now = time.monotonic()
        if now - self._written_at >= _JOURNAL_SECONDS:
            self._written_at = now
            for shard in self._shards.values():
                shard.write()
        return True

    def _open(self, shard: int, known: list[Outcome]) -> _Shard:
        rows = self._rows.rows_of(shard)
        self._shards[shard] = _Shard(self._folder, shard, rows, known, self._outcome_schema)
        return self._shards[shard]

    def _complete(self, number: int) -> None:
        shard = self._shards.pop(number)
        shard.write()  # if the file of results does not fit, the journal still has them
        shard.close()
        self._folder.write_shard(number, shard.done.values(), self._result_schema, self._digest)
