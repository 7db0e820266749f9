"""The distance of each precision tier of the engine's decoder from float64, and the time of its step.

One prompt, and candidates that are handed the tokens which the float64 model draws, step by step over pages; every
step's logits are compared. A model of random weights; its queries and keys are made larger, so that attention prefers
some tokens, and its head, so that the draws have about the spread of a trained model's.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

import torch

from benchmarks.harness import Provider, Task, task
from benchmarks.tiers import require_served
from clvp_fast import ClvpDecoderConfig, ClvpForCausalLM
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.engine.products import Product, in_int8
from clvp_fast.ops.binding import Scratch
from clvp_fast.ops.paged_attention import FLOAT8


@dataclasses.dataclass(frozen=True)
class Shape:
    """The decoded case: as deep as CLVP's checkpoints are."""

    layers: int
    width: int
    candidates: int
    steps: int
    prompt: int = 60


SHAPES = {"cpu": Shape(30, 512, 4, 200), "cuda": Shape(30, 1024, 64, 400)}
SMOKE = Shape(2, 128, 2, 18, 5)
PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Tier:
    """Types of weights, residual, pages, prompt, the layers' copied weights and what those multiply.

    All but the first are None for the engine's own.

    tolerance: the most that the arithmetic may put logits off, relative to their spread, before the row is refused.
    """

    name: str
    dtype: torch.dtype
    tolerance: float
    residual: torch.dtype | None = None
    pages: torch.dtype | None = None
    prompt: torch.dtype | None = None
    copies: torch.dtype | None = None
    activations: torch.dtype | None = None


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FLOAT64 = Tier("float64", FP64, 0)
TIERS = (
    Tier("float32", FP32, 1e-4),
    Tier("bfloat16", BF16, 0.05),
    Tier("bfloat16, residual bfloat16", BF16, 0.1, residual=BF16),
    Tier("bfloat16, float8 pages", BF16, 0.1, pages=FLOAT8),
    Tier("bfloat16, int8 weights", BF16, 0.1, copies=torch.int8),
    Tier("float32, int8 weights", FP32, 1e-3, copies=torch.int8),
    Tier("bfloat16, int8 weights and activations", BF16, 0.1, copies=torch.int8, activations=torch.int8),
    Tier("float32, int8 weights and activations", FP32, 0.1, copies=torch.int8, activations=torch.int8),
    Tier("float16", FP16, 0.01),
    Tier("float16, residual float16", FP16, 0.02, residual=FP16),
)


def random_model(shape: Shape, device: str) -> ClvpForCausalLM:
    torch.manual_seed(0)
    config = ClvpDecoderConfig(
        hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.width // 64
    )
    model = ClvpForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.decoder.layers:
        layer.attn.q_proj.weight.mul_(3)
        layer.attn.k_proj.weight.mul_(3)
    model.lm_head.weight.mul_(6)
    return model.to(device)


def round_to_int8(model: ClvpForCausalLM) -> ClvpForCausalLM:
    """Replace the layers' weights by those that their int8 copies represent, in float32 at least."""
    for layer in model.model.decoder.layers:
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
            weight = layer.get_submodule(name).weight
            in_columns = name.startswith("mlp")
            copied = in_int8(Product(weight.t() if in_columns else weight, None))
            meant = copied.weight.to(torch.promote_types(weight.dtype, FP32)) * copied.scale[:, None]
            weight.data = meant.t() if in_columns else meant
    return model


def random_prompt(shape: Shape) -> torch.Tensor:
    """Draw `[prompt, width]`, about as large as the sum of a text's and a position's embedding."""
    return 0.03 * torch.randn(shape.prompt, shape.width, generator=torch.Generator().manual_seed(1))


class Candidates:
    """The candidates of one prompt on pages of their own: `step` enters their tokens and gives the next logits."""

    def __init__(self, model: ClvpForCausalLM, shape: Shape, tier: Tier):
        count, own, shared = shape.candidates, -(-shape.steps // PAGE_SIZE), -(-shape.prompt // PAGE_SIZE)
        # Packed, as the engine's are on a CPU.
        self.decoder = PagedDecoder(model, tier.residual, tier.copies, True, tier.activations)
        device = self.decoder.device
        self.pages = self.decoder.pages(count * own + shared, PAGE_SIZE, tier.pages)
        self.seq_lens = torch.zeros(count, dtype=torch.int32, device=device)
        pages = torch.arange(count * own + shared, dtype=torch.int32, device=device)
        tables = {
            "block_table": pages[: count * own].view(count, own),
            "prefix_table": pages[count * own :][None],
            "prefix_lens": torch.tensor([shape.prompt], dtype=torch.int32, device=device),
            "prefix_index": torch.zeros(count, dtype=torch.int32, device=device),
        }
        arrivals = torch.zeros(count, self.decoder.num_heads, dtype=torch.int32, device=device)
        bounds = torch.tensor([0, shape.prompt], dtype=torch.int32, device=device)
        prompt = random_prompt(shape).to(tier.prompt or tier.dtype).to(device, tier.dtype)
        self.decoder.prefill(prompt, bounds, self.pages, tables["prefix_table"])
        self._tokens, scratch = torch.zeros(count, dtype=torch.int64, device=device), Scratch(count, device)
        self._bound = self.decoder.bind(
            self._tokens, self.seq_lens, **tables, pages=self.pages, arrivals=arrivals, scratch=scratch
        )

    def step(self, tokens: torch.Tensor, place: int) -> torch.Tensor:
        """Return logits `[candidates, vocab_size]` behind `tokens`, the `place`-th ones."""
        self.seq_lens.fill_(place)
        self._tokens.copy_(tokens)
        return self._bound.run()[1].clone()


def drawn(model: ClvpForCausalLM, shape: Shape) -> torch.Tensor:
    """Return `[steps, candidates]`: the start token, then the float64 model's tokens at temperature 1."""
    candidates = Candidates(model, shape, FLOAT64)
    generator = torch.Generator(candidates.decoder.device).manual_seed(2)
    tokens = [torch.full((shape.candidates,), model.config.bos_token_id, device=candidates.decoder.device)]
    for place in range(shape.steps - 1):
        probabilities = candidates.step(tokens[-1], place).softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1, generator=generator)[:, 0])
    return torch.stack(tokens)


def logits_along(model: ClvpForCausalLM, shape: Shape, tier: Tier, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Return logits `[candidates, vocab_size]` behind each step's tokens."""
    candidates = Candidates(model, shape, tier)
    for place, entered in enumerate(tokens):
        yield candidates.step(entered, place)


def divergence(found: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> dict[str, float]:
    """Return the distance of logits `[candidates, vocab_size]` from those of float64, step by step.

    logits_error: the root of their mean square error, relative to the spread of a candidate's logits. kl: of their
    distributions, in nats a token. greedy: the share of places where the largest is the same token.
    """
    squares = spread = information = same = places = 0
    for logits, wanted in zip(found, exact, strict=True):
        logits = logits.double()
        squares += float((logits - wanted).square().mean())
        spread += float(wanted.var(-1).mean())
        chances = wanted.log_softmax(-1)
        information += float((chances.exp() * (chances - logits.log_softmax(-1))).sum(-1).mean())
        same += float((logits.argmax(-1) == wanted.argmax(-1)).double().mean())
        places += 1
    return {"logits_error": (squares / spread) ** 0.5, "kl": information / places, "greedy": same / places}


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    shape = SMOKE if smoke else SHAPES[device]
    exact = cache(partial(Exact, device, shape))
    makers = {tier.name: partial(_made, exact, tier, device) for tier in TIERS}
    yield task("precision", vars(shape), makers, 1 if smoke else 5, around=torch.no_grad)


class Exact:
    """A model, the tokens that its float64 copy draws, and that copy's logits behind them."""

    def __init__(self, device: str, shape: Shape):
        self.shape, self.model = shape, random_model(shape, device)
        exact_model = copy.deepcopy(self.model).double()
        self.tokens = drawn(exact_model, shape)
        self._logits = {(FP64, None): list(logits_along(exact_model, shape, FLOAT64, self.tokens))}

    def logits(self, dtype: torch.dtype, copies: torch.dtype | None) -> list[torch.Tensor]:
        """Compute logits in float64, step by step, with weights and prompt rounded to `dtype`, layers to `copies`."""
        if (dtype, copies) not in self._logits:
            rounded = copy.deepcopy(self.model).to(dtype)
            if copies is not None:
                rounded = round_to_int8(rounded)
            float64 = dataclasses.replace(FLOAT64, prompt=dtype)
            self._logits[dtype, copies] = list(logits_along(rounded.double(), self.shape, float64, self.tokens))
        return self._logits[dtype, copies]


@torch.no_grad()
def _made(exact_of: Callable[[], Exact], tier: Tier, device: str) -> Provider:
    """Make a tier, timed over the last of its steps.

    Of a row, `error` is of the arithmetic alone, against float64 with weights and prompt rounded as the tier's are;
    `logits_error`, `kl` and `greedy` are against float64 with all as it was.
    """
    require_served(tier.dtype, tier.activations, device)
    exact = exact_of()
    shape, tokens = exact.shape, exact.tokens
    candidates = Candidates(copy.deepcopy(exact.model).to(tier.dtype), shape, tier)
    found = [candidates.step(entered, place) for place, entered in enumerate(tokens)]
    arithmetic = divergence(found, exact.logits(tier.dtype, tier.copies))["logits_error"]
    last_step = partial(candidates.step, tokens[-1], shape.steps - 1)
    return Provider(
        tier.name, last_step, arithmetic, tier.tolerance, counted=divergence(found, exact.logits(FP64, None))
    )
