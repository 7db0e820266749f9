"""The engine's precision tiers, and how far each leads the decoder's logits from transformers' in float32.

A tier's changes over hundreds of steps, against float64, are measured by `benchmarks/precision.py`.
"""

import functools
from dataclasses import dataclass

import torch

from benchmarks.models import inputs, our_model, stock_model
from benchmarks.providers import Absent
from clvp_fast import CandidateEngine, ClvpProcessor
from clvp_fast.checkpoint import text_limit
from clvp_fast.demo import random_checkpoint
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.models.transformers_versions import CACHE
from clvp_fast.ops.paged_attention import FLOAT8
from clvp_fast.ops.panels import unserved

PAGE_SIZE = 16
# The number of tokens that are entered one by one when logits are compared.
_COMPARED = 4


@dataclass(frozen=True)
class Tier:
    """Types of weights, of pages, of the copies of weights that products run over, and of what they multiply.

    None: as the weights.

    tolerance: the most that logits may be off, relative to the largest, before the row is refused.
    """

    name: str
    dtype: torch.dtype
    tolerance: float
    page_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    activation_dtype: torch.dtype | None = None

    @property
    def options(self) -> dict:
        """For a `CandidateEngine` or a `Runner`, beside a model of `dtype`."""
        names = ("page_dtype", "weight_dtype", "activation_dtype")
        return {name: getattr(self, name) for name in names}


FP32, BF16 = torch.float32, torch.bfloat16
_INT8_BOTH = dict(weight_dtype=torch.int8, activation_dtype=torch.int8)
TIERS = {
    "cpu": (
        Tier("float32", FP32, 1e-4),
        Tier("bfloat16", BF16, 3e-2),
        Tier("float32, int8 weights", FP32, 5e-2, weight_dtype=torch.int8),
        Tier("bfloat16, int8 weights", BF16, 5e-2, weight_dtype=torch.int8),
        Tier("float32, int8 weights and activations", FP32, 1e-1, **_INT8_BOTH),
        Tier("bfloat16, int8 weights and activations", BF16, 1e-1, **_INT8_BOTH),
    ),
    "cuda": (
        Tier("bfloat16", BF16, 3e-2),
        Tier("bfloat16, float8 pages", BF16, 5e-2, page_dtype=FLOAT8),
        Tier("bfloat16, int8 weights", BF16, 5e-2, weight_dtype=torch.int8),
        Tier("float32", FP32, 1e-3),
    ),
}


def prompt_of(model, text_tokens: int, device: str) -> torch.Tensor:
    """Return `[prompt, hidden_size]`, carrying its positions, as `model` makes it."""
    ids, features = inputs(text_tokens, device)
    with torch.no_grad():
        encoder = model.conditioning_encoder
        return encoder(input_ids=ids, input_features=features.to(model.dtype))[0]


@torch.no_grad()
def stock_logits(stock, prompts: torch.Tensor, tokens: torch.Tensor, cache=None) -> torch.Tensor:
    """Return logits of transformers' decoder `[batch, n, vocab_size]` behind each of `tokens` `[batch, n]`.

    It adds positions of its own to the embeddings of what it reads; here they are those of a prompt that has its own.

    Args:
        prompts: `[batch, prompt, hidden_size]`.
        cache: a `DynamicCache` that is to be filled.
    """
    decoder = stock.speech_decoder_model.model.decoder
    places = torch.arange(tokens.shape[1], device=tokens.device)
    spoken = decoder.input_embeds_layer(tokens) + decoder.position_embeds_layer(places + (places > 0))
    embeds = torch.cat([prompts, spoken], 1)
    everywhere = torch.arange(embeds.shape[1], device=tokens.device)
    embeds = embeds - decoder.position_embeds_layer(everywhere)
    options = {"use_cache": False} if cache is None else {CACHE: cache, "use_cache": True}
    logits = stock.speech_decoder_model(inputs_embeds=embeds, position_ids=everywhere[None], **options).logits
    return logits[:, prompts.shape[1] :]


def furthest_logit(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of logits `[..., vocab_size]` of drawable tokens, over the largest logit."""
    drawn = expected.abs() < 1e3
    return float(((found.float() - expected).abs() * drawn).max() / expected[drawn].abs().max())


@functools.cache
def compared_logits(device: str, smoke: bool, text_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a prompt `[prompt, hidden_size]`, tokens `[n]`, and transformers' logits `[n, vocab_size]` behind them."""
    stock = stock_model(device, smoke=smoke)
    prompt = prompt_of(our_model(device, smoke=smoke), text_tokens, device)
    config = stock.config.decoder_config
    tokens = torch.randint(0, 8192, (_COMPARED,), generator=torch.Generator().manual_seed(3)).to(device)
    tokens[0] = config.bos_token_id
    return prompt, tokens, stock_logits(stock, prompt[None], tokens[None])[0]


@torch.inference_mode()
def engine_error(tier: Tier, device: str, smoke: bool, text_tokens: int) -> float:
    """Return the distance of the engine's decoder from transformers' logits, after a prefill and some steps."""
    prompt, tokens, expected = compared_logits(device, smoke, text_tokens)
    model = our_model(device, tier.dtype, smoke).speech_decoder_model
    decoder = PagedDecoder(model, weight_dtype=tier.weight_dtype, activation_dtype=tier.activation_dtype)
    shared = -(-len(prompt) // PAGE_SIZE)
    pages = decoder.pages(shared + 1, PAGE_SIZE, tier.page_dtype)
    number = dict(dtype=torch.int32, device=device)
    prefix_table = torch.arange(1, shared + 1, **number)[None]
    decoder.prefill(prompt.to(tier.dtype), torch.tensor([0, len(prompt)], **number), pages, prefix_table)
    found = []
    for place, token in enumerate(tokens):
        _, logits = decoder.step(
            token[None],
            torch.tensor([place], **number),
            torch.zeros(1, 1, **number),
            prefix_table,
            torch.tensor([len(prompt)], **number),
            torch.zeros(1, **number),
            pages,
            torch.zeros(1, decoder.num_heads, **number),
        )
        found.append(logits[0])
    return furthest_logit(torch.stack(found), expected)


def require_served(dtype: torch.dtype, activation_dtype: torch.dtype | None, device: str) -> None:
    """Raise `Absent` where no kernel multiplies activations in 8 bits, if they are."""
    weight = torch.zeros(1, 32, dtype=torch.int8, device=device)
    if activation_dtype is not None and (reason := unserved(dtype, weight, int8_x=True)) is not None:
        raise Absent(reason)


def engine_of(
    tier: Tier, device: str, smoke: bool, candidates: int, new_tokens: int, requests: int = 1
) -> CandidateEngine:
    """Make a warm engine for `candidates` at once, of so many `requests`, with the tokens of `random`."""
    require_served(tier.dtype, tier.activation_dtype, device)
    model = our_model(device, tier.dtype, smoke)
    # As many pages as are needed: several engines stand beside each other.
    pages = candidates * -(-new_tokens // PAGE_SIZE) + requests * (-(-text_limit(model) // PAGE_SIZE) + 1)
    options = dict(max_batch=candidates, max_new_tokens=new_tokens, page_size=PAGE_SIZE, num_pages=pages)
    engine = CandidateEngine(model, ClvpProcessor.from_pretrained(random_checkpoint()), **options, **tier.options)
    engine.warm_up()
    return engine
