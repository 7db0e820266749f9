"""A finished request's ranking on its way to the host: other requests' steps go on, and nobody waits for it."""

from typing import ClassVar

import pytest
import torch

from clvp_fast.engine import results
from clvp_fast.engine.host_copy import HostCopy
from clvp_fast.engine.ranking import Ranker
from clvp_fast.models.clvp import encoder
from clvp_fast.ops import dispatch
from tests.engine.null_runner import NullRunner, null_engine, null_request
from tests.engine.small_engine import assert_empty
from tests.engine.test_decoder import tiny

SHORT, LONG = 0, 8  # seeds of a null device: candidates of 1 and of 9 tokens


class Slow(HostCopy):
    """A copy that arrives when its test says so."""

    made: ClassVar[list["Slow"]] = []

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.ready, self.begun_at, self.waited_at = False, self.steps(), None
        self.made.append(self)

    @property
    def arrived(self):
        return self.ready

    def wait(self):
        self.waited_at = self.steps()
        return super().wait()


@pytest.fixture
def steps(monkeypatch):
    """Give the steps of null devices, each the number of its slots, and let copies of rankings be slow."""
    decode, found = NullRunner.decode, []
    monkeypatch.setattr(NullRunner, "decode", lambda self, slots: found.append(slots) or decode(self, slots))
    monkeypatch.setattr(results, "HostCopy", Slow)
    monkeypatch.setattr(Slow, "made", [])
    monkeypatch.setattr(Slow, "steps", lambda self: len(found), raising=False)
    return found


def requests(**options):
    return [null_request(SHORT, **options), null_request(LONG)]


def seeds(drawn):
    return [result.request.sampling.seed for result in drawn if result.error is None]


@pytest.mark.parametrize("lag", [0, 1])
def test_nobody_waits_while_there_are_candidates(lag, steps):
    engine = null_engine(lag)
    assert seeds(engine.generate(requests())) == [SHORT, LONG]
    short, long = Slow.made
    assert short.begun_at < 5 and short.waited_at == long.waited_at == len(steps) >= 9
    assert_empty(engine)


def test_a_result_is_given_once_it_has_arrived(steps):
    engine = null_engine(lag=1)
    drawn, decode = engine.generate(requests()), engine._work.loop.runner.decode

    def arriving(num_slots):
        if len(steps) == 5:
            Slow.made[0].ready = True
        return decode(num_slots)

    engine._work.loop.runner.decode = arriving
    first = next(drawn)
    assert first.request.sampling.seed == SHORT and Slow.made[0].waited_at == len(steps) == 6
    assert first.scores.tolist() == [1.0] and first.timings["rank"] > 0
    assert seeds(drawn) == [LONG]


def test_a_step_that_breaks_off_meanwhile(steps, monkeypatch):
    """Rank again, because nothing under way outlives such a step."""
    engine, planted = null_engine(lag=1), [RuntimeError("a glitch")]
    decode = NullRunner.decode

    def failing(self, num_slots):
        if len(steps) == 5 and planted:
            raise planted.pop()
        return decode(self, num_slots)

    monkeypatch.setattr(NullRunner, "decode", failing)
    assert seeds(engine.generate(requests())) == [SHORT, LONG]
    assert not planted and [len(copy.wait()[0]) for copy in Slow.made] == [1, 1, 1]
    assert Slow.made[0].waited_at == len(steps), "only by this test"
    assert_empty(engine)


def test_a_request_that_is_cancelled_meanwhile(steps):
    engine, asked = null_engine(lag=1), requests()
    engine._work.loop.runner.decode = lambda num_slots: (
        engine.cancel(asked[0]) if len(steps) == 5 else None,
        NullRunner.decode(engine._work.loop.runner, num_slots),
    )[1]
    assert seeds(engine.generate(asked)) == [LONG]
    assert Slow.made[0].waited_at is None and not engine._work._ranking
    assert_empty(engine)


def test_an_error_of_the_device_fails_its_request(steps, monkeypatch):
    wait = Slow.wait

    def failing(self):
        if self is Slow.made[0]:
            raise RuntimeError("CUDA error")
        return wait(self)

    monkeypatch.setattr(Slow, "wait", failing)
    engine = null_engine(lag=1)
    short, long = engine.generate(requests())
    assert str(short.error) == "CUDA error" and long.error is None
    assert_empty(engine)


def test_refreshing_waits_for_results_under_way(steps):
    engine = null_engine(lag=1)
    drawn = engine.generate([null_request(SHORT), null_request(LONG)])
    refused = []

    def on_step(num_slots):
        if len(steps) == 5:
            with pytest.raises(RuntimeError, match=r"requests are under way \(2\)"):
                engine._work.require_idle()
            refused.append(True)
        return NullRunner.decode(engine._work.loop.runner, num_slots)

    engine._work.loop.runner.decode = on_step
    assert seeds(drawn) == [SHORT, LONG] and refused


@pytest.mark.parametrize("mode", ["padded", "trimmed"])
def test_a_ranking_reads_nothing_of_the_device(mode, monkeypatch):
    """Rank on tensors without storage, with the operators that a GPU takes: reading any number raises."""
    monkeypatch.setattr(encoder, "changed_module", lambda *model: None)
    monkeypatch.setattr(dispatch, "missing_on_gpu", lambda device: None)
    for operator in dispatch.OPERATORS.values():
        monkeypatch.setattr(operator, "_refusals", {})
    model = tiny().to("meta")
    ranker = Ranker(model, mode=mode)
    codes = [torch.tensor([3, 4, 5]), torch.tensor([7])]
    ranking = ranker.score(None, torch.tensor([5, 9, 17]), codes, 6)
    best = ranking.top(2)
    assert {x.device.type for x in (best, ranking.scores, ranking.text_embeds, ranking.speech_embeds)} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        best.tolist()
