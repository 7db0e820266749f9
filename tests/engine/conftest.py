"""What several tests of the engine watch."""

import pytest

from clvp_fast.engine.scheduler import Scheduler


@pytest.fixture
def happened(monkeypatch):
    """How often candidates were preempted and moved."""
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
