"""Many asyncio tasks on one engine: all of them in the batch, cancelled at random, and stopped within a step."""

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.small_engine import assert_empty, assert_same, make, request, sampling
from tests.kit.waiting import BOUND


async def one(engine, index, **options):
    return [result async for result in engine.generate_async(request(index), sampling(index), **options)]


def test_all_tasks_enter_the_batch(parts, alone, monkeypatch):
    """More than the threads of the event loop's own pool, which has two here: no step is made before all are in."""
    engine, everyone = make(parts, max_batch=64), threading.Event()
    step = engine._step

    def gated(*arguments):
        if len(engine._work.pending) == 16:
            everyone.set()
        assert everyone.wait(BOUND)
        step(*arguments)

    monkeypatch.setattr(engine, "_step", gated)

    async def run():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        return await asyncio.gather(*(one(engine, 3) for _ in range(16)))

    for (result,) in asyncio.run(run()):
        assert_same(result, alone[3])
    assert_empty(engine)


@pytest.mark.parametrize("lag", [0, 1])
def test_tasks_that_are_cancelled_at_random_take_nothing_along(parts, alone, lag):
    engine, chance = make(parts, lag=lag), random.Random(lag)

    async def run():
        tasks = {asyncio.create_task(one(engine, number % 12)): number % 12 for number in range(64)}
        doomed = chance.sample([*tasks], 32)
        for task in doomed:
            await asyncio.sleep(chance.random() / 100)
            task.cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), BOUND)
        for (task, index), found in zip(tasks.items(), results, strict=True):
            if isinstance(found, asyncio.CancelledError):
                assert task in doomed
            else:
                (result,) = found
                assert_same(result, alone[index])

    asyncio.run(run())
    assert_empty(engine)


def test_a_wait_that_times_out_ends_within_a_step(parts, monkeypatch):
    """Count steps instead of seconds: after the end of the wait, the one under way and at most one more."""
    engine = make(parts, max_new_tokens=24)
    started = threading.Event()

    def on_token(*_):
        started.set()

    async def run():
        task = asyncio.create_task(one(engine, 11, on_token=on_token))
        while not started.is_set():
            await asyncio.sleep(0)
        before = engine._work.steps
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine._work.steps - before <= 2
        assert_empty(engine)

    asyncio.run(run())
