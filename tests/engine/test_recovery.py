"""A request that breaks off steps is found, and fails alone; memory that runs out costs half the batch, and no more."""

from weakref import ref

import pytest
import torch

from clvp_fast.engine import engine as engine_module
from clvp_fast.engine.runner import Runner
from tests.engine.null_runner import NullRunner, codes, null_engine, null_request
from tests.engine.small_engine import assert_empty, assert_same, make, request, sampling

pytestmark = pytest.mark.parametrize("lag", [0, 1])


def broken(monkeypatch, fault):
    """Call `fault(runner)` before each step of a null device."""
    decode = NullRunner.decode

    def around(self, num_slots):
        fault(self)
        return decode(self, num_slots)

    monkeypatch.setattr(NullRunner, "decode", around)


def bug(runner):
    raise RuntimeError("a bug")


def some(count=8):
    return [null_request(seed, 1 + seed % 3, 9 - seed % 4, timeout=None) for seed in range(count)]


@pytest.mark.parametrize("bad", [{3}, {0}, {7}, {2, 5}, {0, 1, 2, 3}], ids=str)
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, OverflowError, KeyError])
def test_a_request_that_breaks_every_step_fails_alone(lag, monkeypatch, bad, error):
    expected = codes(null_engine(lag).generate(some()))
    engine, met = null_engine(lag), []

    def fault(runner):
        if runner.decoding & bad:
            met.append(runner.decoding)
            raise error("a bug")

    broken(monkeypatch, fault)
    results = list(engine.generate(some()))
    assert sorted(result.request.sampling.seed for result in results) == list(range(8))
    assert {result.request.sampling.seed for result in results if result.error is not None} == bad
    assert {type(result.error) for result in results if result.error is not None} == {error}
    assert codes(results) == {seed: of for seed, of in expected.items() if seed not in bad}
    assert all({one} in met for one in bad), "each was alone when it failed"
    assert len(met) <= 2 + 4 * len(bad), "found by halves"
    assert_empty(engine)


def test_a_fault_that_comes_once_fails_nobody(lag, monkeypatch):
    expected = codes(null_engine(lag).generate(some()))
    engine, steps = null_engine(lag), iter(range(10**6))

    def fault(runner):
        if next(steps) == 5:
            raise RuntimeError("a glitch")

    broken(monkeypatch, fault)
    assert codes(engine.generate(some())) == expected
    assert engine._work._groups == []


def test_a_fault_of_nobody_fails_each_in_turn(lag, monkeypatch):
    engine = null_engine(lag)
    with monkeypatch.context() as patched:
        broken(patched, bug)
        results = list(engine.generate(some()))
    assert len(results) == 8 and {str(result.error) for result in results} == {"a bug"}
    assert codes(engine.generate(some())) == codes(null_engine(lag).generate(some()))
    assert_empty(engine)


def test_a_kept_error_holds_no_runner(lag, monkeypatch):
    """Clear the error's frames, which would keep the pages of a replaced runner."""
    engine = null_engine(lag)
    with monkeypatch.context() as patched:
        broken(patched, bug)
        (result,) = engine.generate(null_request())
    old = ref(engine._work.loop.runner)
    engine._work.loop.runner, engine._work._torn = None, True
    assert result.error.__traceback__ is not None and old() is None


def test_a_device_that_is_lost_is_no_request_s_fault(lag, monkeypatch):
    """Raise where not even an empty batch can be made, and again until one can."""
    engine = null_engine(lag)

    def lost(*_):
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patched:
        broken(patched, lost)
        patched.setattr(NullRunner, "reset", lost)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the device is lost"):
                list(engine.generate(some()))
    assert len(codes(engine.generate(some()))) == 8
    assert_empty(engine)


def test_too_little_memory_for_one_candidate_is_the_call_s(lag, monkeypatch):
    engine = null_engine(lag)

    def full(runner):
        raise torch.OutOfMemoryError("says the test")

    with monkeypatch.context() as patched:
        broken(patched, full)
        with pytest.raises(torch.OutOfMemoryError, match="too little memory to decode a single candidate"):
            list(engine.generate(some()))
    assert engine.memory.max_batch == 1
    assert len(codes(engine.generate(some()))) == 8
    assert_empty(engine)


@pytest.mark.parametrize("warm", [False, True])
def test_the_smaller_runner_is_as_warm_as_the_old_one_which_is_gone(lag, monkeypatch, warm):
    """Free the old runner first, whose pages are the missing memory; the error's own frames hold it too."""
    engine, warmed, old, gone = null_engine(lag, max_batch=6), [], [], []
    make_runner = engine._work._make_runner
    monkeypatch.setattr(NullRunner, "warm_up", lambda self, progress=None: warmed.append(self.max_batch))
    monkeypatch.setattr(
        engine._work, "_make_runner", lambda memory: gone.append(old[0]() is None) or make_runner(memory)
    )

    def full(runner):
        if not old:
            old.append(ref(runner))
            raise torch.OutOfMemoryError("says the test")

    broken(monkeypatch, full)
    if warm:
        engine.warm_up()
    assert len(codes(engine.generate(some()))) == 8
    assert gone == [True] and warmed == ([6, 3] if warm else [])
    assert_empty(engine)


def test_no_memory_for_the_smaller_runner_either(lag, monkeypatch):
    engine, made = null_engine(lag, max_batch=8), []
    make_runner = engine._work._make_runner

    def full(memory):
        made.append(memory.max_batch)
        if memory.max_batch > 1:
            raise torch.OutOfMemoryError("says the test")
        return make_runner(memory)

    def fault(runner):
        if runner.max_batch == 8:
            raise torch.OutOfMemoryError("says the test")

    engine._work._make_runner = full
    broken(monkeypatch, fault)
    assert len(codes(engine.generate(some()))) == 8
    assert made == [4, 2, 1]


def test_an_interrupted_warm_up_is_made_up_for(lag, monkeypatch):
    engine, warmed, planted = null_engine(lag), [], []
    engine.warm_up()

    def interrupted(self, progress=None):
        warmed.append(1)
        if len(warmed) == 1:
            raise KeyboardInterrupt

    def full(runner):
        if not planted:
            planted.append(1)
            raise torch.OutOfMemoryError("says the test")

    monkeypatch.setattr(NullRunner, "warm_up", interrupted)
    broken(monkeypatch, full)
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(some()))
    assert len(codes(engine.generate(some()))) == 8 and len(warmed) == 2
    assert_empty(engine)


def test_the_small_engine_s_old_runner_is_gone_too(lag, parts, alone, monkeypatch):
    engine, old, gone = make(parts, lag=lag), [], []
    decode, plan = Runner.decode, engine_module.plan

    def full(self, slots):
        if not old:
            old.append(ref(self))
            raise torch.OutOfMemoryError("says the test")
        return decode(self, slots)

    monkeypatch.setattr(Runner, "decode", full)
    monkeypatch.setattr(engine_module, "plan", lambda *a, **kw: gone.append(old[0]() is None) or plan(*a, **kw))
    (result,) = engine.generate(request(4), sampling(4))
    assert_same(result, alone[4])
    assert gone and all(gone), "when free memory is read"
