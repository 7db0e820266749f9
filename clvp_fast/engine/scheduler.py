"""Decides between decode steps, without a tensor, which candidate decodes in which slot and on which pages.

A request's prompt is its prefix: it is prefilled once into pages that all its candidates share by reference. The
candidate's own tokens, from the start token on, lie in pages of the candidate alone. So no page is written by two
candidates, and none has to be copied on write. Step s of a candidate (s = 0, 1, ...) stores its own token s and draws
token s + 1; its pages are allocated one at a time, when a step stores the first token of a page.

Candidates are admitted in the order of requests, then of their own indices. When pages run out, the one admitted last
is preempted: it starts again from its step 0 (and draws the same tokens, which depend only on seed, candidate and
step). So all running candidates are older than all waiting ones, and the oldest is never preempted: it always finishes.
`schedule` touches only candidates that change.
"""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, NamedTuple

from clvp_fast.engine.page_pool import PagePool

#: A request's name in the scheduler, of any hashable type.
Key = Any


class RequestTooLarge(ValueError):
    """A request that cannot fit, even alone."""


class Prefill(NamedTuple):
    """Write the `prefix_len` tokens of a prompt into `pages`, which row `prefix_row` of the prefix table will name."""

    key: Key
    prefix_row: int
    pages: list[int]
    prefix_len: int


class Admission(NamedTuple):
    """Start candidate `candidate` of request `key` in `slot`, at its step 0, after the prefix of `prefix_row`."""

    slot: int
    key: Key
    candidate: int
    prefix_row: int


@dataclass(eq=False, slots=True)
class Run:
    """One candidate from its admission until it finishes, is cancelled or is preempted; `slot` is None after that."""

    request: "_Request"
    candidate: int
    slot: int | None
    pages: list[int] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.request.key


@dataclass(eq=False, slots=True)
class Step:
    """The work before the next decode step, in the order of the fields; slots are numbered as before `moves`.

    freed_slots: no longer active (finished, cancelled or preempted); `admitted` may take some of them again.
    prefills: prompts to write into pages.
    admitted: candidates that start.
    new_pages: (slot, index in the slot's own table, page), for old and new candidates.
    moves: (source, target): the candidate in `source` continues in `target`, and `source` becomes inactive. Targets are
        inactive slots below all sources.
    num_slots: one past the highest active slot, after the moves.
    runs: `[num_slots]`, the candidate that decodes in each slot in this step; None for an inactive slot.
    """

    freed_slots: list[int] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    new_pages: list[tuple[int, int, int]] = field(default_factory=list)
    moves: list[tuple[int, int]] = field(default_factory=list)
    num_slots: int = 0
    runs: list[Run | None] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Request:
    """A request with waiting or running candidates; its prefix has pages from the first admission on."""

    key: Key
    prefix_len: int
    own_pages: int  # the most that one candidate needs
    waiting: deque[int]  # candidates, in order
    running: set[Run] = field(default_factory=set)
    prefix_row: int | None = None
    prefix_pages: list[int] = field(default_factory=list)


def batch_buckets(max_batch: int) -> list[int]:
    """Return the batch sizes that steps are captured for: 1, 2, 4, 8, 16, 32, 64, 96, ... and `max_batch`."""
    sizes = [1, 2, 4, 8, 16, *range(32, max_batch, 32)]
    return [size for size in sizes if size < max_batch] + [max_batch]


class Scheduler:
    """Schedule candidates of many requests in `max_batch` slots over `num_pages` pages of `page_size` tokens.

    Call `schedule`, decode, call `advance` with the slots that finished, and repeat until `schedule` returns None.

    Args:
        max_new_tokens_limit: the most tokens that a candidate may draw, for which the slots' tables have room.
        lag: 1: tokens are read a step late, so that `schedule` may be called once more before each `advance`.
    """

    def __init__(self, num_pages: int, page_size: int, max_batch: int, max_new_tokens_limit: int, lag: int = 0):
        if min(page_size, max_batch, max_new_tokens_limit) < 1 or lag not in (0, 1):
            raise ValueError(
                "page_size, max_batch and max_new_tokens_limit must be from 1 up and lag 0 or 1, "
                f"not {page_size}, {max_batch}, {max_new_tokens_limit} and {lag}"
            )
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.max_batch = max_batch
        self.max_new_tokens_limit = max_new_tokens_limit
        self.lag = lag
        self._requests: dict[Key, _Request] = {}
        self._waiting: OrderedDict[Key, _Request] = OrderedDict()  # requests with waiting candidates, in order
        self._running: dict[Run, None] = {}  # in the order of admission: the oldest first
        self._idle: set[_Request] = set()  # requests with a prefix in pages and no running candidate
        self._slots: list[Run | None] = [None] * max_batch
        self._free_slots = list(range(max_batch))  # a heap: the lowest slot is taken first
        self._free_prefix_rows = list(reversed(range(max_batch)))
        self._num_slots = 0
        self._freed: list[int] = []
        self._due: defaultdict[int, list[Run]] = defaultdict(list)  # by step, the runs whose last page is full then
        self._next = 0  # the number of the next step
        self._in_flight: deque[Step] = deque()
        self._crowded = False  # true after a preemption until pages are freed
        self._bucket = [0]  # the bucket of each number of slots
        for size in batch_buckets(max_batch):
            self._bucket += [size] * (size + 1 - len(self._bucket))

    def add(self, key: Key, prefix_len: int, num_candidates: int, max_new_tokens: int) -> None:
        """Queue a request after all others.

        Raises `RequestTooLarge` if not even one of its candidates could finish, and `ValueError` for a key that is in
        use or a count below 1.
        """
        if key in self._requests:
            raise ValueError(f"request {key!r} is still waiting or running: finish or cancel it first")
        if min(prefix_len, num_candidates, max_new_tokens) < 1:
            raise ValueError(
                "prefix_len, num_candidates and max_new_tokens must be from 1 up, "
                f"not {prefix_len}, {num_candidates} and {max_new_tokens}"
            )
        if max_new_tokens > self.max_new_tokens_limit:
            raise RequestTooLarge(
                f"max_new_tokens={max_new_tokens} is more than the {self.max_new_tokens_limit} that the engine was "
                "made for: ask for fewer, or make the engine with more"
            )
        prefix_pages, own_pages = self._pages(prefix_len), self._pages(max_new_tokens)
        if prefix_pages + own_pages > self.pool.num_pages:
            raise RequestTooLarge(
                f"a prompt of {prefix_len} tokens and one candidate of {max_new_tokens} need {prefix_pages} + "
                f"{own_pages} pages of {self.page_size} tokens, and there are {self.pool.num_pages}: ask for fewer new "
                "tokens, or give the engine more memory"
            )
        request = _Request(key, prefix_len, own_pages, deque(range(num_candidates)))
        self._requests[key] = self._waiting[key] = request

    def cancel(self, key: Key) -> None:
        """Forget a request in any state; its slots and pages are free at once.

        Raises `KeyError` for a request that neither waits nor runs.
        """
        if key not in self._requests:
            raise KeyError(f"there is no request {key!r} that waits or runs")
        request = self._requests[key]
        for run in list(request.running):
            self._stop(run)
        self._forget(request)
        self._crowded = False

    def schedule(self) -> Step | None:
        """Plan the work before the next decode step; return None if nothing waits or runs.

        Slots and pages that `advance` and `cancel` freed can be given out again here; the device uses them after the
        steps in flight. Raises `RuntimeError` if more than `lag` steps wait for their `advance`.
        """
        if len(self._in_flight) > self.lag:
            raise RuntimeError(f"{len(self._in_flight)} steps are in flight: call advance() first")
        step = Step()
        self._grow(step)
        self._admit(step)
        if not self._running:
            return None
        self._compact(step)
        step.freed_slots, self._freed = self._freed, []
        step.num_slots, step.runs = self._num_slots, self._slots[: self._num_slots]
        self._in_flight.append(step)
        self._next += 1
        return step

    def advance(self, finished_slots: Iterable[int]) -> list[Key]:
        """Remove the candidates that drew their last token in the oldest step in flight.

        Args:
            finished_slots: as numbered in that step. Slots without a candidate are skipped, and so are candidates that
                have finished or been cancelled or preempted since, whose tokens may be read late.

        Returns the keys of requests whose last candidate this was. Raises `RuntimeError` if no step is in flight.
        """
        if not self._in_flight:
            raise RuntimeError("no step is in flight: call schedule() first")
        runs = self._in_flight.popleft().runs
        ended = []
        for slot in finished_slots:
            run = runs[slot]
            if run is None or run.slot is None:
                continue
            self._stop(run)
            self._crowded = False
            request = run.request
            if not request.waiting and not request.running:
                self._forget(request)
                ended.append(request.key)
        return ended

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _grow(self, step: Step) -> None:
        """Give a page to every candidate whose last one is full, the oldest first."""

        def needy(runs):
            return [run for run in runs if run.slot is not None and len(run.pages) < run.request.own_pages]

        due = needy(self._due.pop(self._next, ()))
        while self.pool.free_pages < len(due):
            if self._idle:
                self._drop_idle()
            else:
                self._preempt()
                due = needy(due)
        self._give(step, due)

    def _admit(self, step: Step) -> None:
        """Fill free slots from the queue, in order, as long as there are pages."""
        admitted = []
        while self._waiting and self._free_slots and not self._crowded:
            request = next(iter(self._waiting.values()))
            started = request.prefix_row is not None
            if self.pool.free_pages < 1 + len(admitted) + (0 if started else self._pages(request.prefix_len)):
                break
            if not started:
                self._start(request, step)
            admitted.append(self._enter(request, step))
        self._give(step, admitted)

    def _start(self, request: _Request, step: Step) -> None:
        request.prefix_row = self._free_prefix_rows.pop()
        request.prefix_pages = self.pool.allocate(self._pages(request.prefix_len))
        step.prefills.append(Prefill(request.key, request.prefix_row, request.prefix_pages, request.prefix_len))

    def _enter(self, request: _Request, step: Step) -> Run:
        """Put the next waiting candidate of a request into the lowest free slot."""
        slot, row = heappop(self._free_slots), request.prefix_row
        assert row is not None  # `_start` gave it one
        run = Run(request, request.waiting.popleft(), slot)
        if not request.waiting:
            del self._waiting[request.key]
        self._idle.discard(request)
        request.running.add(run)
        self.pool.share(request.prefix_pages)
        self._running[run] = None
        self._slots[slot] = run
        self._num_slots = max(self._num_slots, slot + 1)
        step.admitted.append(Admission(slot, request.key, run.candidate, row))
        return run

    def _give(self, step: Step, runs: list[Run]) -> None:
        """Give one more page to each of `runs`, whose last page (if any) is full."""
        for run, page in zip(runs, self.pool.allocate(len(runs)), strict=True):
            assert run.slot is not None
            step.new_pages.append((run.slot, len(run.pages), page))
            run.pages.append(page)
        self._due[self._next + self.page_size] += runs

    def _preempt(self) -> None:
        """Put the youngest running candidate back at the front of the queue."""
        run = next(reversed(self._running))
        self._stop(run)
        request = run.request
        request.waiting.appendleft(run.candidate)
        self._waiting[request.key] = request
        self._waiting.move_to_end(request.key, last=False)
        self._crowded = True

    def _stop(self, run: Run) -> None:
        """Remove a candidate from its slot; the request keeps its own reference to the prefix."""
        request, slot = run.request, run.slot
        assert slot is not None
        self.pool.release(run.pages)
        self.pool.release(request.prefix_pages)
        del self._running[run]
        if not self._running:
            self._due.clear()  # else it would keep ended requests in memory
        request.running.discard(run)
        if not request.running:
            self._idle.add(request)
        self._slots[slot] = run.slot = None
        heappush(self._free_slots, slot)
        self._freed.append(slot)

    def _drop_idle(self) -> None:
        """Release prefixes that no running candidate uses; they are prefilled again when they are needed."""
        for request in list(self._idle):
            self._drop_prefix(request)

    def _drop_prefix(self, request: _Request) -> None:
        assert request.prefix_row is not None
        self.pool.release(request.prefix_pages)
        self._free_prefix_rows.append(request.prefix_row)
        request.prefix_pages, request.prefix_row = [], None
        self._idle.discard(request)

    def _forget(self, request: _Request) -> None:
        if request.prefix_row is not None:
            self._drop_prefix(request)
        self._waiting.pop(request.key, None)
        del self._requests[request.key]

    def _compact(self, step: Step) -> None:
        """Move the highest candidates into free slots below them, if the batch then fits a smaller bucket."""
        self._trim()
        active = len(self._running)
        if self._bucket[active] == self._bucket[self._num_slots]:
            return
        while self._num_slots > active:
            source, target = self._num_slots - 1, heappop(self._free_slots)
            run = self._slots[source]
            assert run is not None  # `_trim` left a candidate in the highest slot
            self._slots[source], self._slots[target], run.slot = None, run, target
            heappush(self._free_slots, source)
            step.moves.append((source, target))
            self._trim()

    def _trim(self) -> None:
        while self._num_slots and self._slots[self._num_slots - 1] is None:
            self._num_slots -= 1
