"""The random checkpoint's engine, and what several tests watch."""

import pytest

from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.engine.scheduler import Scheduler
from clvp_fast.models.clvp.processing import ClvpProcessor
from tests.engine.small_engine import make, request, sampling


@pytest.fixture(scope="module")
def parts():
    checkpoint = load_checkpoint("random")
    return checkpoint.model, ClvpProcessor(checkpoint.feature_extractor, checkpoint.tokenizer)


@pytest.fixture(scope="module")
def engine(parts):
    return make(parts)


@pytest.fixture(scope="module")
def alone(parts):
    """Give the codes of requests 0 to 11, each decoded alone."""
    engine = make(parts)
    return [next(engine.generate(request(i), sampling(i))) for i in range(12)]


@pytest.fixture
def happened(monkeypatch):
    """Count preempted and moved candidates."""
    counts = dict(preempted=0, moved=0)
    preempt, compact = Scheduler._preempt, Scheduler._compact

    def counted_preempt(self):
        counts["preempted"] += 1
        preempt(self)

    def counted_compact(self, step):
        compact(self, step)
        counts["moved"] += len(step.moves)

    monkeypatch.setattr(Scheduler, "_preempt", counted_preempt)
    monkeypatch.setattr(Scheduler, "_compact", counted_compact)
    return counts
