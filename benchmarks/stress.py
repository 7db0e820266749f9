"""Stress of one engine: tasks of asyncio and threads, with faults planted in its steps, cancellations and timeouts.

`python -m benchmarks.stress --seconds 3600` (`make stress`) prints the outcomes of the requests, appends a row to
benchmarks/results/, and returns 1 if one was lost or wrong, if something hung, if pages were left or memory grew.
"""

import argparse
import asyncio
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.harness import RESULTS, Machine, folder_of, with_context, write_rows
from benchmarks.machine import process_memory
from clvp_fast import CandidateEngine, CandidateRequest, SamplingParams
from clvp_fast.engine.decode_loop import DecodeLoop
from clvp_fast.engine.door import Door
from clvp_fast.engine.requests import CandidateResult
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.work import Work


class Interrupt(BaseException):
    """As `KeyboardInterrupt`, of which asyncio would end with all its tasks: it reaches the main thread alone."""


TASKS, THREADS, KINDS = 64, 2, 12
# In how many of a thousand calls of each function a fault is raised.
_PLACES = {
    (Runner, "apply"): 3,
    (Runner, "decode"): 3,
    (DecodeLoop, "_read"): 3,
    (DecodeLoop, "add"): 3,
    (Work, "_sweep"): 1,
    (Door, "admit"): 10,
}
_FAULTS = (RuntimeError, MemoryError, OverflowError, KeyError, AssertionError, Interrupt)
# After memory ran out a batch stays smaller, so this happens only a few times.
_OUT_OF_MEMORY = 2
# No answer takes longer than this, however slow the machine is.
_BOUND = 600.0
# Fates of requests that a run must see before it ends.
_ENDS = ("right", "cancelled", "timed out", "given up")
# Memory may grow by this much: caches fill, and the heap has holes.
_FLAT = 64 * 2**20
_SAID = "planted by the stress"


class Stress:
    """One run. `ended` counts what became of requests; `wrong` has a sentence for each that it should not have."""

    def __init__(self, seconds: float, device: str = "cpu", seed: int = 0):
        self.seconds = seconds
        self.engine = CandidateEngine.from_pretrained("random", device=device, max_batch=16, max_new_tokens=24)
        samples = np.random.default_rng(0).standard_normal((2, 11025)).astype(np.float32) * 0.1
        self.voices = [
            self.engine.voice(CandidateRequest(text="x", audio=clip, sampling_rate=22050)) for clip in samples
        ]
        self.expected = [next(self.engine.generate(self._request(kind))) for kind in range(KINDS)]
        self.random = random.Random(seed)
        self._begun = 0.0
        self.ended: Counter[str] = Counter()
        self.planted: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.latencies: list[float] = []
        self.resident: list[int] = []

    def run(self) -> "Stress":
        self._begun = time.monotonic()
        with self._faults():
            threads = [threading.Thread(target=self._user, args=(seed,)) for seed in range(THREADS)]
            for thread in threads:
                thread.start()
            asyncio.run(self._all())
            for thread in threads:
                thread.join(_BOUND)
                if thread.is_alive():
                    self.wrong.append("a thread hangs")
        # The next call goes on, and then nothing is left.
        (last,) = self.engine.generate(self._request(0))
        self._judge(last, 0)
        work = self.engine._work
        if work.pending or not work.loop.idle or work.loop.scheduler.pool.used_pages:
            self.wrong.append(f"left: {len(work.pending)} requests, {work.loop.scheduler.pool.used_pages} pages")
        if self.grown > _FLAT:
            self.wrong.append(f"memory grew by {self.grown / 2**20:.0f} MiB")
        return self

    @property
    def going(self) -> bool:
        """Tell whether time is left, or something has still to happen that a slow machine takes longer for."""
        passed = time.monotonic() - self._begun
        return passed < self.seconds or (passed < _BOUND and not all(self.ended[way] for way in _ENDS))

    def row(self) -> dict:
        """Return, after `run`, the row for benchmarks/results/; its seconds are those of a request of the tasks."""
        low, median, high = (float(q) for q in np.quantile(self.latencies, [0.2, 0.5, 0.8]))
        return {
            "workload": "stress",
            "shape": {"tasks": TASKS, "threads": THREADS, "seconds": self.seconds, "model": "random"},
            "provider": "clvp_fast engine",
            "seconds": {"q20": low, "median": median, "q80": high, "repeats": len(self.latencies)},
            "ratio": 1.0,
            "compared_with": "clvp_fast engine",
            "error": float(len(self.wrong)),
            "grown_bytes": self.grown,
            "ended": {name: int(count) for name, count in sorted(self.ended.items())},
            "planted": sum(self.planted.values()),
            "absent": {},
        }

    def __str__(self) -> str:
        lines = [f"{self.seconds:.0f} s, {TASKS} tasks, {THREADS} threads; memory grew by {self.grown / 2**20:.1f} MiB"]
        for title, counts in (("ended", self.ended), ("planted", self.planted)):
            told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            lines.append(f"{title} {sum(counts.values())}: {told}")
        return "\n".join([*lines, f"wrong {len(self.wrong)}", *sorted(set(self.wrong))])

    @property
    def grown(self) -> int:
        """Resident bytes at the end beyond those after the first fifth, by which all buffers are made."""
        early, late = self.resident[len(self.resident) // 5 :], self.resident[-max(1, len(self.resident) // 5) :]
        return int(np.median(late) - np.median(early[: len(late)])) if early else 0

    def _request(self, kind: int, **options) -> CandidateRequest:
        sampling = SamplingParams(num_candidates=1 + kind % 3, max_new_tokens=3 + 7 * (kind % 4), seed=kind)
        return CandidateRequest(
            text=f"The birch canoe slid {kind}.", conditioning=self.voices[kind % 2], sampling=sampling, **options
        )

    def _judge(self, result, kind: int) -> None:
        """Count the outcome of a request; an outcome that neither its codes nor a fault explains is wrong."""
        if result.error is None:
            same = np.array_equal(result.codes, self.expected[kind].codes)
            self.ended["right"] += same
            if not same:
                self.wrong.append(f"other codes than undisturbed, of request {kind}")
        elif isinstance(result.error, TimeoutError):
            self.ended["timed out"] += 1
        elif _planted(result.error):
            self.ended["failed by a fault"] += 1
        else:
            self.wrong.append(f"{type(result.error).__name__}: {result.error}")

    async def _all(self) -> None:
        async def watch():
            while self.going:
                self.resident.append(process_memory("VmRSS"))
                await asyncio.sleep(min(1.0, self.seconds / 20))

        users = [asyncio.create_task(self._task(random.Random(seed))) for seed in range(100, 100 + TASKS)]
        await asyncio.gather(watch(), *users)

    async def _task(self, chosen: random.Random) -> None:
        while self.going:
            kind, way = chosen.randrange(KINDS), chosen.random()
            begun = time.perf_counter()
            try:
                if way < 0.15:
                    waiting = asyncio.create_task(self._ask(kind))
                    await asyncio.sleep(chosen.random() * 0.2)
                    waiting.cancel()
                    await asyncio.wait_for(asyncio.gather(waiting, return_exceptions=True), _BOUND)
                    self.ended["cancelled"] += 1
                elif way < 0.25:
                    await asyncio.wait_for(self._ask(kind), chosen.random() * 0.2)
                else:
                    timeout = chosen.random() * 0.2 if way < 0.4 else None
                    await asyncio.wait_for(self._ask(kind, timeout=timeout), _BOUND)
                    self.latencies.append(time.perf_counter() - begun)
            except TimeoutError:
                if time.perf_counter() - begun > _BOUND / 2:
                    self.wrong.append("a task hangs")
                self.ended["given up"] += 1
            except (Exception, Interrupt) as error:
                self._explain(error)

    async def _ask(self, kind: int, **options) -> None:
        results = [result async for result in self.engine.generate_async(self._request(kind, **options))]
        self._one(results, kind)

    def _one(self, results: list, kind: int) -> None:
        if len(results) != 1:
            self.wrong.append(f"{len(results)} results of one request")
        for result in results:
            self._judge(result, kind)

    def _user(self, seed: int) -> None:
        """Run a thread that takes results, streams, and stops midway."""
        chosen = random.Random(seed)
        while self.going:
            kind = chosen.randrange(KINDS)
            try:
                if chosen.random() < 0.7:
                    self._one(list(self.engine.generate(self._request(kind))), kind)
                    continue
                stream = self.engine.stream(self._request(kind))
                first = next(stream)  # of a request that failed before its first token, the result
                if not isinstance(first, CandidateResult) and chosen.random() < 0.5:
                    stream.close()
                    self.ended["cancelled"] += 1
                    continue
                *_, result = [first, *stream]
                self._judge(result, kind)
            except BaseException as error:
                self._explain(error)

    def _explain(self, error: BaseException) -> None:
        """Explain the error that ended a call: a fault that no request caused, or an interrupt."""
        if _planted(error) or _planted(error.__cause__):
            self.ended["call ended by a fault"] += 1
        else:
            self.wrong.append(f"{type(error).__name__}: {error}")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        with ExitStack() as stack:
            for (owner, name), share in _PLACES.items():
                around = self._faulty(getattr(owner, name), f"{owner.__name__}.{name}", share / 1000)
                stack.enter_context(patch.object(owner, name, around))
            yield

    def _faulty(self, function: Callable, name: str, share: float) -> Callable:
        def around(*args, **kwargs):
            drawn = self.random.random()
            if drawn < share:
                kind = self.random.choice(_FAULTS)
                if drawn < share / 4 and self.planted["OutOfMemoryError"] < _OUT_OF_MEMORY:
                    kind = torch.OutOfMemoryError
                self.planted[kind.__name__] += 1
                after = self.random.random() < 0.5
                if after:
                    function(*args, **kwargs)
                raise kind(f"{_SAID} in {name}")
            return function(*args, **kwargs)

        return around


def _planted(error: BaseException | None) -> bool:
    return error is not None and _SAID in str(error)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    arguments = parser.parse_args(argv)
    stress = Stress(arguments.seconds, arguments.device).run()
    print(stress, flush=True)
    machine = Machine.measure(arguments.device)
    command = " ".join(["python", "-m", "benchmarks.stress", *(sys.argv[1:] if argv is None else argv)])
    rows = with_context([stress.row()], machine, command)
    print(write_rows(rows, folder_of(machine, arguments.device, arguments.results)))
    return int(bool(stress.wrong))


if __name__ == "__main__":
    sys.exit(main())
