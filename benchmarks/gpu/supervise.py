"""Runs the workers of a step, each in its own process group, and ends those that hang.

An item that hangs or kills its worker costs only itself: it is recorded, and a new worker continues after it.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import monotonic, time_ns
from typing import BinaryIO

from benchmarks.gpu.journal import Journal, WorkerProgress

#: The exit code of a worker that can no longer use its device, or enough of its memory; another one continues after it.
DEVICE_LOST = 75
#: The exit code of a worker whose supervisor is gone.
ALONE = 70
_PAUSE = 0.5
#: Seconds that a sanitizer has to tell what it has seen, when its worker is ended.
GRACE = 5.0
# The amount of a worker's output that is read again; all of it is in the step's log.
_TAIL_BYTES = 100_000
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


@dataclass(frozen=True)
class Step:
    """The work of some workers.

    command: of a worker; `worker_arguments` come behind it. seconds: that the step may take. item_seconds: that an item
        may take. workers: that share its items. sanitized: the command is a sanitizer's, and what a worker passed
        counts when its summary is clean.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    item_seconds: float
    workers: int = 1
    sanitized: bool = False

    @property
    def grace(self) -> float:
        return GRACE if self.sanitized else 0.0


def worker_arguments(step: Step, journal: Journal, worker: str, share: int) -> list[str]:
    words = ["--journal", str(journal.path), "--mark", journal.mark, "--step", step.name]
    return [*words, "--worker", worker, "--share", f"{share}/{step.workers}"]


def run_step(step: Step, journal: Journal, deadline: float, logs: Path, environment: dict[str, str]) -> None:
    """Run a step until all of its items have come to something, its time is over, or `deadline` is.

    deadline: of the part, by `time.monotonic()`. A step that ends with it is not late: it goes on in the next part.
    Raises `OSError` where the journal or the logs cannot be written.
    """
    journal.write(step.name, "begin step")
    end = min(monotonic() + step.seconds, deadline)
    logs.mkdir(parents=True, exist_ok=True)
    for left in sorted(logs.glob(f"{_stem(step)}-*.part")):  # by a part that was killed
        _moved(left, logs / f"{_stem(step)}.log")
    whole: list[bool] = []
    errors: list[OSError] = []

    def share(n: int) -> None:
        try:
            whole.append(_share(step, journal, n, end - step.grace, logs, environment))
        except OSError as error:
            errors.append(error)

    threads = [Thread(target=share, args=(n,), daemon=True) for n in range(step.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    if all(whole):
        journal.write(step.name, "whole")
    elif monotonic() >= end - step.grace and end < deadline:
        journal.write(step.name, "late")


def _share(step: Step, journal: Journal, share: int, end: float, logs: Path, environment: dict[str, str]) -> bool:
    """Go through one worker's items, with a new process behind each that is lost; whether all came to something."""
    stem = _stem(step)
    while monotonic() < end:
        worker = f"{share}.{time_ns():x}"
        own, progress = logs / f"{stem}-{worker}.part", WorkerProgress(journal, worker)
        with own.open("wb") as output:
            try:
                process = _start(step, journal, worker, share, output, environment)
            except OSError as error:
                journal.write(step.name, "broken", why=f"it cannot be started: {error}")
                return False
            try:
                hung = _watched(process, step, progress, end)
            finally:
                _end(process, step.grace)
        said, item = _moved(own, logs / f"{stem}.log"), progress.look()
        told = _SUMMARY.findall(said)
        if step.sanitized and not told:  # ended before it could write anything
            journal.write(step.name, "taken back", worker=worker)
        if any(map(int, told)):
            why = f"{' and '.join(told)} errors: {stem}.log"
            journal.write(
                step.name, "end", item=f"the sanitizer's summary of {worker}", worker="", outcome="failed", why=why
            )
        if progress.done:
            return True
        code = process.returncode
        if hung is not None:
            if item == hung:
                journal.write(step.name, "end", item=item, worker="", outcome="hung", why=f"{step.item_seconds:.0f} s")
        elif monotonic() >= end:
            return False
        elif item is not None or (progress.ended and code != DEVICE_LOST and not told):
            item, why = item or f"between two items, {worker}", f"exit code {code}: {said[-1500:]}"
            journal.write(step.name, "end", item=item, worker="", outcome="died", why=why)
        elif not progress.ended:
            journal.write(step.name, "broken", why=f"exit code {code}: {said[-1500:]}")
            return False
    return False


def _stem(step: Step) -> str:
    """Return the beginning of the names of a step's logs."""
    return re.sub(r"\W+", "-", step.name)


def _start(
    step: Step, journal: Journal, worker: str, share: int, output: BinaryIO, environment: dict[str, str]
) -> subprocess.Popen:
    return subprocess.Popen(
        [*step.command, *worker_arguments(step, journal, worker, share)],
        stdin=subprocess.PIPE,  # the worker ends when this process does
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    )


def _moved(own: Path, log: Path) -> str:
    """Move a worker's output into the step's log, one file a step, and return its end."""
    with own.open("rb") as said, log.open("ab") as whole:
        shutil.copyfileobj(said, whole)
        said.seek(max(said.tell() - _TAIL_BYTES, 0))
        tail = said.read().decode(errors="replace")
    own.unlink()
    return tail


def _watched(process: subprocess.Popen, step: Step, progress: WorkerProgress, end: float) -> str | None:
    """Wait until the process ends or must be ended; the item that hangs, if one does."""
    known, since = None, monotonic()
    while process.poll() is None and monotonic() < end:
        if (item := progress.look()) != known:
            known, since = item, monotonic()
        if known is not None and monotonic() - since > step.item_seconds:
            return known
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PAUSE)
    return None


def _end(process: subprocess.Popen, grace: float) -> None:
    """End the process and all that it started. grace: seconds for what a sanitizer says when its worker has ended."""
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_with_the_supervisor(descriptor: int = 0) -> None:
    """End this worker's process when the supervisor is gone, and with it the other end of standard input."""

    def wait() -> None:
        while os.read(descriptor, 1024):
            pass
        os._exit(ALONE)

    Thread(target=wait, daemon=True).start()


def device_is_lost(synchronize: Callable[[], object]) -> bool:
    """Tell whether an error has left the device unusable to this process."""
    try:
        synchronize()
    except Exception:
        return True
    return False
