"""Runs the workers of a step, each in a process group of its own, and ends those that hang.

An item that hangs or kills its worker costs itself alone: it is written down, and a new worker goes on behind it.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import monotonic, time_ns

from benchmarks.gpu.journal import Journal

#: How a worker ends whose device can no longer be used: another one goes on behind it.
DEVICE_LOST = 75
#: How a worker ends whose supervisor is gone.
ALONE = 70
_PAUSE = 0.5
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


@dataclass(frozen=True)
class Step:
    """What some workers do.

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


def worker_arguments(step: Step, journal: Journal, worker: str, share: int) -> list[str]:
    words = ["--journal", str(journal.path), "--mark", journal.mark, "--step", step.name]
    return [*words, "--worker", worker, "--share", f"{share}/{step.workers}"]


def run_step(step: Step, journal: Journal, deadline: float, logs: Path, environment: dict[str, str]) -> None:
    """Run a step until all of its items have come to something, its time is over, or `deadline` is.

    deadline: of the part, by `time.monotonic()`. A step that ends with it is not late: it goes on in the next part.
    """
    journal.write(step.name, "begin step")
    end = min(monotonic() + step.seconds, deadline)
    logs.mkdir(parents=True, exist_ok=True)
    whole: list[bool] = []
    threads = [
        Thread(target=lambda n=n: whole.append(_share(step, journal, n, end, logs, environment)), daemon=True)
        for n in range(step.workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(whole) == step.workers and all(whole):
        journal.write(step.name, "whole")
    elif monotonic() >= end and end < deadline:
        journal.write(step.name, "late")


def _share(step: Step, journal: Journal, share: int, end: float, logs: Path, environment: dict[str, str]) -> bool:
    """Go through one worker's items, with a new process behind each that is lost; whether all came to something."""
    stem = re.sub(r"\W+", "-", step.name)
    while monotonic() < end:
        worker = f"{share}.{time_ns():x}"
        try:
            hung, said, code = _run(step, journal, worker, share, end, logs / f"{stem}.log", environment)
        except OSError as error:
            journal.write(step.name, "broken", why=f"it cannot be started: {error}")
            return False
        item = journal.open_item(step.name, worker)
        found = _SUMMARY.findall(said)
        if step.sanitized and not found:  # ended before it could say anything
            journal.write(step.name, "taken back", worker=worker)
        if step.sanitized and any(map(int, found)):
            journal.write(
                step.name, "broken", why=f"{' and '.join(found)} errors in the sanitizer's summary: {stem}.log"
            )
        if journal.is_done(step.name, worker):
            return True
        if item is not None and item == hung:
            journal.write(step.name, "end", item=item, worker="", outcome="hung", why=f"{step.item_seconds:.0f} s")
        elif monotonic() >= end:
            return False
        elif item is not None and hung is None:
            why = f"exit code {code}: {said[-500:]}"
            journal.write(step.name, "end", item=item, worker="", outcome="died", why=why)
        elif code != DEVICE_LOST and not found and hung is None:
            journal.write(step.name, "broken", why=f"exit code {code}: {said[-1500:]}")
            return False
    return False


def _run(
    step: Step, journal: Journal, worker: str, share: int, end: float, log: Path, environment: dict[str, str]
) -> tuple[str | None, str, int]:
    """One process from its begin to its end: the item that hung, if one did, what it printed, and its exit code."""
    own = log.with_name(f"{log.stem}-{worker}.part")
    with own.open("wb") as output:
        process = subprocess.Popen(
            [*step.command, *worker_arguments(step, journal, worker, share)],
            stdin=subprocess.PIPE,  # the worker ends when this process does
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            hung = _watched(process, step, journal, worker, end)
        finally:
            _kill(process)
    said = own.read_text(errors="replace")
    with log.open("a") as whole:  # few files: one a step
        whole.write(said)
    own.unlink()
    return hung, said, process.returncode


def _watched(process: subprocess.Popen, step: Step, journal: Journal, worker: str, end: float) -> str | None:
    """Wait until the process ends or must be ended; the item that hangs, if one does."""
    known, since = None, monotonic()
    while process.poll() is None and monotonic() < end:
        item = journal.open_item(step.name, worker)
        if item != known:
            known, since = item, monotonic()
        if known is not None and monotonic() - since > step.item_seconds:
            return known
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PAUSE)
    return None


def _kill(process: subprocess.Popen) -> None:
    """End the process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdin.close()
    process.wait()


def end_with_the_supervisor(descriptor: int = 0) -> None:
    """Of a worker: end this process when the supervisor is gone, and with it the other end of standard input."""

    def wait() -> None:
        while os.read(descriptor, 1024):
            pass
        os._exit(ALONE)

    Thread(target=wait, daemon=True).start()


def device_is_lost(synchronize: Callable[[], object]) -> bool:
    """Whether an error has left the device unusable to this process."""
    try:
        synchronize()
    except Exception:
        return True
    return False
