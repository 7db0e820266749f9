"""The scheduler's cost in a decode step, counted on a null model: candidates stop when they were told to."""

import random
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.harness import Provider, Task, task
from clvp_fast.engine.scheduler import Scheduler

PAGE_SIZE, MAX_NEW_TOKENS, PROMPT = 16, 500, 60


@dataclass(frozen=True)
class Case:
    """`requests` of `candidates` each, in `slots`; a candidate draws from `least` to `MAX_NEW_TOKENS` tokens.

    pages: as a share of what lets all slots decode to the end.
    """

    name: str
    slots: int
    requests: int
    candidates: int
    least: int
    pages: float = 1.0


CASES = (
    Case("all in one batch", 256, 1, 256, MAX_NEW_TOKENS),
    Case("a queue", 256, 16, 64, 100),
    Case("requests of one candidate", 256, 1000, 1, 100),
    Case("ten thousand requests of one candidate", 256, 10_000, 1, 100),
    Case("out of pages", 256, 4, 256, 400, pages=0.6),
)


class NullEngine:
    """All that an engine does for its scheduler, and nothing else. `run` serves every request of the case, once."""

    def __init__(self, case: Case, lag: int):
        draw = random.Random(0)
        pairs = [(key, candidate) for key in range(case.requests) for candidate in range(case.candidates)]
        self.length_of = {pair: draw.randint(case.least, MAX_NEW_TOKENS) for pair in pairs}
        prompts = min(case.slots, case.requests) * -(-PROMPT // PAGE_SIZE)
        num_pages = prompts + int(case.pages * case.slots * -(-MAX_NEW_TOKENS // PAGE_SIZE))
        self.scheduler = Scheduler(num_pages, PAGE_SIZE, case.slots, MAX_NEW_TOKENS, lag)
        for key in range(case.requests):
            self.scheduler.add(key, PROMPT, case.candidates, MAX_NEW_TOKENS)
        self.unfinished = set(range(case.requests))

    def run(self) -> list[float]:
        """Return the seconds of each step's scheduling."""
        seconds, stopping, in_flight = [], defaultdict(list), deque()
        begin = time.perf_counter()
        while (step := self.scheduler.schedule()) is not None:
            for slot, key, candidate, _ in step.admitted:
                stopping[len(seconds) + self.length_of[key, candidate] - 1].append(step.runs[slot])
            # A preempted candidate has no slot, and comes again as another run.
            in_flight.append([run.slot for run in stopping.pop(len(seconds), ()) if run.slot is not None])
            if len(in_flight) > self.scheduler.lag:
                self.unfinished.difference_update(self.scheduler.advance(in_flight.popleft()))
            end = time.perf_counter()
            seconds.append(end - begin)
            begin = end
        return seconds

    def wrong(self) -> int:
        """Return, after `run`, the number of unfinished requests and pages in use."""
        return len(self.unfinished) + self.scheduler.pool.used_pages


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for case in CASES[-1:] if smoke else CASES:
        shape = vars(case) | dict(page=PAGE_SIZE, prompt=PROMPT, new_tokens=MAX_NEW_TOKENS)
        makers = {f"scheduler, lag {lag}": partial(_made, case, lag) for lag in (0, 1)}
        yield task("scheduler", shape, makers, 1 if smoke else 5)


def _made(case: Case, lag: int) -> Provider:
    """Make a provider; `slow_step_seconds` is a step's 99 % quantile, and `growth` gives `late_over_early`."""
    engine = NullEngine(case, lag)
    steps = engine.run()
    told = {"slow_step_seconds": float(np.quantile(steps, 0.99)), "late_over_early": growth(steps)}
    told = {name: value for name, value in told.items() if value is not None}
    run = partial(lambda *arguments: NullEngine(*arguments).run(), case, lag)
    return Provider(f"scheduler, lag {lag}", run, engine.wrong(), 0, len(steps), told)


def growth(seconds: list[float]) -> float | None:
    """Return how much longer steps take after thousands of requests: the last fifth of a long run over its first.

    Only steps count in which candidates come and go: those before the first ones end, and those of the last, are left
    out. None for a run that has few others.
    """
    steady = seconds[2 * MAX_NEW_TOKENS : -MAX_NEW_TOKENS]
    if len(steady) < 10 * MAX_NEW_TOKENS:
        return None
    blocks = np.array(steady[: len(steady) // 100 * 100]).reshape(-1, 100).mean(1)
    part = len(blocks) // 5
    return float(np.median(blocks[-part:]) / np.median(blocks[:part]))
