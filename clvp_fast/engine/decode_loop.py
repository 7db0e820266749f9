"""The loop that joins scheduler and runner: requests go in, and finished candidates come out, a step at a time.

On a GPU the host reads a step's tokens while the device computes the next one (a lag of 1), so that the device does not
wait for Python. The tokens of a candidate lie in a record, a line of one array. A record is kept after its candidate
ended, until no step that began with it is under way.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from clvp_fast.engine.runner import Runner, StepHandle
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scheduler import Scheduler, Step
from clvp_fast.models.clvp.kept import release_all


@dataclass(eq=False, repr=False)
class Job:
    """A request in the loop: its prompt, its parameters and its candidates' tokens; also its key in the scheduler.

    prompt: `[length, hidden_size]`, voice and text without the start token, on the device.
    sampling: its parameters, with seed and stop token set.
    codes: by candidate, int64 `[drawn]`, the stop token included where it came; None while it is being drawn.
    on_token: called once with each (candidate, token); with `states`, with (candidate, token, state).
    states: whether `on_token` also gets the decoder's state that the token was drawn from, `[hidden_size]` on the
        device.
    told: by candidate, how many of its tokens `on_token` has had. A candidate that restarts draws the same ones again.
    started_at: when its first candidate got a slot, in seconds of `time.perf_counter`.
    """

    prompt: torch.Tensor
    sampling: SamplingParams
    on_token: Callable[..., None] | None = None
    states: bool = False
    codes: list[np.ndarray | None] = field(init=False)
    told: list[int] = field(init=False)
    started_at: float | None = field(init=False)

    @property
    def done(self) -> bool:
        """Tell whether all of its candidates are drawn."""
        return all(codes is not None for codes in self.codes)

    def __post_init__(self):
        assert self.sampling.num_candidates is not None  # filled in where none were given
        self.told = [0] * self.sampling.num_candidates
        self.begin()

    def begin(self) -> None:
        """Forget all drawn tokens."""
        self.codes = [None] * len(self.told)
        self.started_at = None

    def all_codes(self) -> list[np.ndarray]:
        """Return the codes of all candidates of a job that is done."""
        return [codes for codes in self.codes if codes is not None]


class DecodeLoop:
    """Decodes the candidates of any number of jobs in one batch that changes from step to step.

    Args:
        runner: the data plane; its sizes are the scheduler's.
        lag: how many steps late the host reads tokens, 0 or 1; by default 1 on a GPU.
    """

    def __init__(self, runner: Runner, lag: int | None = None):
        self.lag = int(runner.device.type == "cuda") if lag is None else lag
        self._jobs: set[Job] = set()  # the jobs that the scheduler has
        self.finished: deque[Job] = deque()  # jobs that no caller has taken yet
        # Tokens for listeners: job, candidate, token, its number, and the decoder's state if the job asks for it.
        self._news: deque[tuple[Job, int, int, int, tuple[torch.Tensor, ...]]] = deque()
        self._begin(runner)

    def _begin(self, runner: Runner) -> None:
        self.runner: Runner | None = runner
        num_pages, page_size = runner.pages.data.shape[2:4]
        self.scheduler = Scheduler(num_pages, page_size, runner.max_batch, runner.max_new_tokens, self.lag)
        records = (self.lag + 1) * runner.max_batch
        self._codes = np.zeros((records, runner.max_new_tokens), dtype=np.int64)
        self._drawn = np.zeros(records, dtype=np.int64)
        self._live = np.zeros(records, dtype=bool)
        self._job_of_record: list[Job | None] = [None] * records  # the job of each record in use
        self._record_of_slot = np.full(runner.max_batch, -1)
        self._free_records = list(range(records))
        # By step: records whose candidate ended after the step began. They become free once that step is read.
        self._ended_since: deque[list[int]] = deque()
        # Each step with the handle of its tokens and the record of each of its slots.
        self._under_way: deque[tuple[Step, StepHandle, np.ndarray]] = deque()

    @property
    def decodes(self) -> bool:
        """Tell whether candidates wait or run."""
        return bool(self._jobs)

    @property
    def idle(self) -> bool:
        """Tell whether nothing is left to do."""
        return not self._jobs and not self.finished

    def add(self, job: Job) -> None:
        """Queue a job from its beginning, or as finished if all its candidates are drawn.

        Its tokens depend on its seed alone, so a job that was broken off draws the same ones again. Raises
        `RequestTooLarge` if it needs more pages than there are.
        """
        if job.done:
            self.finished.append(job)
        else:
            job.begin()
            self.scheduler.add(job, len(job.prompt), len(job.codes), job.sampling.max_new_tokens)
            self._jobs.add(job)

    def cancel(self, job: Job) -> None:
        """Drop a job in any state; do nothing for a job that was already returned."""
        self.finished = deque(finished for finished in self.finished if finished is not job)
        if job in self._jobs:
            self._jobs.remove(job)
            self.scheduler.cancel(job)
            for record, other in enumerate(self._job_of_record):
                if other is job:
                    self._end(record)

    def restart(self, runner: Runner) -> None:
        """Forget all jobs, and continue with a runner that holds no candidates.

        This uses nothing of earlier steps, so that it works after a step that broke off anywhere.
        """
        self._jobs, self.finished = set(), deque()
        self._begin(runner)

    def halve(self, places: int) -> int:
        """Release the runner, and what `generate()` has kept, after memory ran out; return half of `places` slots.

        `restart` gets a runner of that size. Call this after the `except` block, because the frames of the error hold
        the old runner, whose memory is needed. Raises `torch.OutOfMemoryError` if there was only one slot.
        """
        if places == 1:
            raise torch.OutOfMemoryError("there is too little memory to decode a single candidate: free some")
        self.runner = None
        release_all()
        return places // 2

    def step(self) -> list[Job]:
        """Decode one step of all running candidates, and return the jobs that are finished.

        An exception of a listener is raised; the next call then returns the jobs that were finished.
        """
        self.advance()
        self.tell()
        finished = list(self.finished)
        self.finished.clear()
        return finished

    def advance(self) -> None:
        """Decode one step. Finished jobs go to `finished`; drawn tokens wait for `tell`.

        After any exception `restart` must be called before the next step.
        """
        step, runner = self.scheduler.schedule(), self.runner
        assert runner is not None  # `restart` follows `halve`
        if step is not None:
            self._apply(runner, step)
            handle = runner.decode(step.num_slots)
            self._under_way.append((step, handle, self._record_of_slot[: step.num_slots].copy()))
        # After the last job no step needs to overlap another, and a step under way would keep that job in memory.
        while len(self._under_way) > (self.lag if step is not None and self._jobs else 0):
            self._read(runner, *self._under_way.popleft())

    def tell(self) -> None:
        """Pass tokens to listeners in the order of drawing; a listener may cancel its request, and its error is raised.

        A candidate that restarts draws the same tokens; each is passed on only once.
        """
        while self._news:
            job, candidate, token, count, state = self._news.popleft()
            if job.on_token is not None and count > job.told[candidate]:
                job.told[candidate] = count
                job.on_token(candidate, token, *state)

    def _apply(self, runner: Runner, step: Step) -> None:
        """Bring the scheduler's changes to the device and to the records."""
        runner.apply(
            step,
            prompts={prefill.key: prefill.key.prompt for prefill in step.prefills},
            params={admission.key: admission.key.sampling for admission in step.admitted},
        )
        while len(self._ended_since) > self.lag:
            self._free_records += self._ended_since.popleft()
        for slot in step.freed_slots:
            record = self._record_of_slot[slot]
            if record >= 0 and self._live[record]:
                self._end(int(record))  # preempted: the candidate starts again in another record
            self._record_of_slot[slot] = -1
        for admission in step.admitted:
            job, record = admission.key, self._free_records.pop()
            job.started_at = job.started_at or time.perf_counter()
            self._job_of_record[record] = job
            self._drawn[record], self._live[record], self._record_of_slot[admission.slot] = 0, True, record
        for source, target in step.moves:
            self._record_of_slot[target], self._record_of_slot[source] = self._record_of_slot[source], -1
        self._ended_since.append([])

    def _end(self, record: int) -> None:
        self._live[record], self._job_of_record[record] = False, None
        (self._ended_since[-1] if self._ended_since else self._free_records).append(record)

    def _read(self, runner: Runner, step: Step, handle: StepHandle, records: np.ndarray) -> None:
        """Write the tokens of a step into the records that it was made for."""
        slots = np.flatnonzero(records >= 0)
        slots = slots[self._live[records[slots]]]  # a candidate that ended meanwhile drew one token too many
        records, tokens, ended = records[slots], runner.tokens(handle)[slots], runner.finished(handle)[slots]
        self._codes[records, self._drawn[records]] = tokens
        self._drawn[records] += 1
        if any(job.on_token is not None for job in self._jobs):
            for slot, token, count in zip(slots.tolist(), tokens.tolist(), self._drawn[records].tolist(), strict=True):
                run = step.runs[slot]
                if run.key.on_token is not None:
                    state = (runner.state(run.slot, count - 1),) if run.key.states else ()
                    self._news.append((run.key, run.candidate, token, count, state))
        for slot, record in zip(slots[ended].tolist(), records[ended].tolist(), strict=True):
            run, drawn = step.runs[slot], int(self._drawn[record])
            job: Job = run.key
            job.codes[run.candidate] = self._codes[record, :drawn].copy()
            self._end(record)
        ended = self.scheduler.advance(slots[ended].tolist())
        self._jobs.difference_update(ended)
        self.finished += ended
