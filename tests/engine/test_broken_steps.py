"""What is raised inside a step, at any line of the engine, loses no page and no request, and the next call goes on."""

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import clvp_fast.engine
from clvp_fast.engine.decode_loop import DecodeLoop
from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.requests import CandidateRequest
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scoring import Ranking
from tests.engine.demo_engine import assert_empty, assert_same, make, request, sampling
from tests.engine.null_engine import NullDevice
from tests.kit.tracing import traced_by

FOLDER = str(Path(clvp_fast.engine.__file__).parent)


class NullRunner:
    """A runner over a `NullDevice`: tokens are numbers that seed, candidate and step make."""

    def __init__(self, num_pages=9, page_size=2, max_batch=3, max_new_tokens=9):
        self.device, self.max_batch, self.max_new_tokens = torch.device("cpu"), max_batch, max_new_tokens
        self.pages = SimpleNamespace(data=torch.empty(1, 1, num_pages, page_size))
        self.reset()

    def reset(self):
        self.null, self.params = NullDevice(self.pages.data.shape[3], {}), {}

    def apply(self, step, prompts, params):
        self.params |= params
        for key, of_request in params.items():
            for i in range(of_request.num_candidates):
                self.null.length_of[key, i] = 1 + (of_request.seed + 2 * i) % of_request.max_new_tokens
        self.null.apply(step)

    def decode(self, num_slots):
        tokens, ended = np.full(num_slots, -1), np.ones(num_slots, dtype=bool)
        alive = [slot for slot, state in self.null.slots.items() if not state[5]]
        done = self.null.decode()
        for slot in alive:
            key, candidate, _, _, stored, _ = self.null.slots[slot]
            tokens[slot], ended[slot] = 1000 * self.params[key].seed + 100 * candidate + stored, slot in done
        return tokens, ended

    def tokens(self, handle):
        return handle[0]

    def finished(self, handle):
        return handle[1]


class NullScorer:
    def score(self, request, text_ids, codes, max_codes):
        return Ranking(torch.tensor([float(len(row)) for row in codes]))


def null_engine(lag):
    """The engine itself, with a null device below it and neither model nor texts above."""
    engine = object.__new__(CandidateEngine)
    engine.model = SimpleNamespace(device=torch.device("cuda"))  # where no heap is trimmed
    engine.memory, engine.scorer = SimpleNamespace(max_batch=3), NullScorer()
    engine._pending, engine._lock, engine._torn, engine._warm = {}, threading.RLock(), False, False
    engine._steps, engine._plain = 0, SimpleNamespace(check=lambda: None)
    engine._text_ids = lambda request: torch.tensor(request.input_ids)
    engine._prompt = lambda request, ids: torch.zeros(len(ids), 1)
    engine._settings = lambda params: params
    engine._loop = DecodeLoop(NullRunner(), lag=lag)
    return engine


def asked():
    """Four requests that do not fit in the slots at once, and whose candidates are preempted."""
    counts = ((2, 7), (3, 9), (1, 2), (2, 5))
    return [
        CandidateRequest(
            input_ids=[1] * (1 + i),
            conditioning=0,
            sampling=SamplingParams(n, max_new_tokens=m, seed=i, stop_token=9999),
        )
        for i, (n, m) in enumerate(counts)
    ]


SOURCES = {path: Path(path).read_text().splitlines() for path in map(str, Path(FOLDER).glob("*.py"))}


def enters_or_leaves_with(frame):
    """A `with` line is traced on the way out too, where an exception would keep the lock; no signal comes there."""
    return SOURCES[frame.f_code.co_filename][frame.f_lineno - 1].lstrip().startswith("with ")


def traced(call, point, error):
    """`call()`, with `error` raised at the `point`-th executed line of the engine; how many lines were executed."""
    executed = 0

    def trace(frame, event, argument):
        nonlocal executed
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line" and not enters_or_leaves_with(frame):
            executed += 1
            if executed == point:
                raise error
        return trace

    with traced_by(trace):
        call()
    return executed


def codes(results):
    """The codes of results without an error, by the seeds of their requests."""
    return {
        result.request.sampling.seed: [row[:n].tolist() for row, n in zip(result.codes, result.lengths, strict=True)]
        for result in results
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_step_that_breaks_off_at_any_line_loses_nothing(lag, error, capsys):
    """One caller waits for four requests; another one, with none of its own, steps for all and is interrupted."""
    expected = codes(null_engine(lag).generate(asked()))
    assert set(expected) == {0, 1, 2, 3}
    came_through = failed = 0
    for point in itertools.count(1):
        engine = null_engine(lag)
        waiting = engine.generate(asked())
        results = [next(waiting)]
        executed = point
        try:
            executed = traced(lambda engine=engine: [engine._advance() for _ in range(4)], point, error("at a line"))
        except error:
            came_through += 1
        results += waiting
        assert len({result.request for result in results}) == len(results) == 4
        good = [result for result in results if result.error is None]
        assert all(isinstance(result.error, error) for result in results if result.error is not None)
        failed += 4 - len(good)
        assert codes(good).items() <= expected.items()
        assert not engine._torn
        assert_empty(engine)
        if executed < point:
            break
    with capsys.disabled():
        print(
            f"\n{error.__name__}, lag {lag}: raised at {point - 1} lines, came through {came_through}, {failed} failed"
        )
    assert point > 500 and failed < point / 10
    if error is KeyboardInterrupt:
        assert came_through == point - 1 and failed == 0


def test_the_caller_that_is_interrupted_loses_its_own_requests_alone():
    """Points in the caller's own iteration, taking and giving up included."""
    expected = codes(null_engine(1).generate(asked()))
    for point in itertools.count(1):
        engine = null_engine(1)
        waiting = engine.generate(asked()[:2])
        results = [next(waiting)]
        try:
            executed = traced(lambda engine=engine: list(engine.generate(asked()[2:])), point, KeyboardInterrupt())
        except KeyboardInterrupt:
            executed = point
        results += waiting
        assert codes(results).items() <= expected.items() and len(results) == 2
        assert not engine._pending
        if point % 8 == 0 or executed < point:
            assert codes(engine.generate(asked())) == expected
            assert_empty(engine)
        if executed < point:
            break
    assert point > 500


@pytest.mark.parametrize("lag", [0, 1])
def test_a_fault_that_stays_fails_its_requests_and_the_next_go_on(lag, monkeypatch):
    engine = null_engine(lag)
    decode, broken = NullRunner.decode, True

    def failing(self, num_slots):
        if broken and any(state[0] in (0, 1) for state in self.null.slots.values()):
            raise RuntimeError("a bug")
        return decode(self, num_slots)

    monkeypatch.setattr(NullRunner, "decode", failing)
    results = list(engine.generate(asked()))
    assert len(results) == 4 and {str(r.error) for r in results if r.error is not None} == {"a bug"}
    assert {0, 1} <= {r.request.sampling.seed for r in results if r.error is not None} != {0, 1, 2, 3}
    broken = False
    assert set(codes(engine.generate(asked()))) == {0, 1, 2, 3}
    assert_empty(engine)


@pytest.mark.parametrize("lag", [0, 1])
def test_ctrl_c_at_a_sample_of_lines_of_the_demo_engine(parts, alone, lag):
    engine = make(parts, lag=lag)
    for point in range(1, 700, 67):
        others = {request(index, sampling=sampling(index)): index for index in (3, 8)}
        waiting = engine.generate(others)
        results = [next(waiting)]
        with pytest.raises(KeyboardInterrupt):
            traced(lambda: list(engine.generate(request(7), sampling(7))), point, KeyboardInterrupt())
        results += waiting
        assert len(results) == 2
        for result in results:
            assert_same(result, alone[others[result.request]])
        assert_empty(engine)


def test_a_job_that_is_cancelled_while_its_step_is_in_flight():
    engine = null_engine(1)
    one = CandidateRequest(
        input_ids=[1], conditioning=0, sampling=SamplingParams(1, max_new_tokens=3, seed=2, stop_token=9999)
    )
    waiting = engine.generate(one, on_token=lambda *_: engine.cancel(one))
    assert list(waiting) == []
    engine._loop.step()
    assert not engine._loop._live.any()
    assert_empty(engine)
