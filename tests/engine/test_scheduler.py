"""The scheduler against a null device that writes and reads every token of every page, under any order of events."""

import pytest

from clvp_fast.engine.scheduler import Admission, Prefill, RequestTooLarge, Scheduler, batch_buckets
from tests.engine.null_engine import Engine
from tests.kit.tracing import traced_by

pytest.importorskip("hypothesis")  # which a GPU machine may lack

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule


class AnyOrder(RuleBasedStateMachine):
    """Requests come, stop, are cancelled and run out of pages, in any order."""

    @initialize(
        num_pages=st.integers(2, 14),
        page_size=st.integers(1, 4),
        max_batch=st.integers(1, 9),
        limit=st.integers(1, 14),
        lag=st.integers(0, 1),
    )
    def build(self, **sizes):
        self.engine = Engine(**sizes)

    @rule(data=st.data(), prefix_len=st.integers(1, 9))
    def add(self, data, prefix_len):
        scheduler = self.engine.scheduler
        most = data.draw(st.integers(1, scheduler.max_new_tokens_limit))
        lengths = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=6))
        needed = -(-prefix_len // scheduler.page_size) - (-most // scheduler.page_size)
        if needed > scheduler.pool.num_pages:
            with pytest.raises(RequestTooLarge):
                self.engine.add(prefix_len, lengths, most)
        else:
            self.engine.add(prefix_len, lengths, most)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def cancel(self, data):
        self.engine.cancel(data.draw(st.sampled_from(sorted(self.engine.requests))))

    @rule(count=st.integers(1, 5), only=st.booleans())
    def run(self, count, only):
        for _ in range(count):
            self.engine.step(only)

    @precondition(lambda self: self.engine.in_flight)
    @rule(only=st.booleans())
    def read_early(self, only):
        self.engine.advance(only)

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.finish()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


@st.composite
def tight_engines(draw):
    """Draw requests that are all there from the start, over hardly more pages than the largest needs."""
    page_size, max_batch, lag = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 1))
    requests = draw(
        st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 8), min_size=1, max_size=5)), min_size=1)
    )
    largest = max(-(-prefix // page_size) - (-max(lengths) // page_size) for prefix, lengths in requests)
    engine = Engine(largest + draw(st.integers(0, 6)), page_size, max_batch, 8, lag)
    for prefix, lengths in requests:
        engine.add(prefix, lengths, max(lengths))
    return engine


@settings(max_examples=200, deadline=None)
@given(tight_engines())
def test_all_come_to_their_end_over_few_pages(engine):
    assert sorted(engine.finish().ended) == sorted(engine.order)


def run(step):
    return [(r.key, r.candidate) if r else None for r in step.runs]


def test_a_prompt_is_prefilled_once_and_shared():
    scheduler = Scheduler(num_pages=20, page_size=4, max_batch=8, max_new_tokens_limit=8)
    scheduler.add("a", prefix_len=5, num_candidates=2, max_new_tokens=8)
    scheduler.add("b", prefix_len=4, num_candidates=1, max_new_tokens=1)
    step = scheduler.schedule()
    (a, row_a, pages_a, _), (b, row_b, pages_b, _) = step.prefills
    assert step.prefills == [Prefill("a", row_a, pages_a, 5), Prefill("b", row_b, pages_b, 4)]
    assert (len(pages_a), len(pages_b), row_a != row_b) == (2, 1, True)
    assert step.admitted == [Admission(0, a, 0, row_a), Admission(1, a, 1, row_a), Admission(2, b, 0, row_b)]
    assert [(slot, index) for slot, index, _ in step.new_pages] == [(0, 0), (1, 0), (2, 0)]
    assert [scheduler.pool.references(page) for page in pages_a + pages_b] == [3, 3, 2]
    assert (step.num_slots, step.freed_slots, step.moves) == (3, [], [])
    assert scheduler.advance([2]) == ["b"] and scheduler.pool.used_pages == 4


def test_a_page_comes_when_a_step_needs_it():
    engine = Engine(num_pages=20, page_size=4, max_batch=8, limit=9, lag=0)
    engine.add(3, [9], max_new_tokens=9)
    grown = []
    while engine.step():
        grown.append(engine.scheduler.pool.used_pages)
    assert grown == [2, 2, 2, 2, 3, 3, 3, 3, 0]  # read after `advance`: the last step gives all back


@pytest.mark.parametrize("lag", [0, 1])
def test_the_queue_takes_the_slots_of_those_who_stop(lag):
    engine = Engine(num_pages=50, page_size=4, max_batch=2, limit=20, lag=lag)
    engine.add(3, [2, 6, 2, 2], max_new_tokens=20)
    running = []
    while engine.step():
        running.append({r.candidate for r in engine.scheduler._running})
    engine.finish()
    assert engine.prefills == 1 and engine.preemptions == 0
    if lag == 0:
        assert running == [{0, 1}, {1}, {1, 2}, {1}, {1, 3}, set()]


@pytest.mark.parametrize("lag", [0, 1])
def test_no_slot_stays_empty_while_pages_suffice(lag):
    engine = Engine(num_pages=100, page_size=2, max_batch=5, limit=9, lag=lag)
    for first in range(6):
        engine.add(1 + first, [1 + (first * i) % 9 for i in range(7)], max_new_tokens=9)
    while engine.requests:
        left = sum(map(len, engine.requests.values())) - sum(key in engine.requests for key, _ in engine.accepted)
        engine.schedule()
        assert len(engine.scheduler._running) == min(5, left)
        while len(engine.in_flight) > lag:
            engine.advance()
    assert engine.prefills == 6


@pytest.mark.parametrize("lag", [0, 1])
def test_the_youngest_makes_room_and_starts_again(lag):
    engine = Engine(num_pages=7, page_size=2, max_batch=4, limit=6, lag=lag)
    engine.add(2, [6, 6, 6], max_new_tokens=6)  # 1 + 3 * 3 pages of 7
    engine.finish()
    assert engine.ended == ["request 0"] and engine.preemptions > 0 and engine.prefills == 1


def test_a_preempted_candidate_waits_for_pages():
    engine = Engine(num_pages=5, page_size=2, max_batch=4, limit=8, lag=0)
    engine.add(1, [8, 8], max_new_tokens=8)  # 1 + 2 * 4 pages of 5: the two meet at 2 pages each
    while engine.step():
        pass
    assert engine.preemptions == 1


def test_nothing_is_preempted_where_pages_suffice():
    engine = Engine(num_pages=2 + 6 * 5, page_size=4, max_batch=6, limit=20, lag=1)
    engine.add(7, [20] * 6, max_new_tokens=20)
    engine.finish()
    assert engine.preemptions == 0 and engine.prefills == 1


@pytest.mark.parametrize("lag", [0, 1])
def test_an_idle_prompt_gives_way_to_the_oldest(lag):
    """Preempt the second request's only candidate, and take the pages of its prompt for the first."""
    engine = Engine(num_pages=5, page_size=1, max_batch=2, limit=4, lag=lag)
    engine.add(1, [4], max_new_tokens=4)
    engine.add(1, [4], max_new_tokens=4)
    engine.finish()
    assert engine.ended == ["request 0", "request 1"]
    assert (engine.preemptions, engine.prefills) == (1, 3)


@pytest.mark.parametrize("lag", [0, 1])
def test_cancelling_frees_whatever_a_request_has(lag):
    engine = Engine(num_pages=30, page_size=4, max_batch=3, limit=12, lag=lag)
    half_done, running, waiting = (engine.add(5, lengths, 12) for lengths in ([1, 9], [9, 9, 9], [9]))
    engine.step(), engine.step()
    assert {r.key for r in engine.scheduler._running} == {half_done, running}
    for key in (waiting, half_done, running):
        engine.cancel(key)
        with pytest.raises(KeyError, match=f"there is no request '{key}' that waits or runs"):
            engine.scheduler.cancel(key)
    assert engine.scheduler.pool.used_pages == 0
    again = engine.add(5, [2, 3], 12, key=half_done)
    assert engine.finish().ended == [again]


def test_cancelling_lets_in_whom_it_had_no_room_for():
    engine = Engine(num_pages=5, page_size=1, max_batch=2, limit=4, lag=0)
    oldest, preempted = engine.add(1, [4], max_new_tokens=4), engine.add(1, [4], max_new_tokens=4)
    engine.step(), engine.step()
    assert engine.preemptions == 1
    engine.cancel(oldest)
    assert engine.finish().ended == [preempted]


def test_a_late_token_of_one_who_left_is_passed_over():
    scheduler = Scheduler(num_pages=20, page_size=4, max_batch=1, max_new_tokens_limit=8, lag=1)
    scheduler.add("a", 1, num_candidates=1, max_new_tokens=8)
    scheduler.add("b", 1, num_candidates=1, max_new_tokens=8)
    scheduler.schedule(), scheduler.schedule()
    assert scheduler.advance([0]) == ["a"]
    step = scheduler.schedule()
    assert (step.freed_slots, run(step)) == ([0], [("b", 0)])
    assert scheduler.advance([0]) == []  # of the step in which "a" was done already
    assert scheduler.advance([0]) == ["b"]
    assert scheduler.schedule() is None


def test_steps_in_flight_are_as_many_as_the_lag():
    for lag in (0, 1):
        scheduler = Scheduler(num_pages=4, page_size=4, max_batch=1, max_new_tokens_limit=8, lag=lag)
        with pytest.raises(RuntimeError, match="no step is in flight: call schedule"):
            scheduler.advance([])
        scheduler.add("a", 1, num_candidates=1, max_new_tokens=8)
        for _ in range(lag + 1):
            scheduler.schedule()
        with pytest.raises(RuntimeError, match=f"{lag + 1} steps are in flight: call advance"):
            scheduler.schedule()


def test_the_batch_shrinks_to_a_smaller_bucket_when_it_can():
    scheduler = Scheduler(num_pages=100, page_size=16, max_batch=16, max_new_tokens_limit=16)
    scheduler.add("a", 1, num_candidates=10, max_new_tokens=16)
    assert scheduler.schedule().num_slots == 10
    scheduler.advance([3])
    step = scheduler.schedule()  # 9 of 10 slots: the bucket of 16 stays
    assert (step.moves, step.num_slots, step.freed_slots) == ([], 10, [3])
    scheduler.advance([8])
    step = scheduler.schedule()
    assert (step.moves, step.num_slots) == ([(9, 3)], 8)
    assert run(step) == [("a", i) for i in (0, 1, 2, 9, 4, 5, 6, 7)]
    scheduler.advance([0, 1, 2, 4])
    step = scheduler.schedule()
    assert (step.moves, step.num_slots) == ([(7, 0), (6, 1), (5, 2)], 4)


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (16, [1, 2, 4, 8, 16]),
        (40, [1, 2, 4, 8, 16, 32, 40]),
        (128, [1, 2, 4, 8, 16, 32, 64, 96, 128]),
    ],
)
def test_buckets(max_batch, sizes):
    assert batch_buckets(max_batch) == sizes


def test_a_request_too_large_is_refused_with_sizes():
    scheduler = Scheduler(num_pages=10, page_size=4, max_batch=2, max_new_tokens_limit=30)
    scheduler.add("fits", prefix_len=12, num_candidates=100, max_new_tokens=28)
    with pytest.raises(RequestTooLarge, match=r"13 tokens and one candidate of 28 need 4 \+ 7 pages of 4 .* 10"):
        scheduler.add("b", prefix_len=13, num_candidates=1, max_new_tokens=28)
    with pytest.raises(RequestTooLarge, match="max_new_tokens=31 is more than the 30"):
        scheduler.add("b", prefix_len=1, num_candidates=1, max_new_tokens=31)
    with pytest.raises(ValueError, match="request 'fits' is still waiting or running"):
        scheduler.add("fits", prefix_len=1, num_candidates=1, max_new_tokens=1)
    for wrong in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be from 1 up, not {}, {} and {}".format(*wrong)):
            scheduler.add("b", *wrong)
    for wrong in ((0, 1, 1, 0), (1, 0, 1, 0), (1, 1, 0, 0), (1, 1, 1, 2)):
        with pytest.raises(ValueError, match="from 1 up and lag 0 or 1, not {}, {}, {} and {}".format(*wrong)):
            Scheduler(10, *wrong)
    assert issubclass(RequestTooLarge, ValueError) and scheduler.schedule().admitted[0].key == "fits"


def opcodes(call):
    """Count the bytecode instructions of a call, without loops of the interpreter's own."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    with traced_by(trace):
        call()
    return count


def test_a_step_in_which_nothing_happens_costs_the_same_for_any_number():
    costs = set()
    for candidates in (4, 256):
        scheduler = Scheduler(num_pages=2000, page_size=16, max_batch=256, max_new_tokens_limit=64)
        scheduler.add("a", 1, candidates, max_new_tokens=64)
        scheduler.add("b", 1, 5000, max_new_tokens=64)
        scheduler.schedule(), scheduler.advance([])
        costs.add((opcodes(scheduler.schedule), opcodes(lambda scheduler=scheduler: scheduler.advance([]))))
    assert len(costs) == 1 and 0 < max(costs)[0] < 1000
