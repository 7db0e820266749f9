"""Turns come in the order of asking, one at a time, and no exception or interrupt keeps one."""

import gc
import os
import random
import signal
import threading
import time
import warnings

import pytest

from clvp_fast.engine.turns import Turns
from tests.kit.waiting import BOUND, join, wait_for


def held(turns):
    """Start a thread that has the turn until the event is set."""
    inside, let_go = threading.Event(), threading.Event()

    def hold():
        inside.set()
        assert let_go.wait(BOUND)

    thread = threading.Thread(target=turns.take, args=(hold,))
    thread.start()
    assert inside.wait(BOUND)
    return thread, let_go


def waiting(turns, function, **options):
    """Start a thread that asks, behind those that have asked before."""
    before = len(turns._tickets)
    thread = threading.Thread(target=turns.take, args=(function,), kwargs=options)
    thread.start()
    wait_for(lambda: len(turns._tickets) == before + 1, pause=0)
    return thread


def test_in_the_order_of_asking():
    turns, order = Turns(), []
    holder, let_go = held(turns)
    threads = [waiting(turns, lambda number=number: order.append(number)) for number in range(20)]
    let_go.set()
    join(holder, *threads)
    assert order == list(range(20))


def test_a_repeated_caller_queues_after_waiting_ones():
    turns, order = Turns(), []
    holder, let_go = held(turns)

    def worker():
        for _ in range(50):
            turns.take(lambda: order.append("worker"))

    hungry = threading.Thread(target=worker)
    hungry.start()
    wait_for(lambda: len(turns._tickets) == 2, pause=0)
    short = waiting(turns, lambda: order.append("short"))
    let_go.set()
    join(holder, hungry, short)
    assert order.index("short") == 1 and len(order) == 51


def test_one_at_a_time():
    turns, inside, most = Turns(), [], []

    def function():
        inside.append(1)
        most.append(len(inside))
        time.sleep(0)
        inside.pop()

    def user():
        for _ in range(200):
            turns.take(function)

    threads = [threading.Thread(target=user) for _ in range(8)]
    for thread in threads:
        thread.start()
    join(*threads)
    assert len(most) == 1600 and max(most) == 1


def test_a_turn_that_became_needless_is_skipped():
    turns, done, called = Turns(), [], []
    holder, let_go = held(turns)
    threads = [waiting(turns, lambda: called.append(1), unless=lambda: bool(done)) for _ in range(5)]
    done.append(1)
    join(*threads)  # while the turn is held
    let_go.set()
    join(holder)
    assert (
        not called and turns.take(lambda: 7, unless=lambda: False) == 7 and turns.take(lambda: 7, lambda: True) is None
    )


def test_an_error_ends_a_turn_and_a_turn_is_not_taken_twice():
    turns = Turns()
    with pytest.raises(LookupError):
        turns.take(lambda: {}[1])
    with pytest.raises(RuntimeError, match="within its own step"):
        turns.take(lambda: turns.take(lambda: 7))
    assert not turns.mine and turns.take(lambda: turns.mine) and turns.take(lambda: 7) == 7


def test_a_finalizer_finds_that_its_thread_waits():
    """Garbage is collected anywhere, also in a thread that waits for its turn."""
    turns, found = Turns(), []

    class Cycle:
        def __init__(self):
            self.own = self

        def __del__(self):
            found.append(turns.mine)

    def collect():
        Cycle()
        gc.collect()
        return False

    collect()
    holder, let_go = held(turns)
    waiter = waiting(turns, lambda: None, unless=collect)
    wait_for(lambda: found.count(True), pause=0)
    let_go.set()
    join(holder, waiter)
    assert found[0] is False and True in found


def test_interrupts_at_any_moment():
    """Raise a signal's exception in the main thread 2000 times: others go on, never two in a turn."""
    turns, inside, clashes, served = Turns(), [], [], [0] * 3
    chance, ending = random.Random(0), threading.Event()

    def function():
        inside.append(1)
        if len(inside) > 1:
            clashes.append(1)
        inside.clear()

    def user(number):
        while not ending.is_set():
            turns.take(function)
            served[number] += 1

    def interrupt(*_):
        raise KeyboardInterrupt

    threads = [threading.Thread(target=user, args=(number,), daemon=True) for number in range(3)]
    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for thread in threads:
            thread.start()
        while interrupted < 2000:
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + 2e-4 * chance.random())
                while True:
                    turns.take(function)
            except KeyboardInterrupt:
                interrupted += 1
                inside.clear()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        ending.set()
    join(*threads)
    assert not turns._tickets and not clashes and min(served) > 0


def test_the_child_of_a_fork_waits_for_no_thread_of_its_parent():
    turns = Turns()
    holder, let_go = held(turns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of a fork beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(int(BOUND))
        try:
            os._exit(turns.take(lambda: 7))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    let_go.set()
    join(holder)
    assert os.waitstatus_to_exitcode(status) == 7
