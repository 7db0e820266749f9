"""An exception in a step, at any line of the engine, loses no page and no request, and the next call goes on."""

import itertools
import random
import threading
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import clvp_fast.engine
from clvp_fast.engine import turns
from tests.engine.null_runner import asked, codes, null_engine
from tests.engine.small_engine import assert_empty, assert_same, make, request, sampling
from tests.kit.tracing import traced_by
from tests.kit.waiting import join

# Without the turns: a line trace raises where no signal's exception comes, before the first call of their `finally`.
FILES = set(Path(clvp_fast.engine.__file__).parent.glob("*.py")) - {Path(turns.__file__)}
SOURCES = {str(path): path.read_text().splitlines() for path in FILES}


def enters_or_leaves_with(frame):
    """Tell whether a frame is at a `with` line, which is traced on the way out too, where no signal comes."""
    return SOURCES[frame.f_code.co_filename][frame.f_lineno - 1].lstrip().startswith("with ")


def traced(call, at_line):
    """Run `call()`, with `at_line(file, number)` called at each line of the engine that this thread executes."""

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in SOURCES:
            return None
        if event == "line" and not enters_or_leaves_with(frame):
            at_line(frame.f_code.co_filename, frame.f_lineno)
        return trace

    with traced_by(trace):
        return call()


def points_of(call, each):
    """Return numbers of the lines that `call` executes: of every line up to `each` occurrences, evenly drawn."""
    count, found = itertools.count(1), defaultdict(list)
    traced(call, lambda *line: found[line].append(next(count)))
    drawn = [numbers[:: -(-len(numbers) // each)] for numbers in found.values()]
    return sorted(number for numbers in drawn for number in numbers)


def raising(call, point, error):
    """Run `call()`, with `error` raised at the `point`-th executed line of the engine."""
    count = itertools.count(1)

    def at_line(*_):
        if next(count) == point:
            raise error

    return traced(call, at_line)


def steps(engine):
    for _ in range(4):
        engine._turns.take(engine._work.step)


@pytest.mark.parametrize("each", [2, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_step_that_breaks_off_at_any_line_loses_nothing(lag, error, each, capsys):
    """Let one caller wait for four requests, while another, with none, steps for all and is interrupted."""
    expected = codes(null_engine(lag).generate(asked()))
    assert set(expected) == {0, 1, 2, 3}

    def begun():
        engine = null_engine(lag)
        waiting = engine.generate(asked())
        return engine, waiting, [next(waiting)]

    engine, waiting, _ = begun()
    points = points_of(lambda: steps(engine), each)
    came_through = failed = 0
    for point in points:
        engine, waiting, results = begun()
        try:
            raising(lambda engine=engine: steps(engine), point, error("at a line"))
        except error:
            came_through += 1
        results += waiting
        assert len({result.request for result in results}) == len(results) == 4
        good = [result for result in results if result.error is None]
        assert all(isinstance(result.error, error) for result in results if result.error is not None)
        failed += 4 - len(good)
        assert codes(good).items() <= expected.items()
        assert_empty(engine)
    with capsys.disabled():
        ended = f"{came_through} came through, {failed} failed"
        print(f"\n{error.__name__}, lag {lag}: raised at {len(points)} points, {ended}")
    assert len(points) > 90 * (each + 1)
    if error is KeyboardInterrupt:
        assert came_through == len(points) and failed == 0
    else:
        # In ranking a fault is the request's, in the listener's way too; else its requests are drawn again.
        assert came_through < len(points) / 10 and failed < len(points) / 10


def test_the_caller_that_is_interrupted_loses_its_own_requests_alone(capsys):
    """Interrupt anywhere in the caller's own iteration: submitting, taking and dropping too."""
    engine = null_engine(1)
    expected = codes(engine.generate(asked()))

    def call():
        return list(engine.generate(asked()[2:]))

    points = points_of(call, each=3)
    for point in points:
        waiting = engine.generate(asked()[:2])
        results = [next(waiting)]
        with pytest.raises(KeyboardInterrupt):
            raising(call, point, KeyboardInterrupt())
        results += waiting
        assert codes(results).items() <= expected.items() and len(results) == 2
        assert_empty(engine)
    assert codes(engine.generate(asked())) == expected
    with capsys.disabled():
        print(f"\nthe caller: interrupted at {len(points)} points")
    assert len(points) > 300


@pytest.mark.parametrize("lag", [0, 1])
def test_other_threads_are_served_meanwhile(lag, capsys):
    """Give two threads requests in one batch; both get theirs, and a failure belongs to its thread."""
    engine = null_engine(lag)
    expected = codes(engine.generate(asked()))
    kinds = (KeyboardInterrupt, SystemExit, MemoryError, RuntimeError)

    def call():
        return list(engine.generate(asked()[2:]))

    points = points_of(call, each=1)
    for number, point in enumerate(points):
        error, served = kinds[number % 4](f"at {point}"), [[], []]

        def user(results):
            for _ in range(2):
                results += engine.generate(asked()[:2])

        threads = [threading.Thread(target=user, args=(results,)) for results in served]
        for thread in threads:
            thread.start()
        try:
            results = raising(call, point, error)
        except BaseException as raised:
            assert raised is error
        else:
            assert len(results) == 2 and all(result.error in (None, error) for result in results)
            assert codes(results).items() <= expected.items()
        join(*threads)
        for results in served:
            assert len(results) == 4, "two requests, twice"
            # A fault in ranking is that of the request which is ranked, by whichever thread.
            assert all(result.error in (None, error) for result in results)
            assert sum(result.error is not None for result in results) <= 1
            assert codes(results).items() <= expected.items()
        assert_empty(engine)
    with capsys.disabled():
        print(f"\nthree threads, lag {lag}: raised at {len(points)} points")
    assert len(points) > 150


@pytest.mark.parametrize("lag", [0, 1])
def test_ctrl_c_at_a_sample_of_lines_of_the_small_engine(parts, alone, lag, capsys):
    engine = make(parts, lag=lag)

    def call():
        return list(engine.generate(request(7), sampling(7)))

    points = random.Random(lag).sample(points_of(call, each=1), 16)
    for point in points:
        others = {request(index, sampling=sampling(index)): index for index in (3, 8)}
        waiting = engine.generate(others)
        results = [next(waiting)]
        with pytest.raises(KeyboardInterrupt):
            raising(call, point, KeyboardInterrupt())
        results += waiting
        assert len(results) == 2
        for result in results:
            assert_same(result, alone[others[result.request]])
        assert_empty(engine)
    with capsys.disabled():
        print(f"\nsmall engine, lag {lag}: interrupted at {len(points)} points")
