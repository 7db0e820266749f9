"""The decode step as a list of calls: implementations and addresses are fixed when the list is made.

embed → layers → norms → head → draw, over tensors that stay where they are. A step of a given number of rows is bound
once and can run any number of times. The choices also depend on `dispatch.situation`. A step may enter a prompt too, so
that weights are read once for both.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from clvp_fast import ops
from clvp_fast.engine.products import Blocks
from clvp_fast.engine.slots import NEUTRAL
from clvp_fast.engine.weights import DecoderWeights, LayerWeights
from clvp_fast.native import Bound, joined
from clvp_fast.ops.binding import BoundCall, Scratch, copying
from clvp_fast.ops.embedding import bind_embed
from clvp_fast.ops.mlp import bind_gelu_mlp
from clvp_fast.ops.norm import bind_add_norm, bind_double_layer_norm
from clvp_fast.ops.paged_attention import bind_paged_attention_decode
from clvp_fast.ops.sampling import Slots, bind_sample
from clvp_fast.ops.sampling_torch import keep_typical

if TYPE_CHECKING:
    from clvp_fast.engine.decoder import KVPages, PagedDecoder

#: The tensors of the slots' state that a decoder's step reads, in the order of its arguments.
ENTERED = ("token", "seq_lens", "block_table", "prefix_table", "prefix_lens", "prefix_index")


@dataclass(frozen=True)
class Prompt:
    """A prompt that a step enters: its rows stand before the candidates' in every product.

    The arguments are those of `PagedDecoder.prefill`, of one prompt.
    """

    embeds: torch.Tensor
    cu_seqlens: torch.Tensor
    block_table: torch.Tensor

    def bind(self, out: torch.Tensor, projected: list[torch.Tensor], stored: dict) -> BoundCall:
        """Return a call that attends within the prompt, and stores its keys and values."""
        attend = partial(ops.paged_prefill, *projected, self.cu_seqlens, block_table=self.block_table, **stored)
        return copying(attend, out)


@dataclass(frozen=True)
class BoundStep:
    """The calls that enter a token of each row, and the tensors in which they leave hidden states and logits."""

    calls: tuple[BoundCall, ...]
    hidden: torch.Tensor
    logits: torch.Tensor

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the calls once, and return hidden states and logits, which the next run overwrites."""
        for call in self.calls:
            call()
        return self.hidden, self.logits


def bind_decoder(
    decoder: "PagedDecoder",
    tokens: torch.Tensor,
    seq_lens: torch.Tensor,
    tables: dict[str, torch.Tensor | None],
    pages: "KVPages",
    scratch: Scratch,
    blocks: Blocks,
    prompt: Prompt | None = None,
) -> BoundStep:
    """Bind `PagedDecoder.step` to these tensors; `tables` are those of `paged_attention_decode`, with `arrivals`.

    Products are made in `blocks`, whose rows include those of a prompt.
    """
    weights, rows = decoder.weights, blocks.rows
    ahead = 0 if prompt is None else len(prompt.embeds)
    own = slice(ahead, rows)  # the candidates' rows
    shape = rows, decoder.hidden_size
    residual, between = (scratch(name, *shape, dtype=decoder.residual_dtype) for name in ("residual", "between"))
    normed = scratch("normed", *shape, dtype=decoder.dtype)
    logits = scratch("logits", rows - ahead, decoder.vocab_size, dtype=decoder.dtype)
    # The k-th speech token has position k + 1, as in the original with its cache. In training, and with contiguous
    # positions, it has position k.
    gap = 0 if decoder.contiguous_positions else 1
    calls = [bind_embed(residual[own], scratch, tokens, seq_lens, weights.token_table, weights.position_table, gap)]
    if prompt is not None:
        calls.append(partial(residual[:ahead].copy_, prompt.embeds))
    tables = {"seq_lens": seq_lens, **tables}
    for index, layer in enumerate(weights.layers):
        attended = scratch("attended", *shape, dtype=decoder.dtype)
        stored = {**pages.layer(index), "scale": decoder.head_dim**-0.5}
        calls += _attention(attended, scratch, blocks, layer, residual, normed, stored, tables, prompt)
        if index == len(weights.layers) - 1:  # of a prompt candidates read only keys and values there
            blocks = replace(blocks, rows=rows - ahead)
            attended, residual, between, normed = (x[own] for x in (attended, residual, between, normed))
        calls += _behind_attention(attended, scratch, blocks, layer, residual, between, normed)
    calls += _last_norms(scratch, weights, residual, between, normed)
    calls.append(blocks.product(weights.head, logits, scratch, normed))
    return BoundStep(tuple(joined(calls)), normed, logits)


def _attention(
    attended: torch.Tensor,
    scratch: Scratch,
    blocks: Blocks,
    layer: LayerWeights,
    residual: torch.Tensor,
    normed: torch.Tensor,
    stored: dict,
    tables: dict,
    prompt: Prompt | None,
) -> list[BoundCall]:
    """Bind the norm of the residual, its projections, and attention over the pages in `stored`.

    `tables` are the other arguments of `paged_attention_decode`. A prompt comes first: candidates may be its own.
    """
    rows, heads = blocks.rows, layer.num_heads
    norm = dict(**vars(layer.input_norm), kind="layer")
    calls = [bind_add_norm((None, normed), scratch, residual, **norm)]
    projected = []
    for number, product in enumerate(layer.projections):
        out = scratch(f"projection {number}", rows, len(product.weight), dtype=normed.dtype)
        calls.append(blocks.product(product, out, scratch, normed))
        projected += out.view(rows, -1, heads, attended.shape[1] // heads).unbind(1)
    ahead, out = 0 if prompt is None else len(prompt.embeds), attended.view_as(projected[0])
    if prompt is not None:
        calls.append(prompt.bind(out[:ahead], [x[:ahead] for x in projected], stored))
    own = [x[ahead:] for x in projected]
    calls.append(bind_paged_attention_decode(out[ahead:], scratch, *own, **tables, **stored))
    return calls


def _behind_attention(
    attended: torch.Tensor,
    scratch: Scratch,
    blocks: Blocks,
    layer: LayerWeights,
    residual: torch.Tensor,
    between: torch.Tensor,
    normed: torch.Tensor,
) -> list[BoundCall]:
    """Bind the rest of a layer after attention, up to the next residual, which takes this one's place."""
    norm = dict(**vars(layer.post_norm), kind="layer")
    if attended.device.type == "cpu":  # here the product adds the residual; in the other case the norm does
        calls = [
            blocks.product(layer.out, between, scratch, attended, residual=residual),
            bind_add_norm((None, normed), scratch, between, **norm),
        ]
    else:
        out = scratch("out", *attended.shape, dtype=attended.dtype)
        calls = [
            blocks.product(layer.out, out, scratch, attended),
            bind_add_norm((between, normed), scratch, out, residual, **norm),
        ]
    if layer.is_one_block:
        block = partial(bind_gelu_mlp, **layer.block())
        return [*calls, blocks.bind(block, residual, scratch, normed, residual=between)]
    wide = scratch("mlp", len(normed), len(layer.mlp_in.weight), dtype=normed.dtype)
    calls.append(blocks.product(layer.mlp_in, wide, scratch, normed, activation=layer.activation))
    if layer.activation is None:
        calls.append(copying(partial(layer.act, wide), wide))
    return [*calls, blocks.product(layer.mlp_out, residual, scratch, wide, residual=between)]


def _last_norms(
    scratch: Scratch,
    weights: DecoderWeights,
    residual: torch.Tensor,
    between: torch.Tensor,
    normed: torch.Tensor,
) -> list[BoundCall]:
    """Bind both norms behind the layers."""
    first, second = weights.last_norm, weights.final_norm
    apart = [
        bind_add_norm((None, between), scratch, residual, **vars(first), kind="layer"),
        bind_add_norm((None, normed), scratch, between, **vars(second), kind="layer"),
    ]
    if all(isinstance(call, Bound) for call in apart):  # these join their neighbours
        return apart
    affines = {f"{name}{n}": x for n, norm in ((1, first), (2, second)) for name, x in vars(norm).items()}
    return [bind_double_layer_norm((between, normed), scratch, residual, **affines)]


def bind_draw(
    state: dict[str, torch.Tensor],
    logits: torch.Tensor,
    results: torch.Tensor,
    shortcuts: dict[str, Any],
    scratch: Scratch,
) -> list[BoundCall]:
    """Bind the draw of tokens from logits `[rows, vocab_size]`, which writes `state` and `results`.

    `state` is that of the first rows; those with negative `seq_lens` are inactive and draw no token. `results`, int64
    `[2, rows]` of zeros at first, gets the tokens, and 1 for each last one. `shortcuts` are numbers that `sample` takes
    in place of tensors, to save work without changing a token. Without a shortcut for `typical_mass`, a call that
    applies it comes first.
    """
    lengths = state["lengths"]
    settings = {name: state[name] for name in (*NEUTRAL, "do_sample")} | shortcuts
    mass, calls = settings.pop("typical_mass"), []
    if isinstance(mass, torch.Tensor):
        calls.append(partial(keep_typical, logits, state["seen"], state["repetition_penalty"], mass))
    draw = bind_sample(
        results[0],
        scratch,
        logits,
        state["seen"],
        lengths,
        results[1].view(torch.bool)[::8],  # the lowest 8 of 64 bits
        seed=state["seed"],
        candidate=state["candidate"],
        step=lengths,
        stop_token=-1,  # each slot has its own
        pad_token=-1,
        slots=Slots(*(state[name] for name in Slots._fields)),
        **settings,
    )
    return [*calls, draw]
