"""10 000 short requests, with bad, cancelled and abandoned ones among them: nothing is left behind, nothing grows."""

import gc
import os
import sys
import tracemalloc
import types
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import clvp_fast
from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.requests import CandidateRequest
from clvp_fast.engine.sampling_params import SamplingParams
from tests.models.clvp.builders import clips, composite_config, texts

REQUESTS, PART = 10_000, 1000


@pytest.fixture
def engine():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_attention_heads=1, intermediate_size=16, use_rotary_embedding=False)
    config = composite_config(clvp_fast, num_hidden_layers=1, num_mel_attn_blocks=1, **sizes)
    config.decoder_config.vocab_size, config.decoder_config.bos_token_id, config.decoder_config.eos_token_id = (
        20,
        18,
        19,
    )
    model = clvp_fast.ClvpModelForConditionalGeneration(config)
    processor = SimpleNamespace(feature_extractor=clvp_fast.ClvpFeatureExtractor(feature_size=20), tokenizer=None)
    # Few pages, so that candidates are preempted now and then.
    engine = CandidateEngine(model, processor, max_batch=48, max_new_tokens=40, num_pages=45, scoring="trimmed")
    engine._work.loop.lag = 1
    engine._work.loop._begin(engine._work.loop.runner)
    return engine


def requests(count, voice):
    """Make requests of 1 to 3 candidates of 1 to 20 tokens, always the same ones; every 50th is bad."""
    for index in range(count):
        sampling = SamplingParams(
            num_candidates=1 + index % 3, max_new_tokens=1 + index % 20, temperature=1.5, top_p=1.0, seed=index
        )
        ids = texts(1, 1 + index % 30, seed=index)[0]
        if index % 50 == 17:
            ids = ids + 1000
        yield CandidateRequest(input_ids=ids, conditioning=voice, sampling=sampling, id=index)


def serve(engine, voice, count):
    """Serve `count` requests: every 97th has its successor cancelled, and one iteration is abandoned midway."""
    given, ended = [], []

    def watched():
        for request in requests(count, voice):
            given.append(request)
            yield request

    for result in engine.generate(watched()):
        ended.append((result.request.id, str(result.error)))
        following = result.request.id + 1
        if result.request.id % 97 == 0 and following < len(given):
            engine.cancel(given[following])
    abandoned = engine.generate(requests(engine.memory.max_batch, voice))
    next(abandoned)
    abandoned.close()
    assert len(given) == count and engine._work.loop.idle and not engine._work.pending
    assert engine._work.loop.scheduler.schedule() is None and engine._work.loop.scheduler.pool.used_pages == 0
    return ended


def reachable(root):
    """Count the objects and entries that something holds on to; skip classes, functions, modules and all behind them.

    Numbers count as entries of what holds them alone: whether two of them are one object depends on their size.
    """
    kinds = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType)
    kinds += (int, float)
    found, waiting, entries = {id(root)}, [root], 0
    while waiting:
        for one in gc.get_referents(waiting.pop()):
            if id(one) not in found and not isinstance(one, kinds):
                found.add(id(one))
                waiting.append(one)
                entries += len(one) if isinstance(one, (list, dict, set, deque)) else 0
    return len(found) + entries


def calls(run):
    """Count called functions, Python's own and built-in ones."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def process():
    """Resident bytes, threads and open files of this process."""
    gc.collect()
    proc = Path("/proc/self")
    resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir(proc / "task")), len(os.listdir(proc / "fd"))


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="no /proc here to read memory, threads and files from"
)
@pytest.mark.slow
def test_ten_thousand_requests(engine, happened):
    voice = engine.voice(CandidateRequest(input_ids=[3], input_features=clips(1)))
    serve(engine, voice, 3)
    expected = serve(engine, voice, PART)

    def some():
        serve(engine, voice, 40)

    some()
    work, held = calls(some), reachable(engine)
    before = process()
    for _ in range(REQUESTS // PART - 2):
        assert serve(engine, voice, PART) == expected
    after = process()
    assert after[1:] == before[1:], "threads and open files"
    assert after[0] - before[0] < 8e6, "resident bytes"

    tracemalloc.start()
    serve(engine, voice, PART // 2)
    gc.collect()
    traced = tracemalloc.get_traced_memory()[0]
    serve(engine, voice, PART // 2)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    assert grown < 20e3, "bytes of Python's own objects in 500 requests"

    some()
    assert reachable(engine) == held
    assert abs(calls(some) - work) <= 0.01 * work, "a request costs the same behind 10 000 others"
    assert happened["preempted"] > 100
