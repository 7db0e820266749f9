"""Streams, cancelling, timeouts, threads and tasks: what is given up leaves nothing, the others lose nothing."""

import asyncio
import gc
import sys
import threading
import time
from weakref import WeakSet

import numpy as np
import pytest
import torch

from clvp_fast.engine.decode_loop import DecodeLoop
from clvp_fast.engine.work import Work
from tests.engine.null_runner import NullRunner, asked, codes, null_engine, null_request
from tests.engine.small_engine import assert_empty, assert_same, make, request, sampling
from tests.kit.waiting import BOUND, join, wait_for


def test_a_stream_given_up_midway_frees_its_request_alone(engine, alone):
    others = {request(index, sampling=sampling(index)): index for index in (3, 11)}
    iterator = engine.generate(others)
    results = [next(iterator)]
    given_up = request(7)
    stream = engine.stream(given_up, sampling(7))
    for candidate, token in (next(stream) for _ in range(2)):
        assert token == alone[7].codes[candidate, 0]
    stream.close()
    assert given_up not in [pending.request for pending in engine._work.pending]
    results += iterator
    assert len(results) == 2
    for result in results:
        assert_same(result, alone[others[result.request]])
    assert_empty(engine)


def test_streams_take_turns(engine, alone):
    """Let each stream report its own tokens in the order of drawing, though either one decodes both."""
    streams = {index: engine.stream(request(index), sampling(index)) for index in (7, 8)}
    told, results = {7: [], 8: []}, {}
    while streams:
        for index, stream in list(streams.items()):
            item = next(stream)
            if isinstance(item, tuple):
                told[index].append(item)
            else:
                results[index] = item
                del streams[index]
    for index, result in results.items():
        assert_same(result, alone[index])
        for candidate, length in enumerate(result.lengths):
            tokens = [token for one, token in told[index] if one == candidate]
            assert tokens[:length] == result.codes[candidate, :length].tolist()
    assert_empty(engine)


def test_a_stream_of_a_bad_request_is_its_error(engine):
    (result,) = engine.stream(request(0, sampling=sampling(max_new_tokens=25)))
    assert "max_new_tokens=25" in str(result.error)
    *_, result = engine.stream(request(0, timeout=1e-6), sampling(3))
    assert isinstance(result.error, TimeoutError)
    assert_empty(engine)


def test_cancelling_what_waits_what_is_done_and_what_never_came(parts, alone):
    engine = make(parts, max_batch=2)
    asked = [request(index, sampling=sampling(index)) for index in (3, 7, 8)]
    iterator = engine.generate(asked)
    engine.cancel(asked[0])  # nothing has begun: an iteration takes its requests when it is asked for results
    first = next(iterator)
    assert first.request is asked[0]
    engine.cancel(asked[0])
    engine.cancel(request(3))
    engine.cancel(asked[2])
    rest = list(iterator)
    assert [result.request for result in rest if result.request is not asked[2]] == [asked[1]]
    assert_same(rest[0], alone[7])
    assert_empty(engine)


def test_one_request_object_given_twice(engine, alone):
    twice = request(5, sampling=sampling(5))
    results = list(engine.generate([twice, twice]))
    assert [result.request for result in results] == [twice, twice]
    for result in results:
        assert_same(result, alone[5])
    assert list(engine.generate([twice, twice], on_token=lambda *_: engine.cancel(twice))) == []
    assert_empty(engine)


def test_a_timeout_in_the_queue(parts, alone):
    """Fail a waiting request in its time, and not those before it."""
    engine = make(parts, max_batch=1)
    waiting = request(0, sampling=sampling(8), timeout=0.02)
    running = request(3, sampling=sampling(3))
    results = {}
    for result in engine.generate([running, waiting], on_token=lambda *_: time.sleep(0.005)):
        results[result.request] = result
    assert [*results] == [waiting, running]
    assert_same(results[running], alone[3])
    assert isinstance(results[waiting].error, TimeoutError) and results[waiting].timings["queue"] > 0.02
    assert_empty(engine)


def test_requests_that_raise_free_what_came_before(engine):
    def broken():
        yield request(7, sampling=sampling(7))
        raise RuntimeError("the caller's own mistake")

    with pytest.raises(RuntimeError, match="own mistake"):
        list(engine.generate(broken()))
    assert_empty(engine)


def test_threads_share_one_batch(parts, alone):
    """Many threads that submit, cancel and give up at once; threads change places as often as they can."""
    engine, failures, served = make(parts, max_batch=6), [], []

    def user(number):
        try:
            for turn in range(4):
                index = (5 * number + turn) % 12
                iterator = engine.generate(request(index), sampling(index))
                if (number + turn) % 4 == 3:
                    engine.cancel(request(index))
                    iterator.close()
                    continue
                (result,) = iterator
                assert_same(result, alone[index])
                served.append(index)
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=user, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        join(*threads)
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures
    assert len(served) == 18
    assert_empty(engine)


def test_a_task_that_stops_iterating_frees_its_requests(engine, alone):
    async def first_of_many():
        results = engine.generate_async(request(index, sampling=sampling(index)) for index in range(9))
        async for result in results:
            await results.aclose()
            return result

    result = asyncio.run(first_of_many())
    assert result.error is None
    assert_empty(engine)


def test_errors_reach_their_task_alone(engine, alone):
    async def one(asked, settings):
        return [result async for result in engine.generate_async(asked, settings)]

    async def both():
        bad = one(request(0), sampling(max_new_tokens=25))
        return await asyncio.gather(bad, one(request(4), sampling(4)))

    (bad,), (good,) = asyncio.run(both())
    assert "max_new_tokens=25" in str(bad.error)
    assert_same(good, alone[4])
    assert_empty(engine)


def test_a_stream_that_is_cancelled_elsewhere_ends(engine):
    asked = request(7)
    stream = engine.stream(asked, sampling(7))
    drawn = [next(stream) for _ in range(2)]
    engine.cancel(asked)
    drawn += stream
    assert all(isinstance(item, tuple) for item in drawn)
    assert_empty(engine)


def test_a_result_that_another_thread_finishes_is_not_lost(engine, alone, monkeypatch):
    """Decode to the end between two looks at the pending requests."""
    take = Work.take

    def late(work, call):
        results = take(work, call)
        while not work.loop.idle:
            engine._turns.take(work.step)
        return results

    monkeypatch.setattr(Work, "take", late)
    (result,) = engine.generate(request(5), sampling(5))
    assert_same(result, alone[5])


def test_a_cancelled_task_frees_its_requests_and_no_other_s(engine, alone):
    """Cancel it while a thread decodes for it, which stops soon after."""
    heard, delivered = [], threading.Event()

    def listen(*token):
        heard.append(token)
        delivered.wait(BOUND)  # however slow the event loop is, it has not decoded all by then
        time.sleep(0.003)

    async def one(index, settings, **options):
        return [result async for result in engine.generate_async(request(index), settings, **options)]

    async def run():
        long = sampling(0, max_new_tokens=24, num_candidates=6)
        slow = one(0, long, on_token=listen)
        cancelled, other = asyncio.create_task(slow), asyncio.create_task(one(4, sampling(4)))
        while not heard:
            await asyncio.sleep(0)
        cancelled.cancel()
        for _ in range(5):  # turns of the loop in which the task hears of it
            await asyncio.sleep(0)
        delivered.set()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        left = {pending.job.sampling.num_candidates for pending in engine._work.pending}
        return await other, left

    (result,), left = asyncio.run(run())
    assert_same(result, alone[4])
    assert 6 not in left and len(heard) < 70
    assert_empty(engine)


def test_a_listener_that_raises_fails_its_request_alone(engine, alone):
    others = {request(index, sampling=sampling(index)): index for index in (3, 4, 5)}
    iterator = engine.generate(others)
    results, heard = [next(iterator)], []

    def on_token(asked, candidate, token):
        heard.append(token)
        if len(heard) == 5:
            raise RuntimeError("the listener's own mistake")

    (bad,) = engine.generate(request(7), sampling(7), on_token=on_token)
    assert "own mistake" in str(bad.error) and len(heard) == 5
    results += iterator
    assert len(results) == 3
    for result in results:
        assert_same(result, alone[others[result.request]])
    assert_empty(engine)


@pytest.mark.parametrize("lag", [0, 1])
def test_the_only_job_is_cancelled_with_its_step_under_way(lag):
    engine = null_engine(lag)
    asked = null_request(2)  # of three tokens
    stream = engine.stream(asked)
    next(stream)
    loop = engine._work.loop
    assert len(loop._under_way) == lag
    engine.cancel(asked)
    assert not loop._live.any() and loop.step() == []
    assert list(stream) == []
    assert_empty(engine)


def test_exactly_as_many_requests_are_taken_as_fit(monkeypatch):
    """Let as many candidates wait as decode at once: with four slots those of four requests, then four more."""
    engine, taken, seen = null_engine(max_batch=4, num_pages=100), [], []
    decode = NullRunner.decode

    def requests():
        for seed in range(9, 18):  # of whose first candidate has 1 + seed % 9 tokens
            taken.append(seed)
            yield null_request(9 * seed + 8)

    def around(self, num_slots):
        seen.append((len(taken), len(self.decoding)))
        return decode(self, num_slots)

    monkeypatch.setattr(NullRunner, "decode", around)
    assert len(list(engine.generate(requests()))) == 9
    assert seen[:2] == [(4, 4), (8, 4)]


def test_timings_of_a_request_that_is_admitted_in_parts(monkeypatch):
    """End the queue and begin decoding with the start of the first candidate."""
    engine, steps, decode = null_engine(max_batch=1), [], NullRunner.decode

    def around(self, num_slots):
        steps.append(time.perf_counter())
        return decode(self, num_slots)

    monkeypatch.setattr(NullRunner, "decode", around)
    before = time.perf_counter()
    (result,) = engine.generate(null_request(3, num_candidates=4))
    assert len(result.codes) == 4 and len(steps) >= 4
    assert result.timings["prepare"] + result.timings["queue"] <= steps[0] - before
    assert result.timings["decode"] >= steps[-1] - steps[0] > 0


def test_an_engine_is_not_asked_for_results_within_its_own_step():
    """Fail only the request whose listener or scorer asks, as it would wait for itself."""
    engine = null_engine()
    expected = codes(engine.generate(asked()))

    def listen(heard, candidate, token):
        if heard.sampling.seed == 1:
            list(engine.generate(null_request(2)))

    results = list(engine.generate(asked(), on_token=listen))
    assert codes(results) == {seed: of for seed, of in expected.items() if seed != 1}
    (error,) = (result.error for result in results if result.error is not None)
    assert isinstance(error, RuntimeError) and "within its own step" in str(error)
    assert_empty(engine)


def test_an_iterator_that_is_collected_within_a_step_breaks_nothing(monkeypatch):
    """Garbage is collected anywhere: its requests are given up then, and freed at the step's end."""
    engine, decode = null_engine(1), NullRunner.decode
    expected = codes(engine.generate(asked()))
    abandoned = [engine.generate(asked())]
    next(abandoned[0])
    broken_off = []

    def around(self, num_slots):
        abandoned.clear()
        broken_off.append(engine._work.loop.runner is not self or not engine._work._torn)
        return decode(self, num_slots)

    monkeypatch.setattr(NullRunner, "decode", around)
    assert codes(engine.generate(asked())) == expected
    assert not any(broken_off)
    assert_empty(engine)


def test_bad_requests_without_end_are_told_one_by_one():
    engine, taken = null_engine(), []
    engine._door.admit = lambda *_: {}["a bad request"]

    def many():
        while len(taken) < 1000:
            taken.append(1)
            yield null_request()

    results = engine.generate(many())
    assert all(isinstance(next(results).error, KeyError) for _ in range(5))
    assert len(taken) == 5


def test_long_callers_do_not_delay_short_ones(monkeypatch):
    """Make steps in eight threads without end, and cancel and submit meanwhile: each waits its turn once."""
    engine, ending, steps = null_engine(max_batch=4, num_pages=100), threading.Event(), [0]
    decode = NullRunner.decode

    def around(self, num_slots):
        steps[0] += 1
        time.sleep(0)
        return decode(self, num_slots)

    monkeypatch.setattr(NullRunner, "decode", around)

    def endless():
        while not ending.is_set():
            yield null_request(8)

    threads = [threading.Thread(target=lambda: all(engine.generate(endless()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: steps[0] > 10, pause=0)
    for _ in range(20):
        doomed = null_request(5, num_candidates=3)
        stream = engine.stream(doomed)
        next(stream)
        before = steps[0]
        engine.cancel(doomed)
        assert steps[0] - before <= 2, "the step under way, and one more at most"
        assert doomed not in [pending.request for pending in engine._work.pending]
        assert all(isinstance(item, tuple) for item in stream)
    ending.set()
    join(*threads)
    assert_empty(engine)


@pytest.mark.parametrize(
    "mode", [torch.autocast("cpu", torch.bfloat16), torch.device("meta")], ids=["autocast", "device"]
)
def test_modes_of_the_thread_that_steps_are_its_own(parts, alone, mode):
    """Ignore the autocast and default device of the thread that steps, as its steps serve all threads."""
    for scoring in ("padded", "trimmed"):
        engine = make(parts, scoring=scoring)  # with no voice in its cache
        with mode:
            (result,) = engine.generate(request(3), sampling(3))
        if scoring == "padded":
            assert_same(result, alone[3])
        else:
            assert result.error is None and np.array_equal(result.codes, alone[3].codes)


@pytest.mark.parametrize("lag", [0, 1])
def test_results_outlive_what_they_were_made_with(lag, monkeypatch):
    """Release prompts and states on the device with the last result."""
    engine, jobs = null_engine(lag), WeakSet()
    add = DecodeLoop.add
    monkeypatch.setattr(DecodeLoop, "add", lambda loop, job: (jobs.add(job), add(loop, job))[1])
    results = list(engine.generate(asked()))
    engine._work.loop.runner = None  # the null one notes all that it is told
    gc.collect()
    assert len(results) == 4 and not jobs
