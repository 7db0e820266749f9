"""The decoder over pages of keys and values: it prefills prompts, and advances candidates one token a step."""

from typing import TypedDict

import torch

from clvp_fast import ops
from clvp_fast.engine.products import Blocks
from clvp_fast.engine.step import BoundStep, Prompt, bind_decoder
from clvp_fast.engine.weights import DecoderWeights, layers_of
from clvp_fast.models.clvp.causal_lm import ClvpForCausalLM
from clvp_fast.models.clvp.tokens import most_codes
from clvp_fast.ops import large_pages, many_rows
from clvp_fast.ops.binding import Scratch
from clvp_fast.ops.dispatch import OPERATORS, device_guard
from clvp_fast.ops.paged_attention import FLOAT8

# On x86 with torch 2.13 (MKL) a float32 row has the same bits in all products of 12 rows or more, and others below.
_MIN_MKL_ROWS = 16
# The number of standard deviations of a key or value that a float8 page holds before it clamps.
_FLOAT8_RANGE = 16.0


class LayerPages(TypedDict):
    """One layer's arguments of the paged operators: pages `[num_pages, page_size, num_heads, head_dim]`, and scales."""

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


def min_rows(model: ClvpForCausalLM) -> int:
    """Return the smallest number of rows at which a row's bits do not depend on how many rows there are.

    It is 1 for products of bfloat16 and float16, and for the CPU's own kernel of `linear`; other float32 products on a
    CPU need more rows.
    """
    weight, config = model.lm_head.weight, model.config
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return 1
    widths = config.hidden_size, config.inner_size
    served = OPERATORS["linear"].explain(weight.device, weight.dtype).backend == "kernel"
    return 1 if served and not any(width % many_rows.COLUMNS for width in widths) else _MIN_MKL_ROWS


class KVPages:
    """Pages of keys and values of every layer, in one allocation that is not initialised.

    Args:
        num_layers, num_heads, head_dim: of the decoder.
        num_pages, page_size: how many pages a layer has, and how many tokens a page.
        dtype: of what is stored.
        scales: `[num_layers, 2, num_heads]` float32, with float8 alone: a page keeps `x / scale`.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.types.Device,
        scales: torch.Tensor | None = None,
    ):
        self.page_size = page_size
        sizes = num_layers, 2, num_pages, page_size, num_heads, head_dim
        self.data = large_pages.empty(*sizes, dtype=dtype, device=device)
        self.scales = scales

    def layer(self, index: int) -> LayerPages:
        """Return one layer's pages."""
        k_scale, v_scale = (None, None) if self.scales is None else self.scales[index]
        return LayerPages(k_pages=self.data[index, 0], v_pages=self.data[index, 1], k_scale=k_scale, v_scale=v_scale)


class PagedDecoder:
    """Prefill and decode step of a `ClvpForCausalLM` over [`KVPages`]; it shares its parameters.

    Both are for inference (call them under `torch.inference_mode()`). The host reads nothing from the device within a
    step, so that a step can be captured.

    Args:
        model: a `ClvpForCausalLM` in eval mode.
        residual_dtype: dtype of the sum that runs through the layers; by default float32, also for a model in a half
            type, which would round the sum twice a layer. Norms are always computed in float32, and their results are
            of the model's dtype.
        weight_dtype: `torch.int8` to run the layers' products, but not the head's, over copies of their weights in 8
            bits, made here; by default they run over the model's own weights.
        packed: all products read panels of their weights, which are copies made here and whenever the weights moved
            (`DecoderWeights.packed`). In-place changes take effect only after `weights.repack()`.
        activation_dtype: `torch.int8` to round what the layers' products multiply to 8 bits, row by row, and multiply
            integers; with `weight_dtype=torch.int8`, and always `packed`. By default it is multiplied as it is.

    Raises:
        ValueError: another `weight_dtype` or `activation_dtype`; a model that computes more than its parameters say
            (hooks, adapters), or int8 for an activation that the operators do not know, with the reason; activations in
            int8 where the weights are not, or where no kernel multiplies them.
    """

    def __init__(
        self,
        model: ClvpForCausalLM,
        residual_dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        packed: bool = False,
        activation_dtype: torch.dtype | None = None,
    ):
        if weight_dtype not in (None, torch.int8):
            raise ValueError(f"weight_dtype must be torch.int8, or None for the model's own, not {weight_dtype}")
        if activation_dtype not in (None, torch.int8):
            raise ValueError(f"activation_dtype must be torch.int8, or None for no rounding, not {activation_dtype}")
        if activation_dtype is not None and weight_dtype is None:
            raise ValueError("activation_dtype=torch.int8 multiplies weights in 8 bits: add weight_dtype=torch.int8")
        config = model.config
        self.model = model
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.hidden_size = config.hidden_size
        self.head_dim = self.hidden_size // self.num_heads
        self.vocab_size = config.vocab_size
        self.contiguous_positions = bool(getattr(config, "contiguous_positions", False))
        self._residual_dtype = residual_dtype
        self.weight_dtype, self.activation_dtype = weight_dtype, activation_dtype
        self.packed = packed or activation_dtype is not None
        self._take_weights()

    def _take_weights(self) -> None:
        weights = DecoderWeights.take(self.model)
        if isinstance(weights, str):
            raise ValueError(weights)
        weights = weights if self.weight_dtype is None else weights.in_int8()
        self.weights = weights.packed(self.activation_dtype is not None) if self.packed else weights
        self._sources = weights.sources()

    @property
    def has_moved(self) -> bool:
        """Tell whether parameters moved since `weights` took their addresses, or norms or activations changed."""
        return self.weights.sources() != self._sources

    def follow(self) -> bool:
        """Read the weights again if they have moved, and return whether they had.

        Steps that were bound before keep the old weights. Raises `RuntimeError` where copies of the weights were made;
        `CandidateEngine.refresh` renews those.
        """
        if not self.has_moved:
            return False
        if self.weight_dtype is not None:
            raise RuntimeError("the model's parameters moved after copies in 8 bits were made: call engine.refresh()")
        self._take_weights()
        return True

    @property
    def has_rows_apart(self) -> bool:
        """Tell whether the bits of a product's row depend on no other row, for any number of them: over panels."""
        return all(product.panels is not None for product in self.weights.products())

    @property
    def residual_dtype(self) -> torch.dtype:
        if self._residual_dtype is not None:
            return self._residual_dtype
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def max_new_tokens(self) -> int:
        """Return how many tokens a candidate may draw; the first row of the position table is the start token's."""
        return most_codes(self.model.config)

    def pages(self, num_pages: int, page_size: int, dtype: torch.dtype | None = None) -> KVPages:
        """Allocate pages, by default of the decoder's dtype; scales of float8 pages follow from the weights."""
        dtype = self.dtype if dtype is None else dtype
        scales = self._float8_scales() if dtype == FLOAT8 else None
        sizes = self.num_layers, num_pages, page_size, self.num_heads, self.head_dim
        return KVPages(*sizes, dtype=dtype, device=self.device, scales=scales)

    @torch.no_grad()
    def _float8_scales(self) -> torch.Tensor:
        """Return scales `[num_layers, 2, num_heads]` float32, which fit a head's widest channel into float8's range.

        A key is a linear function of a layer norm's output, whose channels vary by about 1 before the norm's gain. So
        mean and spread follow from the weights alone, and not from what is decoded.
        """
        scales = torch.empty(self.num_layers, 2, self.num_heads, dtype=torch.float32, device=self.device)
        for index, layer in enumerate(layers_of(self.model)):
            norm = layer.input_layernorm
            gain = norm.weight.float()
            offset = torch.zeros_like(gain) if norm.bias is None else norm.bias.float()
            for which, linear in enumerate((layer.attn.k_proj, layer.attn.v_proj)):
                weight = linear.weight.float()
                mean = weight @ offset if linear.bias is None else weight @ offset + linear.bias.float()
                reach = mean.abs() + _FLOAT8_RANGE * (weight * gain).norm(dim=1)
                scales[index, which] = reach.view(self.num_heads, -1).amax(1) / torch.finfo(FLOAT8).max
        return scales

    def prefill(
        self,
        prompt_embeds: torch.Tensor,
        cu_seqlens: torch.Tensor,
        pages: KVPages,
        block_table: torch.Tensor,
        always: bool = False,
    ) -> None:
        """Store the keys and values of prompts, from position 0 of their pages on.

        Args:
            prompt_embeds: `[T, hidden_size]`, prompts one after another, with their position embeddings added.
            cu_seqlens: `[S + 1]` int32: prompt s has the rows from `cu_seqlens[s]` to before `cu_seqlens[s + 1]`,
                perhaps none; rows from the last entry on belong to no prompt.
            block_table: `[S, max_pages]` int32, the pages of each prompt.
            always: products are our own kernel's; by default those that are fastest for T rows.
        """
        self.follow()
        hidden = prompt_embeds.to(self.residual_dtype)
        layers = self.weights.layers
        for index, layer in enumerate(layers):
            q, k, v = layer.project(layer.input_norm(hidden, self.dtype), always)
            attended = ops.paged_prefill(q, k, v, cu_seqlens, **pages.layer(index), block_table=block_table)
            # Candidates read only keys and values of the last layer.
            if index < len(layers) - 1:
                hidden = layer.behind_attention(attended.flatten(-2), hidden, always)

    def step(
        self,
        tokens: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        prefix_table: torch.Tensor,
        prefix_lens: torch.Tensor,
        prefix_index: torch.Tensor,
        pages: KVPages,
        arrivals: torch.Tensor | None = None,
        product_rows: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enter one token of each of N candidates, and compute the logits of the next token.

        Args:
            tokens: `[N]` int64: the start token in a candidate's first step, then the token drawn last.
            seq_lens: `[N]` int32, own tokens stored before this step; -1: the row is inactive and its results mean
                nothing, but its token must be one of the vocabulary.
            block_table: `[N, max_pages]` int32, each candidate's own pages.
            prefix_table, prefix_lens, prefix_index: `[R, P]`, `[R]`, `[N]` int32, the prompts' pages, their lengths,
                and whose prompt each candidate continues (-1: none).
            arrivals: `[N, num_heads]` int32 zeros, counters of the attention kernel.
            product_rows: as for `bind`.

        Returns:
            The hidden states `[N, hidden_size]` after both final norms, and logits `[N, vocab_size]`, both of the
            model's dtype.
        """
        self.follow()
        bound = self.bind(
            tokens,
            seq_lens,
            block_table,
            prefix_table,
            prefix_lens,
            prefix_index,
            pages,
            arrivals,
            Scratch(len(tokens), self.device),
            product_rows,
        )
        with device_guard(self.device):
            return bound.run()

    def bind(
        self,
        tokens: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        prefix_table: torch.Tensor,
        prefix_lens: torch.Tensor,
        prefix_index: torch.Tensor,
        pages: KVPages,
        arrivals: torch.Tensor | None,
        scratch: Scratch,
        product_rows: int | None = None,
        prompt: Prompt | None = None,
    ) -> BoundStep:
        """Return the calls that `step` makes on these tensors; they serve any number of steps.

        The calls read the weights where they lay at the last `follow`. A caller that keeps steps calls `follow`, and
        drops the steps when it returns True.

        Args:
            scratch: memory for at least as many rows; steps that share it run one after another.
            product_rows: the most rows of a product, which is our own kernel's (`products.Blocks`); None: all rows.
            prompt: is entered with the tokens; `scratch` then has room for its rows too. Candidates' rows keep their
                bits where those of a product depend on no other row (`has_rows_apart`).
        """
        tables = dict(
            block_table=block_table,
            prefix_table=prefix_table,
            prefix_lens=prefix_lens,
            prefix_index=prefix_index,
            arrivals=arrivals,
        )
        rows = len(tokens) + (0 if prompt is None else len(prompt.embeds))
        return bind_decoder(self, tokens, seq_lens, tables, pages, scratch, Blocks(rows, product_rows), prompt)
