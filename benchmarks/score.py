"""Speech codes to embeddings: transformers' speech encoder, ours, and the engine's ranking in both of its modes.

Candidates of one length go through as they are; ragged ones as the original does it, all filled up to one length, or
each at its own ("trimmed": other embeddings, judged against transformers' of one candidate after the other).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, Task, measure
from benchmarks.kernels import name_of
from benchmarks.models import our_model, stock_model
from clvp_fast.engine.ranking import Ranker

SHAPES = {
    "cpu": (dict(candidates=16, length=200), dict(candidates=16, shortest=40, length=200, padded_to=500)),
    "cuda": (dict(candidates=256, length=500), dict(candidates=256, shortest=100, length=500, padded_to=500)),
}
SMOKE = (dict(candidates=3, length=9), dict(candidates=3, shortest=4, length=9, padded_to=12))
TEXT = list(range(3, 33))
# By dtype, how far embeddings may be from transformers' in float32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for shape in SMOKE if smoke else SHAPES[device]:
        yield Task(shape, partial(rows, device, shape, smoke))


def make_codes(shape: dict) -> list[torch.Tensor]:
    """Candidates on the host, each `[length]` int64; ragged ones of lengths that are spread evenly."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.linspace(shape.get("shortest", shape["length"]), shape["length"], shape["candidates"]).long()
    return [torch.randint(0, 8192, (length,), generator=generator) for length in lengths.tolist()]


def rows(device: str, shape: dict, smoke: bool) -> list[dict]:
    codes = make_codes(shape)
    tokens = {"trimmed": sum(map(len, codes))}
    tokens["padded"] = shape["candidates"] * shape.get("padded_to", shape["length"])
    stock = stock_model(device, smoke=smoke)
    with torch.no_grad():
        batch = _padded(stock, codes, shape).to(device)
        expected = {"padded": _normalised(stock.speech_encoder_model(input_ids=batch).embeds)}
        alone = [stock.speech_encoder_model(input_ids=row[None].to(device)).embeds for row in codes]
        expected["trimmed"] = _normalised(torch.cat(alone))
        providers = [
            provider
            for name, dtype, mode, run in _runs(device, shape, smoke, codes, batch)
            for provider in [_provider(name, dtype, mode, run, expected, our_model(device, smoke=smoke), tokens)]
        ]
    return measure("score", shape, providers, 1 if smoke else 3 if "padded_to" in shape else 5)


def _runs(device: str, shape: dict, smoke: bool, codes, batch) -> Iterator[tuple[str, torch.dtype, str, Callable]]:
    """Name, dtype, mode and run of every provider."""

    def encode(encoder):
        return lambda: encoder(input_ids=batch).embeds

    stock_dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16)
    for dtype in stock_dtypes:
        model = stock_model(device, dtype, smoke)
        yield f"transformers {name_of(dtype)}", dtype, "padded", encode(model.speech_encoder_model)
    for dtype in TOLERANCE:
        model = our_model(device, dtype, smoke)
        yield f"clvp_fast {name_of(dtype)}", dtype, "padded", encode(model.speech_encoder_model)
        ranker = Ranker(model)
        for mode in ("padded", "trimmed") if "padded_to" in shape else ("trimmed",):

            def rank(ranker=ranker, mode=mode):
                return ranker.rank(TEXT, codes, mode, shape.get("padded_to", shape["length"]) + 1).speech_embeds

            yield f"clvp_fast engine, {mode}, {name_of(dtype)}", dtype, mode, rank


def _provider(name, dtype, mode, run, expected, model, tokens) -> Provider:
    error = float((_normalised(run()) - expected[mode]).norm() / expected[mode].norm())
    parameters = sum(p.numel() for layer in model.speech_encoder_model.layers for p in layer.parameters())
    counted = {"dtype": name_of(dtype), "flop": 2 * parameters * tokens[mode], "encoded_tokens": tokens[mode]}

    @torch.no_grad()
    def timed():
        return run()

    return Provider(name, timed, error, TOLERANCE[dtype], counted=counted)


def _padded(stock, codes: list[torch.Tensor], shape: dict) -> torch.Tensor:
    """`[candidates, padded_to]`, ends made as the original makes them; codes of one length as they are."""
    if "padded_to" not in shape:
        return torch.stack(codes)
    config = stock.config.decoder_config
    rows = torch.stack([F.pad(row, (0, shape["padded_to"] - len(row)), value=config.eos_token_id) for row in codes])
    return stock.fix_speech_decoder_output(F.pad(rows, (1, 0), value=config.bos_token_id))


def _normalised(embeds: torch.Tensor) -> torch.Tensor:
    return F.normalize(embeds.float(), dim=-1)
