"""The work before the first token: a clip to the voice's embedding, and a text to the first of its tokens.

transformers' encoder and ours get the same clip. The first token of a known voice is the first that the engine's
`stream()` yields: prefill and one step. Of transformers it is a pass over the prompt; of ONNX Runtime, in a process of
its own, a pass over the prompt and the start token, with keys and values of all of them. Its error is that of logits,
as in the workload `generate`.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.decode_rivals import RIVALS, Rival
from benchmarks.decode_step import layers_of
from benchmarks.harness import Provider, Task, task
from benchmarks.kernels import name_of
from benchmarks.models import inputs, our_model, stock_model
from benchmarks.rivals import onnx_prompt, onnx_runtime
from benchmarks.rivals.decoder_process import RivalProcess
from benchmarks.tiers import TIERS, Tier, compared_logits, engine_error, engine_of, furthest_logit
from clvp_fast import CandidateRequest, SamplingParams

CLIP = {"clip_seconds": 6}
SHAPES = (CLIP, {"text_tokens": 60})
SMOKE = (CLIP, {"text_tokens": 9})
GREEDY = SamplingParams(do_sample=False, max_new_tokens=2, repetition_penalty=1.0)
# By dtype, how far a voice's embedding may be from transformers' in float32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for shape in SMOKE if smoke else SHAPES:
        makers = dict(_voices(device, smoke) if shape == CLIP else _first_tokens(device, shape["text_tokens"], smoke))
        yield task("first_token", shape, makers, 1 if smoke else 7)


def _voices(device: str, smoke: bool) -> Iterator[tuple[str, Callable[[], Provider]]]:
    for owner, model_of in ("transformers", stock_model), ("clvp_fast", our_model):
        for dtype in (torch.float32,) if device == "cpu" and owner == "transformers" else TOLERANCE:
            name = f"{owner} {name_of(dtype)}"
            yield name, partial(_voice, name, model_of, device, dtype, smoke)


@torch.no_grad()
def _voice(name: str, model_of: Callable, device: str, dtype: torch.dtype, smoke: bool) -> Provider:
    ids, features = inputs(1, device)
    expected = stock_model(device, smoke=smoke).conditioning_encoder(input_ids=ids, input_features=features)
    encoder = model_of(device, dtype, smoke).conditioning_encoder
    run = partial(encoder, input_ids=ids, input_features=features.to(dtype))
    # The voice comes first; the text's embeddings behind it depend on who adds its end token.
    found, expected = run()[0, 0].float(), expected[0, 0]
    error = float((found - expected).norm() / expected.norm())
    return Provider(name, torch.no_grad()(run), error, TOLERANCE[dtype])


def _first_tokens(device: str, text_tokens: int, smoke: bool) -> Iterator[tuple[str, Callable[[], Provider]]]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    name = f"transformers {name_of(dtype)}"
    yield name, partial(_transformers, name, device, dtype, text_tokens, smoke)
    for rival in RIVALS if device == "cpu" else ():
        if rival.module is onnx_runtime:
            yield rival.name, partial(_onnx, rival, text_tokens, smoke)
    for tier in TIERS[device]:
        name = f"clvp_fast engine, {tier.name}"
        yield name, partial(_engine, name, tier, device, text_tokens, smoke)


@torch.no_grad()
def _transformers(name: str, device: str, dtype: torch.dtype, text_tokens: int, smoke: bool) -> Provider:
    prompt, *_ = compared_logits(device, smoke, text_tokens)
    run = partial(stock_model(device, dtype, smoke).speech_decoder_model, inputs_embeds=prompt[None].to(dtype))
    return Provider(name, torch.no_grad()(run), 0.0, 0.0)


@torch.no_grad()
def _onnx(rival: Rival, text_tokens: int, smoke: bool) -> Provider:
    prompt, tokens, expected = compared_logits("cpu", smoke, text_tokens)
    settings = rival.settings(1)
    process = RivalProcess(onnx_prompt, layers_of(smoke), kind=rival.kind, settings=settings)
    start = process.layers.embedded(tokens[:1], torch.tensor([0]))
    error = furthest_logit(process.enter(hidden=torch.cat([prompt, start])), expected[:1])
    counted = {"process_bytes": process.peak_bytes(), "settings": settings}
    return Provider(rival.name, process.run, error, rival.tier.tolerance, counted=counted)


def _engine(name: str, tier: Tier, device: str, text_tokens: int, smoke: bool) -> Provider:
    error = engine_error(tier, device, smoke, text_tokens)
    engine = engine_of(tier, device, smoke, 1, GREEDY.max_new_tokens)
    ids, features = inputs(text_tokens, device)
    request = CandidateRequest(input_ids=ids[0], conditioning=engine.voices.from_features(features))

    def run() -> None:
        tokens = engine.stream(request, GREEDY)
        candidate, _ = next(tokens)
        tokens.close()
        assert candidate == 0

    return Provider(name, run, error, tier.tolerance)
