"""The results of items, a line of JSON each, written as they come; a kill at any moment leaves all earlier lines.

A line counts only for the code, the card and the libraries that it was written for; with others everything starts over.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

#: Outcomes of an item that make its step fail.
FAILED = ("failed", "hung", "died")
#: Outcomes of an item that could not run here. All others count as success.
LEFT_OUT = ("skipped", "absent")


@dataclass(frozen=True)
class Journal:
    """The lines of one file that count for `mark`, which names the code, the card and the libraries."""

    path: Path
    mark: str

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it, nobody else holds this file. Raises `BlockingIOError` where somebody does already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(descriptor)

    def write(self, step: str, event: str, **more) -> None:
        """Append a line in one piece; one that was cut off before it stays alone."""
        line = {"utc": datetime.now(UTC).isoformat(timespec="seconds"), "mark": self.mark, "step": step, "event": event}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            text = ("\n" * cut_off + json.dumps(line | more) + "\n").encode()
            if os.write(descriptor, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)

    def lines(self, step: str | None = None) -> Iterator[dict]:
        """Return the lines of all steps or of one, in their order."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue  # it was being written at the kill
            if found["mark"] == self.mark and step in (None, found["step"]):
                yield found

    def ended(self, step: str) -> dict[str, dict]:
        """Return the last line of each item. Items of a worker whose results were withdrawn are left out."""
        found = {}
        for line in self.lines(step):
            if line["event"] == "end":
                found[line["item"]] = line
            elif line["event"] == "taken back":
                found = {item: end for item, end in found.items() if end["worker"] != line["worker"]}
        return found

    def state(self, step: str) -> "State":
        """Return the state of a step."""
        ended = self.ended(step).items()
        state = State(
            passed=[item for item, end in ended if end["outcome"] not in FAILED + LEFT_OUT],
            left_out=[f"{item}: {end['why'].strip()}" for item, end in ended if end["outcome"] in LEFT_OUT],
            failed=[f"{item}: {end['outcome']}" for item, end in ended if end["outcome"] in FAILED],
        )
        for line in self.lines(step):
            if line["event"] == "begin step":
                state.broken, state.whole = None, False
            elif line["event"] == "broken":
                state.broken = line["why"]
            elif line["event"] == "late":
                state.late += 1
            elif line["event"] == "whole":
                state.whole = True
        if state.whole and not state.passed and not state.failed and state.broken is None:
            why = f"; the first: {state.left_out[0]}" if state.left_out else ""
            state.broken = f"nothing ran, {len(state.left_out)} left out{why}"
        return state


@dataclass
class State:
    """passed: items that are fine. left_out: those that could not be done here, and why. failed: those that are not
    fine, and what they came to. broken: why the step did not do its work at all. late: how often it ran out of its
    time. whole: every item has come to something.
    """

    passed: list[str]
    left_out: list[str]
    failed: list[str]
    broken: str | None = None
    late: int = 0
    whole: bool = False


class WorkerProgress:
    """The state of a worker that begins now, by the lines that it has written so far.

    item: that it has begun and not ended. ended: how many items it has ended. done: whether it has come to the end of
        its items. Each is as `look` found it, which reads what was not read before.
    """

    def __init__(self, journal: Journal, worker: str):
        self._path, self._worker = journal.path, worker
        self._read = journal.path.stat().st_size if journal.path.exists() else 0
        self.item: str | None = None
        self.ended = 0
        self.done = False

    def look(self) -> str | None:
        """Read on; returns `item`."""
        if not self._path.exists():
            return None
        with self._path.open("rb") as file:
            file.seek(self._read)
            found = file.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            if self._worker.encode() in line:
                self._take(line)
        return self.item

    def _take(self, line: bytes) -> None:
        try:
            found = json.loads(line.decode(errors="replace"))
        except json.JSONDecodeError:
            return  # it was cut off
        if found.get("worker") != self._worker:
            return
        if found["event"] in ("begin", "end"):
            self.item = found["item"] if found["event"] == "begin" else None
        self.ended += found["event"] == "end"
        self.done |= found["event"] == "done"
