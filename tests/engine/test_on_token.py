"""Listeners hear each token once, in order, also of candidates that began anew."""

from collections import defaultdict

import pytest
import torch

from tests.engine.demo_engine import assert_empty, make, request, sampling


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("trouble", ["none", "preempted", "out of memory"])
def test_each_token_is_told_once(parts, monkeypatch, lag, trouble):
    engine = make(parts, lag=lag, **({"num_pages": 14} if trouble == "preempted" else {}))
    if trouble == "out of memory":
        decode, steps = engine._loop.runner.decode, iter(range(10**6))

        def full(num_slots):
            if next(steps) == 9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(num_slots)

        monkeypatch.setattr(engine._loop.runner, "decode", full)
    heard = defaultdict(list)
    requests = [request(i, sampling=sampling(i, num_candidates=4, max_new_tokens=24)) for i in range(4)]
    stop = parts[0].config.decoder_config.eos_token_id
    for result in engine.generate(requests, on_token=lambda asked, i, token: heard[asked, i].append(token)):
        assert result.error is None
        for i, (row, length, stopped) in enumerate(zip(result.codes, result.lengths, result.stopped, strict=True)):
            assert heard[result.request, i] == row[:length].tolist() + [stop] * bool(stopped)
    assert len(heard) == 16
    assert_empty(engine)
