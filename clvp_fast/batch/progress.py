"""The progress bars of a job: rows and tokens a second, failures, and the time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from clvp_fast.batch.outcomes import Outcome

# Rates are means over this many seconds, because rows come in bursts.
_PERIOD = 300.0


@contextmanager
def job_bar(what: str, total: int, done: int, hidden: bool) -> Iterator["JobProgress"]:
    """Show a bar on stderr that begins at `done`; `what` is a word for the work."""
    count = TaskProgressColumn() if total == 1 else MofNCompleteColumn()
    columns = [TextColumn("{task.description}"), BarColumn(), count, TextColumn("{task.fields[rate]}")]
    columns += [TextColumn("left:"), TimeRemainingColumn()]
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, disable=hidden, speed_estimate_period=_PERIOD) as progress:
        yield JobProgress(progress, what, total, done)


class JobProgress:
    """The counts behind a bar."""

    def __init__(self, progress: Progress, what: str, total: int, done: int):
        self._progress = progress
        self._task = progress.add_task(what, total=total, completed=done, rate="")
        self._rows = self._failed = self._tokens = 0

    def reach(self, done: float) -> None:
        """Set the finished part of the total."""
        self._progress.update(self._task, completed=done)

    def count(self, outcome: Outcome) -> None:
        """Count one more row."""
        self._rows += 1
        self._failed += outcome.error is not None
        self._tokens += outcome.drawn["tokens"]
        seconds = self._progress.tasks[0].elapsed or 0
        rate = f"{self._rows / seconds:.2g} rows, {self._tokens / seconds:.0f} tokens a second" if seconds else ""
        failed = f", {self._failed} failed" if self._failed else ""
        self._progress.update(self._task, advance=1, rate=rate + failed)
