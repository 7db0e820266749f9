"""Candidates for one text: transformers' whole `generate` (conditioning, decoding, scoring), ours, the engine.

Every candidate has all its tokens. The error is that of logits; what a precision tier changes over many steps is told
by the workload `precision`. Memory is that of a process that does nothing else (`benchmarks/peak_memory.py`).
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, Task, measure
from benchmarks.models import inputs, our_model, stock_model
from benchmarks.peak_memory import peak_memory
from benchmarks.tiers import FP32, TIERS, Tier, engine_error, engine_of, furthest_logit
from clvp_fast import CandidateRequest, SamplingParams

TEXT_TOKENS = {"cpu": 30, "cuda": 60}
SHAPES = {"cpu": ((16, 64),), "cuda": ((256, 500), (1, 500))}
SMOKE = ((3, 5),)


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for candidates, new_tokens in SMOKE if smoke else SHAPES[device]:
        shape = {"candidates": candidates, "new_tokens": new_tokens, "text_tokens": TEXT_TOKENS[device]}
        yield Task(shape, partial(rows, device, shape, smoke))


def rows(device: str, shape: dict, smoke: bool) -> list[dict]:
    candidates, new_tokens, text_tokens = shape["candidates"], shape["new_tokens"], shape["text_tokens"]
    weights = sum(p.numel() for p in our_model(device, smoke=smoke).speech_decoder_model.parameters())
    common = {"decoder_parameters": weights, "tokens": candidates * new_tokens}
    _require_equal_greedy_tokens(device, smoke, text_tokens)
    providers = []
    for name, dtype, model, options in _classes(device, smoke):
        run = partial(class_generate, model, device, shape, options)
        error = _class_error(model, device, smoke, text_tokens) if name.startswith("clvp_fast") else 0.0
        tolerance = next(tier.tolerance for tier in TIERS[device] if tier.dtype == dtype)
        providers.append(Provider(name, run, error, tolerance))
    for tier in TIERS[device]:
        run = partial(engine_generate, engine_of(tier, device, smoke, candidates, new_tokens), device, shape)
        error = engine_error(tier, device, smoke, text_tokens)
        memory = peak_memory(tier.name, device, shape, smoke) if candidates > 1 else {}
        providers.append(Provider(f"clvp_fast engine, {tier.name}", run, error, tier.tolerance, counted=memory))
    return measure("generate", shape, providers, 1 if smoke else 3 if device == "cpu" else 2, **common)


def _classes(device: str, smoke: bool) -> Iterator[tuple[str, torch.dtype, object, dict]]:
    """transformers' class and ours, the latter over transformers' loop and as it decodes by default."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    model = our_model(device, dtype, smoke)
    yield f"transformers {name}", dtype, stock_model(device, dtype, smoke), {}
    yield f"clvp_fast in transformers' loop, {name}", dtype, model, {"use_engine": False}
    yield f"clvp_fast generate(), {name}", dtype, model, {"use_engine": True}


def class_generate(model, device: str, shape: dict, options: dict):
    ids, features = inputs(shape["text_tokens"], device)
    torch.manual_seed(0)
    return model.generate(
        ids,
        features.to(model.dtype),
        max_new_tokens=shape["new_tokens"],
        num_return_sequences=shape["candidates"],
        do_sample=True,
        top_k=0,
        top_p=0.8,
        temperature=0.8,
        repetition_penalty=2.0,
        return_dict_in_generate=True,
        eos_token_id=8193,
        **options,
    )


def engine_generate(engine, device: str, shape: dict):
    ids, features = inputs(shape["text_tokens"], device)
    settings = SamplingParams(shape["candidates"], max_new_tokens=shape["new_tokens"], seed=0)
    (result,) = engine.generate(CandidateRequest(input_ids=ids[0], input_features=features), settings)
    if result.error is not None:
        raise RuntimeError(str(result.error)) from result.error
    if not (result.lengths == shape["new_tokens"]).all():
        raise RuntimeError(f"candidates should have {shape['new_tokens']} tokens each, and have {result.lengths}")
    return result


@torch.no_grad()
def _class_error(model, device: str, smoke: bool, text_tokens: int) -> float:
    """How far the logits behind the prompt are from transformers' in float32."""
    ids, features = inputs(text_tokens, device)
    logits = []
    for each in (stock_model(device, smoke=smoke), model):
        prompt = each.conditioning_encoder(input_features=features.to(each.dtype), input_ids=ids)
        logits.append(each.speech_decoder_model(inputs_embeds=prompt).logits[:, -1].float())
    expected, got = logits
    return furthest_logit(got, expected)


@torch.no_grad()
def _require_equal_greedy_tokens(device: str, smoke: bool, text_tokens: int, count: int = 4) -> None:
    """Raise where greedy decoding in float32 draws other tokens than transformers' loop with the mask that is right."""
    ids, features = inputs(text_tokens, device)
    stock, ours = stock_model(device, smoke=smoke), our_model(device, smoke=smoke)
    # Our encoder puts the end token behind the text by itself; transformers' wants it there.
    prompt = stock.conditioning_encoder(input_features=features, input_ids=F.pad(ids, (0, 1)))
    mask = torch.ones(1, prompt.shape[1] + 1, dtype=torch.long, device=device)
    expected = stock.speech_decoder_model.generate(
        conditioning_embeds=prompt, attention_mask=mask, max_new_tokens=count
    )[0]
    classes = ours.generate(ids, features, max_new_tokens=count, return_dict_in_generate=True).sequences[0]
    engine = engine_of(Tier("", FP32, 0), device, smoke, 1, count)
    request = CandidateRequest(input_ids=ids[0], input_features=features)
    (result,) = engine.generate(request, SamplingParams(do_sample=False, max_new_tokens=count, repetition_penalty=1.0))
    drawn = torch.from_numpy(result.codes[0]).to(device)
    if not torch.equal(expected, classes) or not torch.equal(expected[1:], drawn):
        raise RuntimeError("greedy tokens differ from those of transformers' decoder loop: nothing is timed")
