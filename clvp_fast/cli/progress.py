"""The progress bars of `generate`: finished candidates, tokens per second, and the longest time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, Progress, TextColumn

from clvp_fast.cli.report import counting_progress, notes_console
from clvp_fast.engine.engine import CandidateEngine

# The seconds between two moves of the bar, so that a call for each token costs almost nothing.
_INTERVAL = 0.1


def warm_up(engine: CandidateEngine) -> float:
    """Capture the engine's decode step at every batch size under a bar, and return the seconds taken."""
    with counting_progress(hidden=False) as progress:
        task = progress.add_task("capturing the decode step", total=None)
        return engine.warm_up(lambda done, sizes: progress.update(task, completed=done, total=sizes))


@contextmanager
def decoding_bar(
    num_requests: int, num_candidates: int, max_new_tokens: int, stop: int
) -> Iterator["DecodingProgress"]:
    """Show a bar on stderr over the candidates of all requests; the engine's `on_token` moves it."""
    columns = [TextColumn("{task.description}"), BarColumn()]
    columns += [TextColumn(f"{{task.fields[{name}]}}") for name in ("ended", "rate", "left")]
    with Progress(*columns, console=notes_console) as progress:
        counts = DecodingProgress(progress, num_requests, num_candidates, max_new_tokens, stop)
        try:
            yield counts
        finally:
            counts.show()


class DecodingProgress:
    """Count drawn tokens.

    candidates, ended: how many there are, and how many have ended. tokens: those drawn by all of them.
    limit: the most tokens that they can draw; it falls when one stops early.
    paused: seconds in which results were written and nothing was drawn.
    """

    def __init__(self, progress: Progress, num_requests: int, num_candidates: int, max_new_tokens: int, stop: int):
        self.candidates, self.ended, self.tokens = num_requests * num_candidates, 0, 0
        self.limit = self.candidates * max_new_tokens
        self._stop = stop
        self._of_request = [max_new_tokens] * num_candidates
        # by request, the tokens that each of its candidates can still draw
        self._left: dict[object, list[int]] = {}
        self.paused = 0.0
        self._started = self._shown_at = time.monotonic()
        self._progress = progress
        self._task = progress.add_task("decoding", total=self.limit, ended="", rate="", left="")

    def __call__(self, request, candidate: int, token: int) -> None:
        left = self._left.get(request)
        if left is None:
            left = self._left[request] = self._of_request.copy()
        self.tokens += 1
        left[candidate] -= 1
        if token == self._stop:
            self.limit -= left[candidate]
            left[candidate] = 0
        self.ended += not left[candidate]
        now = time.monotonic()
        if now - self._shown_at >= _INTERVAL:
            self._shown_at = now
            self.show()

    def close(self, request) -> None:
        """Count a request as done: it is finished, or has failed."""
        for left in self._left.pop(request, self._of_request):
            self.limit -= left
            self.candidates -= left > 0

    def show(self) -> None:
        seconds = time.monotonic() - self._started - self.paused
        rate = self.tokens / seconds if seconds > 0 else 0
        left = f"left: {timedelta(seconds=round((self.limit - self.tokens) / rate))} at most" if rate else ""
        self._progress.update(
            self._task,
            description="decoding" if self.tokens < self.limit else "ranking",
            completed=self.tokens,
            total=self.limit,
            ended=f"{self.ended} of {self.candidates} candidates",
            rate=f"{self.tokens} tokens, {rate:.0f} a second",
            left=left if self.tokens < self.limit else "",
        )
