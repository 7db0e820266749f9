"""A step of the engine is a transaction: after any exception in it, the next step works.

Only the pending requests, with the codes that their jobs have drawn, have to survive an exception. Scheduler, pages,
slots and steps under way follow from them: after a step that broke off they are discarded and made again, and
candidates draw the same codes again. So nothing is repaired while an exception is handled, during which another may
come, and no type of exception has to be guessed.

A request that fails step after step is found by bisection: the requests under way are decoded in two groups, a group
that fails in two smaller ones, and the request that fails alone gets the exception as its error.
"""

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from clvp_fast.engine.calls import Call, Pending
from clvp_fast.engine.decode_loop import DecodeLoop, Job
from clvp_fast.engine.memory import MemoryPlan
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.results import Latents, ResultUnderWay
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.scheduler import RequestTooLarge
from clvp_fast.engine.scoring import Scorer

# The search for a failing request begins after so many broken steps, because most faults come only once.
_BROKEN_STEPS = 2


class Work:
    """The requests of all calls, and the batch that they are decoded in.

    Call `warm_up`, `step` and `settle` from one thread at a time; the others from any.

    Args:
        scorer: ranks candidates.
        plan: returns the sizes for a number of candidates at once.
        make_runner: makes the runner of a plan.
        max_batch: the number of candidates of the first plan.
        latents: makes a candidate's latents from its prompt, its codes and the length that they are filled up to; None:
            results have none.
    """

    def __init__(
        self,
        scorer: Scorer,
        plan: Callable[[int | None], MemoryPlan],
        make_runner: Callable[[MemoryPlan], Runner],
        max_batch: int | None,
        latents: Latents | None = None,
    ):
        self.scorer = scorer
        self.latents = latents
        self._plan, self._make_runner = plan, make_runner
        self.memory = plan(max_batch)
        self.loop = DecodeLoop(make_runner(self.memory))
        self.pending: dict[Pending, None] = {}  # in the order of submission
        self.steps = 0  # the number of steps that ended well
        self._entered: dict[Job, Pending] = {}  # the jobs in the loop, until they have their results
        self._ranking: deque[ResultUnderWay] = deque()
        self._groups: list[list[Pending]] = []  # only the first group is decoded, while there are any
        self._torn = False  # true while the loop is being changed
        self._warm = False

    @property
    def has_room(self) -> bool:
        """Tell whether fewer candidates wait than decode at once."""
        jobs = [pending.job for pending in list(self.pending) if not pending.settled]
        return sum(len(job.codes) for job in jobs if job.started_at is None) < self.memory.max_batch

    def drop(self, request: CandidateRequest) -> None:
        """Mark a request as dropped. Its slots are free after `settle`, or at the end of the step under way."""
        for pending in list(self.pending):
            if pending.request is request:
                pending.dropped = True

    def take(self, call: Call) -> list[CandidateResult]:
        """Return the results of a call that have come since the last time."""
        settled = [pending for pending in list(call.owed) if pending.settled]
        for pending in settled:
            self.pending.pop(pending, None)
            del call.owed[pending]
        return [pending.result for pending in settled if pending.result is not None and not pending.dropped]

    @property
    def is_settled(self) -> bool:
        """Tell whether every pending request has a caller that waits for it."""
        return not any(pending.dropped or pending.abandoned for pending in list(self.pending))

    def settle(self) -> None:
        """Free the slots and pages of requests that nobody waits for."""
        if self.loop.runner is None:
            return  # nothing is held; the next step makes a runner, which takes long
        with self._changing():
            self._sweep()

    def check_weights(self) -> None:
        """Raise an error if the next steps would not use the model's current weights, or would not be deterministic.

        It is `ValueError` for weights that `refresh` has to read again, and `RuntimeError` if a `deterministic` engine
        cannot be so on the forced backend.
        """
        runner = self.loop.runner
        if runner is not None:
            runner.require_kernel()
        if (found := self.outdated()) is not None:
            raise ValueError(f"{found}: call engine.refresh(), which renews everything made from the weights")

    def outdated(self) -> str | None:
        """Return why `check_weights` would refuse the weights, as the beginning of a sentence, or None."""
        runner = self.loop.runner
        return None if runner is None else runner.outdated()

    def require_idle(self) -> None:
        """Raise `RuntimeError` while requests are under way."""
        self.settle()
        if waiting := sum(not pending.settled for pending in list(self.pending)):
            raise RuntimeError(
                f"refresh() is for an engine that decodes nothing, and requests are under way ({waiting}), begun with "
                "the weights as they were: wait for their results or cancel them, and call it again"
            )

    def renew(self) -> None:
        """Plan and make a new runner while nothing is under way, and warm it up if the old one was warm."""
        self.loop.runner, self._torn = None, True  # first, because the new runner needs the memory of the old one
        self.memory = self._plan(self.memory.max_batch)
        self._mend()

    def warm_up(self, progress: Callable[[int, int], None] | None) -> None:
        self._mend()
        assert self.loop.runner is not None
        self.loop.runner.warm_up(progress)
        self._warm = True

    @torch.inference_mode()
    def step(self) -> None:
        """Run one step of the whole batch, and give finished, timed out and failed requests their results.

        Raises `torch.OutOfMemoryError` if there is too little memory for a single candidate, and any exception for
        which no request can be blamed, such as the failure to make an empty batch.
        """
        failure, memory_ran_out = None, False
        try:
            self._mend()
            failure = self._attempt()
        except torch.OutOfMemoryError:
            memory_ran_out = True
        # Not in the `except` block, where the error's frames hold the runner whose memory is needed.
        if memory_ran_out:
            self._shrink()
        elif failure is not None:
            self._mend()  # first: if the device itself is lost this raises, and no request is to blame
            self._blame(failure)
        self.steps += 1

    def _attempt(self) -> Exception | None:
        """Run a step, and return the error that broke it off (perhaps caused by a request), or None."""
        try:
            with self._changing():
                self._sweep()
                self._enter()
                self.loop.advance()
            self.loop.tell()
            self._rank()
            with self._changing():
                self._sweep()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return error
        return None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Mark the loop as torn during a change of it, and for good if the change raises."""
        self._mend()
        self._torn = True
        yield
        self._torn = False

    def _mend(self) -> None:
        """Start over with nothing under way and no slot or page taken, if an earlier change broke off."""
        if not self._torn:
            return
        runner = self.loop.runner
        if runner is None:
            runner = self._make_runner(self.memory)
            if self._warm:
                runner.warm_up()
        else:
            runner.reset()
        self._entered = {}
        self._ranking.clear()
        self.loop.restart(runner)
        self._torn = False

    def _sweep(self) -> None:
        """Release requests that have their result, are out of time, or were dropped."""
        now = time.perf_counter()
        for pending in list(self.pending):
            if pending.abandoned:
                pending.dropped = True
            elif not pending.settled and now > pending.deadline:
                timeout = pending.request.timeout
                pending.fail(TimeoutError(f"the request was not finished within its timeout of {timeout:g} s"))
            if pending.settled and self._entered.pop(pending.job, None) is not None:
                self.loop.cancel(pending.job)
            if pending.dropped:
                self.pending.pop(pending, None)

    def _enter(self) -> None:
        """Bring pending requests into the loop; during the search for a failing one, only those of the first group."""
        while self._groups and all(pending.settled for pending in self._groups[0]):
            self._groups = self._groups[1:]
        for pending in self._under_way():
            if pending.job not in self._entered:
                try:
                    self.loop.add(pending.job)
                except RequestTooLarge as error:
                    pending.fail(error)
                else:
                    self._entered[pending.job] = pending

    def _under_way(self) -> list[Pending]:
        group = self._groups[0] if self._groups else list(self.pending)
        return [pending for pending in group if not pending.settled]

    def _blame(self, error: Exception) -> None:
        """Narrow the search for the request that breaks off steps, and fail that request once it is found."""
        traceback.clear_frames(error.__traceback__)  # the frames would hold a runner for as long as the error is kept
        suspects = [pending for pending in self._under_way() if not pending.job.done]
        if not suspects:
            raise error
        for pending in suspects:
            pending.broken_steps += 1
        if max(pending.broken_steps for pending in suspects) < _BROKEN_STEPS:
            return
        if len(suspects) == 1:
            suspects[0].fail(error)
        else:
            half = len(suspects) // 2
            self._groups = [suspects[:half], suspects[half:], *self._groups[1:]]

    def _shrink(self) -> None:
        """Continue with half the batch after memory ran out; requests under way start again and get the same codes."""
        self.memory = self._plan(self.loop.halve(self.memory.max_batch))

    def _rank(self) -> None:
        """Begin to rank finished jobs, and give those whose ranking has arrived their results.

        The host waits for a ranking only if there is nothing else to decode, because steps that it does not queue
        meanwhile are missing on the device. An error of the scorer (perhaps the caller's) fails only its request.
        """
        while self.loop.finished:
            job = self.loop.finished[0]
            pending = self._entered.get(job)
            if pending is not None and not pending.settled:
                under_way = ResultUnderWay(pending, job)
                try:
                    under_way.rank(self.scorer)
                    self._ranking.append(under_way)
                except Exception as error:
                    pending.result = CandidateResult(pending.request, error=error)
            self.loop.finished.popleft()
        while self._ranking and (self._ranking[0].arrived or not self.loop.decodes):
            ranking = self._ranking[0]
            if not ranking.pending.settled:
                try:
                    ranking.pending.result = ranking.finish(self.latents)
                except Exception as error:
                    ranking.pending.result = CandidateResult(ranking.pending.request, error=error)
            self._ranking.popleft()
