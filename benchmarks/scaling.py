"""The growth of the time of a whole call of the engine: with candidates, text, clips of a voice, and requests at once.

One number at a time is varied from a call of `scaling_model.Call`'s defaults, so that several sweeps share that call.
A run meets its voice for the first time and goes from clips and token ids to ranked candidates, which have all their
tokens; its parts are voice (features, encoder, the text's embeddings), decode (with the prefill) and rank. The engine
has as many slots as it takes by itself; candidates beyond them wait. `benchmarks/scaling_model.py` says what to expect.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from time import perf_counter

import numpy as np
import torch

from benchmarks.end_to_end import Timed
from benchmarks.harness import Provider, Task, task
from benchmarks.kernels import name_of
from benchmarks.scaling_model import Call
from benchmarks.tiers import TIERS, engine_error, engine_of
from clvp_fast import CandidateRequest, SamplingParams
from clvp_fast.engine.memory import CPU_BATCH, MAX_BATCH

SECONDS = 6
BASE = {"cpu": Call(slots=CPU_BATCH), "cuda": Call(new_tokens=250, slots=MAX_BATCH)}
SMOKE = Call(candidates=2, text_tokens=5, new_tokens=3, slots=4)
SWEEPS = {
    "cpu": {
        "candidates": (1, 4, 16, 64),
        "text_tokens": (10, 60, 150, 300),
        "clips": (1, 2, 4),
        "requests": (1, 4, 16),
    },
    "cuda": {
        "candidates": (256, 1, 16, 64, 512, 4, 128),
        "text_tokens": (10, 60, 150, 300),
        "clips": (1, 4, 16),
        "requests": (16, 1, 4, 64),
    },
}
SMOKE_SWEEPS = {"candidates": (6,), "requests": (3,)}


def calls(device: str, smoke: bool = False) -> list[Call]:
    """Return every call once, in the order of the sweeps."""
    base, sweeps = (SMOKE, SMOKE_SWEEPS) if smoke else (BASE[device], SWEEPS[device])
    return list(dict.fromkeys(replace(base, **{name: value}) for name, values in sweeps.items() for value in values))


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for call in calls(device, smoke):
        name = f"clvp_fast engine, {TIERS[device][0].name}"
        makers = {name: partial(_made, device, call, smoke, name)}
        counted = {"tokens": call.tokens, "dtype": name_of(TIERS[device][0].dtype)}
        yield task("scaling", asdict(call), makers, 1 if smoke else 3, **counted)


@cache
def _engine(device: str, smoke: bool):
    """Make one engine for all calls of a device, in its first precision tier."""
    base = SMOKE if smoke else BASE[device]
    prompts = max(min(call.requests, call.slots) for call in calls(device, smoke))
    return engine_of(TIERS[device][0], device, smoke, base.slots, base.new_tokens, prompts)


def _made(device: str, call: Call, smoke: bool, name: str) -> Provider:
    tier, engine = TIERS[device][0], _engine(device, smoke)
    requests = requests_of(call, engine.processor.feature_extractor.sampling_rate)
    settings = SamplingParams(call.candidates, max_new_tokens=call.new_tokens, seed=0)
    timed = Timed(partial(whole_call, engine, settings), requests)
    error = engine_error(tier, device, smoke, call.text_tokens)
    return Provider(name, timed, error, tier.tolerance, counted=timed.told)


def requests_of(call: Call, sampling_rate: int) -> list[CandidateRequest]:
    """Make requests of different texts and one voice, from random numbers."""
    generator = np.random.default_rng(0)
    clips = [generator.normal(0, 0.1, SECONDS * sampling_rate).astype(np.float32) for _ in range(call.clips)]
    texts = generator.integers(3, 250, (call.requests, call.text_tokens))
    return [
        CandidateRequest(input_ids=torch.from_numpy(ids), audio=clips, sampling_rate=sampling_rate) for ids in texts
    ]


def whole_call(engine, settings: SamplingParams, requests: list[CandidateRequest]) -> dict[str, float]:
    """Return the seconds of a call's parts. Raises `RuntimeError` where a candidate lacks tokens."""
    engine.voices.clear()  # every call meets its voices for the first time
    begin = perf_counter()
    results = list(engine.generate(requests, settings))
    whole = perf_counter() - begin
    for result in results:
        if result.error is not None:
            raise RuntimeError(str(result.error)) from result.error
        if result.codes.shape != (settings.num_candidates, settings.max_new_tokens) or result.stopped.any():
            raise RuntimeError(f"candidates should have {settings.max_new_tokens} tokens, and have {result.lengths}")
    voice, rank = (sum(result.timings[name] for result in results) for name in ("prepare", "rank"))
    return {"voice": voice, "decode": whole - voice - rank, "rank": rank}
