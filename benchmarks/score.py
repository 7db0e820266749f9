"""Speech codes to embeddings: transformers' speech encoder, ours, and the engine's ranking in both of its modes.

Candidates of one length go through as they are; ragged ones as the original does it, all filled up to one length, or
each at its own ("trimmed": other embeddings, judged against transformers' of one candidate after the other). The engine
ranks in bfloat16 by a copy beside a model in float32 (`score_dtype`), whose ranks are compared for random texts. Of its
ranking on a CPU the time is told by part.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, Task, task
from benchmarks.kernels import name_of
from benchmarks.models import our_model, stock_model
from clvp_fast.engine.ranking import Ranker

SHAPES = {
    "cpu": (
        dict(candidates=16, length=200),
        dict(candidates=4, length=500),
        dict(candidates=16, shortest=40, length=200, padded_to=500),
    ),
    "cuda": (dict(candidates=256, length=500), dict(candidates=256, shortest=100, length=500, padded_to=500)),
}
SMOKE = (dict(candidates=3, length=9), dict(candidates=3, shortest=4, length=9, padded_to=12))
TEXT = list(range(3, 33))
# Parts of scoring, by pieces of names in torch's profiler; all others are norms, rotary positions and copies.
PARTS = {
    "products": ("::linear", "::mm", "::addmm", "_mlp"),
    "attention": ("attention", "::bmm", "::baddbmm", "softmax"),
}
# The number of random texts for which ranks are compared.
TEXTS = 24
# By dtype, how far embeddings may be from transformers' in float32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    for shape in SMOKE if smoke else SHAPES[device]:
        yield _task(device, shape, smoke)


def make_codes(shape: dict) -> list[torch.Tensor]:
    """Make candidates on the host, each `[length]` int64; ragged ones have lengths that are spread evenly."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.linspace(shape.get("shortest", shape["length"]), shape["length"], shape["candidates"]).long()
    return [torch.randint(0, 8192, (length,), generator=generator) for length in lengths.tolist()]


def _task(device: str, shape: dict, smoke: bool) -> Task:
    shared = cache(partial(Shared, device, shape, smoke))
    makers = {name: partial(_made, shared, name, *way) for name, *way in _ways(device, shape, smoke)}
    return task("score", shape, makers, 1 if smoke else 3 if "padded_to" in shape else 5)


class Shared:
    """The candidates of a shape, and what is right of them.

    tokens: that are encoded, by mode. expected: by mode, transformers' embeddings in float32, normalised. texts:
        embeddings of random texts, as the expected ones.
    """

    @torch.no_grad()
    def __init__(self, device: str, shape: dict, smoke: bool):
        self.codes = make_codes(shape)
        self.tokens = {"trimmed": sum(map(len, self.codes))}
        self.tokens["padded"] = shape["candidates"] * shape.get("padded_to", shape["length"])
        stock = stock_model(device, smoke=smoke)
        self.batch = _padded(stock, self.codes, shape).to(device)
        self.expected = {"padded": _normalised(stock.speech_encoder_model(input_ids=self.batch).embeds)}
        alone = [stock.speech_encoder_model(input_ids=row[None].to(device)).embeds for row in self.codes]
        self.expected["trimmed"] = _normalised(torch.cat(alone))
        ours = our_model(device, smoke=smoke)
        self.parameters = sum(p.numel() for p in ours.speech_encoder_model.layers.parameters())
        generator = torch.Generator().manual_seed(3)
        texts = torch.randint(3, 250, (TEXTS, len(TEXT)), generator=generator).to(device)
        self.texts = _normalised(ours.text_encoder_model(input_ids=texts).embeds)


def _ways(device: str, shape: dict, smoke: bool) -> Iterator[tuple[str, torch.dtype, str, Callable]]:
    """Name, dtype, mode of every provider, and `Shared -> embeddings`, which is made when the provider is."""

    def encode(model_of: Callable, dtype: torch.dtype) -> Callable:
        return lambda shared: model_of(device, dtype, smoke).speech_encoder_model(input_ids=shared.batch).embeds

    def rank(dtype: torch.dtype, mode: str) -> Callable:
        ranker = cache(lambda: Ranker(our_model(device, smoke=smoke), dtype=dtype))
        longest = shape.get("padded_to", shape["length"]) + 1
        return lambda shared: ranker().rank(TEXT, shared.codes, mode, longest).speech_embeds

    for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
        yield f"transformers {name_of(dtype)}", dtype, "padded", encode(stock_model, dtype)
    for dtype in TOLERANCE:
        yield f"clvp_fast {name_of(dtype)}", dtype, "padded", encode(our_model, dtype)
        for mode in ("padded", "trimmed") if "padded_to" in shape else ("trimmed",):
            yield f"clvp_fast engine, {mode}, {name_of(dtype)}", dtype, mode, rank(dtype, mode)


@torch.no_grad()
def _made(shared: Callable[[], Shared], name: str, dtype: torch.dtype, mode: str, way: Callable) -> Provider:
    common = shared()
    run = partial(way, common)
    found, expected = _normalised(run()), common.expected[mode]
    error = float((found - expected).norm() / expected.norm())
    tokens = common.tokens[mode]
    counted = {"dtype": name_of(dtype), "flop": 2 * common.parameters * tokens, "encoded_tokens": tokens}
    if "engine" in name and dtype != torch.float32:
        counted |= ranks(common.texts @ found.T, common.texts @ expected.T)
    if "engine" in name and common.batch.device.type == "cpu":
        counted["parts"] = parts_of(run)
    return Provider(name, torch.no_grad()(run), error, TOLERANCE[dtype], counted=counted)


def ranks(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Compare ranks by scores `[texts, candidates]` with the expected ones.

    Returns Spearman's correlation, the mean over the texts, and the share of texts with the same best candidate.
    """
    places = torch.stack([scores.argsort(1).argsort(1).double() for scores in (found, expected)])
    places -= places.mean(2, keepdim=True)
    found_places, expected_places = F.normalize(places, dim=2)
    return {
        "rank_correlation": float((found_places * expected_places).sum(1).mean()),
        "same_best": float((found.argmax(1) == expected.argmax(1)).double().mean()),
    }


def parts_of(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of `PARTS` and of the rest in one run on a CPU, as torch's profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    parts = dict.fromkeys((*PARTS, "rest"), 0.0)
    for event in profile.key_averages():
        part = next((part for part, names in PARTS.items() if any(name in event.key for name in names)), "rest")
        parts[part] += event.self_cpu_time_total / 1e6
    return parts


def _padded(stock, codes: list[torch.Tensor], shape: dict) -> torch.Tensor:
    """Return `[candidates, padded_to]`, with the original's ends; codes of one length stay as they are."""
    if "padded_to" not in shape:
        return torch.stack(codes)
    config = stock.config.decoder_config
    rows = torch.stack([F.pad(row, (0, shape["padded_to"] - len(row)), value=config.eos_token_id) for row in codes])
    return stock.fix_speech_decoder_output(F.pad(rows, (1, 0), value=config.bos_token_id))


def _normalised(embeds: torch.Tensor) -> torch.Tensor:
    return F.normalize(embeds.float(), dim=-1)
