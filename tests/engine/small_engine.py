"""The engine on the random checkpoint, requests to it by their numbers, and what must hold of their results."""

import numpy as np

from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.requests import CandidateRequest
from clvp_fast.engine.sampling_params import SamplingParams

RATE = 22050
TEXTS = ("Hello.", "The birch canoe slid on the smooth planks.", "No.", "Glue the sheet to the dark blue background.")


def make(parts, lag=0, **options):
    engine = CandidateEngine(*parts, **{"max_batch": 6, "max_new_tokens": 24, **options})
    engine._work.loop.lag = lag
    engine._work.loop._begin(engine._work.loop.runner)
    return engine


def clip(seed=0, seconds=0.5):
    return np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32) * 0.1


def request(index=0, **options):
    return CandidateRequest(text=TEXTS[index % len(TEXTS)], audio=clip(index % 2), sampling_rate=RATE, **options)


def sampling(index=0, **options):
    return SamplingParams(
        **{"num_candidates": 1 + index % 3, "max_new_tokens": 3 + 5 * (index % 4), "seed": index, **options}
    )


def assert_empty(engine):
    assert engine._work.loop.idle and not engine._work.pending
    assert engine._work.loop.scheduler.schedule() is None and engine._work.loop.scheduler.pool.used_pages == 0


def assert_same(result, expected):
    assert result.error is None, result.error
    assert np.array_equal(result.codes, expected.codes) and np.array_equal(result.lengths, expected.lengths)
    assert np.array_equal(result.stopped, expected.stopped)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-4, atol=1e-4)
