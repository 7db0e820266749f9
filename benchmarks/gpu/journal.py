"""What each item came to, a line of JSON as it comes: what is killed at any moment leaves all lines before.

A line counts for the code and the card that it was written for; another program, or another card, begins anew.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

#: Outcomes of an item that make its step fail; all others are fine.
FAILED = ("failed", "hung", "died")


@dataclass(frozen=True)
class Journal:
    """The lines of one file that count for `mark`, which names the code and the card."""

    path: Path
    mark: str

    def write(self, step: str, event: str, **more) -> None:
        """Append a line in one piece; one that was cut off before it stays alone."""
        line = {"utc": datetime.now(UTC).isoformat(timespec="seconds"), "mark": self.mark, "step": step, "event": event}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, ("\n" * cut_off + json.dumps(line | more) + "\n").encode())
        finally:
            os.close(descriptor)

    def lines(self, step: str | None = None) -> Iterator[dict]:
        """Of all steps or of one, in their order."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue  # it was being written when all was killed
            if found["mark"] == self.mark and step in (None, found["step"]):
                yield found

    def ended(self, step: str) -> dict[str, dict]:
        """By item, the line of its end. What a worker passed whose word was taken back is not among them."""
        found = {}
        for line in self.lines(step):
            if line["event"] == "end":
                found[line["item"]] = line
            elif line["event"] == "taken back":
                found = {item: end for item, end in found.items() if end["worker"] != line["worker"]}
        return found

    def open_item(self, step: str, worker: str) -> str | None:
        """What a worker has begun and not ended."""
        begun = None
        for line in self.lines(step):
            if line.get("worker") == worker and line["event"] in ("begin", "end"):
                begun = line["item"] if line["event"] == "begin" else None
        return begun

    def is_done(self, step: str, worker: str) -> bool:
        """Whether a worker has come to the end of its items."""
        return any(line["event"] == "done" and line["worker"] == worker for line in self.lines(step))

    def state(self, step: str) -> "State":
        """How a step stands."""
        ended = self.ended(step)
        state = State(sum(end["outcome"] not in FAILED for end in ended.values()))
        state.failed = [f"{item}: {end['outcome']}" for item, end in ended.items() if end["outcome"] in FAILED]
        for line in self.lines(step):
            if line["event"] == "begin step":
                state.broken, state.whole = None, False
            elif line["event"] == "broken":
                state.broken = line["why"]
            elif line["event"] == "late":
                state.late += 1
            elif line["event"] == "whole":
                state.whole = True
        return state


@dataclass
class State:
    """passed: items that are fine. failed: those that are not, and what they came to. broken: why a worker could not do
    its work at all. late: how often the step ran out of its time. whole: every item has come to something.
    """

    passed: int
    failed: list[str] | None = None
    broken: str | None = None
    late: int = 0
    whole: bool = False
