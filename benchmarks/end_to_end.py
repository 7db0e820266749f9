"""A text and a clip to the three best of a preset's candidates, and where the time goes.

Every candidate has all its tokens. The engine's parts are features, voice (the conditioning encoder), prompt (text to
embeddings, and its place in the queue), decode and rank; transformers' are features and tokens, and `generate`, which
decodes and scores. The error is that of logits, as in the workload `generate`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import numpy as np
import torch

from benchmarks.harness import Provider, Task, task
from benchmarks.kernels import name_of
from benchmarks.models import stock_model
from benchmarks.tiers import TIERS, Tier, engine_error, engine_of
from clvp_fast import CandidateRequest, ClvpProcessor, SamplingParams
from clvp_fast.demo import random_checkpoint

TEXT = "The birch canoe slid on the smooth planks, and the doctor paid 25 dollars for it."
KEEP, SECONDS = 3, 6
# Preset and tokens a candidate.
SHAPES = {"cpu": (("ultra_fast", 32),), "cuda": (("standard", 500), ("ultra_fast", 500))}
SMOKE = (("ultra_fast", 4),)


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for preset, new_tokens in SMOKE if smoke else SHAPES[device]:
        yield _task(device, preset, new_tokens, smoke)


class Timed:
    """Runs `call(samples)`, which returns the seconds of its parts; `told["parts"]` are those of all its runs."""

    def __init__(self, call: Callable[[np.ndarray], dict[str, float]], samples: np.ndarray):
        self.call, self.samples, self.parts, self.told = call, samples, [], {}

    def __call__(self) -> None:
        self.parts.append(self.call(self.samples))
        kept = self.parts[1:]  # the first run warms up
        if kept:
            self.told["parts"] = {name: float(np.median([parts[name] for parts in kept])) for name in kept[0]}


def _task(device: str, preset: str, new_tokens: int, smoke: bool) -> Task:
    settings = SamplingParams.preset(preset, max_new_tokens=new_tokens, seed=0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    makers = {f"transformers {name_of(dtype)}": partial(_transformers, device, dtype, settings, smoke)}
    for tier in TIERS[device]:
        makers[f"clvp_fast engine, {tier.name}"] = partial(_engine, device, tier, settings, smoke)
    tokens = settings.num_candidates * new_tokens
    shape = {"preset": preset, "new_tokens": new_tokens}
    return task("end_to_end", shape, makers, 1 if smoke else 3, tokens=tokens)


def _transformers(device: str, dtype: torch.dtype, settings: SamplingParams, smoke: bool) -> Provider:
    processor = ClvpProcessor.from_pretrained(random_checkpoint())
    call = partial(with_transformers, stock_model(device, dtype, smoke), processor, settings)
    return _provider(f"transformers {name_of(dtype)}", call, processor, 0.0, 0.0)


def _engine(device: str, tier: Tier, settings: SamplingParams, smoke: bool) -> Provider:
    engine = engine_of(tier, device, smoke, settings.num_candidates, settings.max_new_tokens)
    error = engine_error(tier, device, smoke, len(engine.processor.tokenizer(TEXT)["input_ids"]))
    call = partial(with_engine, engine, settings)
    return _provider(f"clvp_fast engine, {tier.name}", call, engine.processor, error, tier.tolerance)


def _provider(name: str, call: Callable, processor, error: float, tolerance: float) -> Provider:
    """Make a provider of `call(samples)` of one clip, which reports the parts of its time."""
    samples = np.random.default_rng(0).normal(0, 0.1, SECONDS * processor.feature_extractor.sampling_rate)
    timed = Timed(call, samples.astype(np.float32))
    return Provider(name, timed, error, tolerance, counted=timed.told)


def with_engine(engine, settings: SamplingParams, samples: np.ndarray) -> dict[str, float]:
    extractor = engine.processor.feature_extractor
    engine.voices.clear()  # every run meets the voice for the first time
    begin = perf_counter()
    features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
    extracted = perf_counter()
    voice = engine.voices.from_features(features)
    _wait(engine.model)
    encoded = perf_counter()
    (result,) = engine.generate(CandidateRequest(text=TEXT, conditioning=voice), settings, keep=KEEP)
    if result.error is not None:
        raise RuntimeError(str(result.error)) from result.error
    if [len(codes) for _, codes, _ in result.best(KEEP)] != [settings.max_new_tokens] * KEEP:
        raise RuntimeError(f"candidates should have {settings.max_new_tokens} tokens each, and have {result.lengths}")
    timings = result.timings
    return {
        "features": extracted - begin,
        "voice": encoded - extracted,
        "prompt": timings["prepare"] + timings["queue"],
        "decode": timings["decode"],
        "rank": timings["rank"],
    }


@torch.no_grad()
def with_transformers(model, processor, settings: SamplingParams, samples: np.ndarray) -> dict[str, float]:
    begin = perf_counter()
    rate = processor.feature_extractor.sampling_rate
    inputs = processor(raw_speech=samples, sampling_rate=rate, text=TEXT, return_tensors="pt")
    extracted = perf_counter()
    torch.manual_seed(0)
    output = model.generate(
        inputs["input_ids"].to(model.device),
        inputs["input_features"].to(model.device, model.dtype),
        max_new_tokens=settings.max_new_tokens,
        num_return_sequences=settings.num_candidates,
        do_sample=True,
        top_k=settings.top_k,
        top_p=settings.top_p,
        temperature=settings.temperature,
        repetition_penalty=settings.repetition_penalty,
        return_dict_in_generate=True,
        eos_token_id=model.config.decoder_config.eos_token_id,
    )
    best = output.logits_per_text[0].topk(KEEP).indices
    output.speech_ids[best].cpu()
    return {"features": extracted - begin, "generate": perf_counter() - extracted}


def _wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
