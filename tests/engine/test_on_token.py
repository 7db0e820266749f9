"""Listeners hear each token once, in order, also of candidates that began anew."""

from collections import defaultdict

import pytest
import torch

from tests.engine.small_engine import assert_empty, make, request, sampling
from tests.kit.waiting import BOUND


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("trouble", ["none", "preempted", "out of memory"])
def test_each_token_is_told_once(parts, monkeypatch, lag, trouble):
    engine = make(parts, lag=lag, **({"num_pages": 14} if trouble == "preempted" else {}))
    if trouble == "out of memory":
        decode, steps = engine._work.loop.runner.decode, iter(range(10**6))

        def full(num_slots):
            if next(steps) == 9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(num_slots)

        monkeypatch.setattr(engine._work.loop.runner, "decode", full)
    heard = defaultdict(list)
    requests = [request(i, sampling=sampling(i, num_candidates=4, max_new_tokens=24)) for i in range(4)]
    stop = parts[0].config.decoder_config.eos_token_id
    for result in engine.generate(requests, on_token=lambda asked, i, token: heard[asked, i].append(token)):
        assert result.error is None
        for i, (row, length, stopped) in enumerate(zip(result.codes, result.lengths, result.stopped, strict=True)):
            assert heard[result.request, i] == row[:length].tolist() + [stop] * bool(stopped)
    assert len(heard) == 16
    assert_empty(engine)


@pytest.mark.parametrize("lag", [0, 1])
def test_an_interrupted_listener_loses_no_other_request(parts, lag):
    """Also one that is finished by the same step."""
    engine = make(parts, lag=lag)
    stop = parts[0].config.decoder_config.vocab_size - 1
    settings = dict(num_candidates=1, stop_token=stop)

    def interrupted(asked, candidate, token):
        heard.append(token)
        if len(heard) == 6:
            raise KeyboardInterrupt

    for other_length in range(4, 10):
        heard = []
        other = engine.stream(
            request(1, timeout=BOUND, sampling=sampling(1, **settings | {"max_new_tokens": other_length}))
        )
        next(other)
        with pytest.raises(KeyboardInterrupt):
            list(
                engine.generate(
                    request(0, sampling=sampling(0, **settings | {"max_new_tokens": 6})), on_token=interrupted
                )
            )
        result = list(other)[-1]
        assert result.error is None and result.lengths.tolist() == [other_length]
        assert_empty(engine)
