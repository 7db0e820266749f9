"""Candidates for one text: transformers' whole `generate` (conditioning, decoding, scoring), ours, the engine.

Every candidate has the full number of tokens. The error is that of logits; the workload `precision` measures the
changes of a precision tier over many steps. Memory is that of a process that does nothing else
(`benchmarks/peak_memory.py`).
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, Task, task
from benchmarks.kernels import name_of
from benchmarks.models import inputs, our_model, stock_model
from benchmarks.peak_memory import peak_memory
from benchmarks.rivals.torch_generator import TorchGenerator
from benchmarks.tiers import FP32, TIERS, Tier, compared_logits, engine_error, engine_of, furthest_logit
from clvp_fast import CandidateRequest, SamplingParams

TEXT_TOKENS = {"cpu": 30, "cuda": 60}
SHAPES = {"cpu": ((16, 64),), "cuda": ((256, 500), (1, 500))}
SMOKE = ((3, 5),)


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for candidates, new_tokens in SMOKE if smoke else SHAPES[device]:
        shape = {"candidates": candidates, "new_tokens": new_tokens, "text_tokens": TEXT_TOKENS[device]}
        yield _task(device, shape, smoke)


STATIC = "transformers, static cache, torch.compile"


def _task(device: str, shape: dict, smoke: bool) -> Task:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    name, absent = name_of(dtype), {}
    model_of = {"stock": partial(stock_model, device, dtype, smoke), "ours": partial(our_model, device, dtype, smoke)}
    ways = {
        f"transformers {name}": (model_of["stock"], {}),
        f"{STATIC}, {name}": (model_of["stock"], {"cache_implementation": "static"}),
        f"clvp_fast in transformers' loop, {name}": (model_of["ours"], {"use_engine": False}),
        f"clvp_fast generate(), {name}": (model_of["ours"], {"use_engine": True}),
    }
    # transformers is not compiled on a CPU, and the workload decode_step measures many candidates in less time.
    why_not = "for a GPU" if device == "cpu" else "of one candidate alone" if shape["candidates"] > 1 else None
    if why_not is not None:
        absent[STATIC] = why_not
        del ways[f"{STATIC}, {name}"]
    makers = {name: partial(_class, name, *way, device, dtype, shape, smoke) for name, way in ways.items()}
    torch_name = f"torch {name}, static cache{', captured' if device == 'cuda' else ''}"
    makers[torch_name] = partial(_torch, torch_name, device, dtype, shape, smoke)
    for tier in TIERS[device]:
        makers[f"clvp_fast engine, {tier.name}"] = partial(_engine, tier, device, shape, smoke)
    tokens = shape["candidates"] * shape["new_tokens"]
    return task("generate", shape, makers, 1 if smoke else 3 if device == "cpu" else 2, absent, tokens=tokens)


def _tolerance(device: str, dtype: torch.dtype) -> float:
    return next(tier.tolerance for tier in TIERS[device] if tier.dtype == dtype)


def _class(
    name: str, model_of: Callable, options: dict, device: str, dtype: torch.dtype, shape: dict, smoke: bool
) -> Provider:
    model, text_tokens = model_of(), shape["text_tokens"]
    if name.startswith("clvp_fast"):
        _require_equal_greedy_tokens(device, smoke, text_tokens)
        error = _class_error(model, device, smoke, text_tokens)
    else:
        expected = _forced_logits(stock_model(device, smoke=smoke), device, text_tokens, {})
        error = furthest_logit(_forced_logits(model, device, text_tokens, options), expected)
    return Provider(name, partial(class_generate, model, device, shape, options), error, _tolerance(device, dtype))


def _torch(name: str, device: str, dtype: torch.dtype, shape: dict, smoke: bool) -> Provider:
    model, text_tokens = stock_model(device, dtype, smoke), shape["text_tokens"]
    generator = TorchGenerator(model, shape["candidates"], shape["new_tokens"], capture=device == "cuda")
    prompt, tokens, expected = compared_logits(device, smoke, text_tokens)
    found = []
    generator.prefill(prompt.to(dtype))
    for place in range(min(len(tokens), shape["new_tokens"])):
        if place:
            generator.token.fill_(int(tokens[place]))
            generator.step(place)
        found.append(generator.logits[0].clone())
    error = furthest_logit(torch.stack(found), expected[: len(found)])
    ids, features = inputs(text_tokens, device)
    run = partial(generator, ids, features.to(dtype))
    return Provider(name, run, error, _tolerance(device, dtype))


def _engine(tier: Tier, device: str, shape: dict, smoke: bool) -> Provider:
    _require_equal_greedy_tokens(device, smoke, shape["text_tokens"])
    # Before the engine is made: its pages and those of the process that is measured would not fit beside each other.
    memory = peak_memory(tier.name, device, shape, smoke) if shape["candidates"] > 1 else {}
    engine = engine_of(tier, device, smoke, shape["candidates"], shape["new_tokens"])
    error = engine_error(tier, device, smoke, shape["text_tokens"])
    run = partial(engine_generate, engine, device, shape)
    return Provider(f"clvp_fast engine, {tier.name}", run, error, tier.tolerance, counted=memory)


def class_generate(model, device: str, shape: dict, options: dict):
    ids, features = inputs(shape["text_tokens"], device)
    torch.manual_seed(0)
    return model.generate(
        ids,
        features.to(model.dtype),
        max_new_tokens=shape["new_tokens"],
        num_return_sequences=shape["candidates"],
        do_sample=True,
        top_k=SamplingParams.top_k,
        top_p=SamplingParams.top_p,
        temperature=SamplingParams.temperature,
        repetition_penalty=SamplingParams.repetition_penalty,
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
def _forced_logits(stock, device: str, text_tokens: int, options: dict, count: int = 3) -> torch.Tensor:
    """Return logits `[count, vocab_size]` of transformers' decoder loop, which is made to draw 0, 1, 2 and so on."""
    ids, features = inputs(text_tokens, device)
    prompt = stock.conditioning_encoder(input_ids=F.pad(ids, (0, 1)), input_features=features.to(stock.dtype))
    drawn = itertools.count()

    def force(tokens, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(next(drawn), device=device), 0.0)

    options = options | {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    found = stock.speech_decoder_model.generate(
        conditioning_embeds=prompt, max_new_tokens=count, logits_processor=[force], **options
    )
    return torch.cat(found.logits).float()


@torch.no_grad()
def _class_error(model, device: str, smoke: bool, text_tokens: int) -> float:
    """Return the largest distance of the logits behind the prompt from transformers' in float32."""
    ids, features = inputs(text_tokens, device)
    logits = []
    for each in (stock_model(device, smoke=smoke), model):
        prompt = each.conditioning_encoder(input_features=features.to(each.dtype), input_ids=ids)
        logits.append(each.speech_decoder_model(inputs_embeds=prompt).logits[:, -1].float())
    expected, got = logits
    return furthest_logit(got, expected)


@cache
@torch.no_grad()
def _require_equal_greedy_tokens(device: str, smoke: bool, text_tokens: int, count: int = 4) -> None:
    """Raise where greedy decoding in float32 draws other tokens than transformers' loop with the mask that is right."""
    ids, features = inputs(text_tokens, device)
    stock, ours = stock_model(device, smoke=smoke), our_model(device, smoke=smoke)
    # Our encoder adds the end token after the text itself; transformers' expects it in the input.
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
