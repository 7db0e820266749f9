"""Parts of layers that CLVP and CLAP share: norms, embeddings, attention and feed-forward blocks."""

from typing import Any, TypeGuard

import torch
from torch import nn

from clvp_fast import ops
from clvp_fast.models.common.plain import is_plain


class ClvpRMSNorm(nn.Module):
    """`weight * x / rms(x)` over the last axis, statistics in float32 (arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return ops.add_norm(hidden_states, None, weight=self.weight, eps=self.variance_epsilon, kind="rms")[1]

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def is_plain_layer_norm(norm: Any) -> TypeGuard[nn.LayerNorm]:
    """Tell whether `norm` is a plain layer norm with a gain and an offset, which operators can read."""
    return is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def add_norm(
    norm: nn.Module,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the new residual `hidden_states + residual`, and its `norm` in `out_dtype`; both `[..., hidden_size]`.

    `out_dtype` is by default that of `hidden_states`. The residual may be float32 with a half type, and stays so.
    """
    if is_plain_layer_norm(norm):
        return ops.add_norm(
            hidden_states, residual, weight=norm.weight, bias=norm.bias, eps=norm.eps, kind="layer", out_dtype=out_dtype
        )
    if is_plain(norm, ClvpRMSNorm):
        return ops.add_norm(
            hidden_states, residual, weight=norm.weight, eps=norm.variance_epsilon, kind="rms", out_dtype=out_dtype
        )
    total = hidden_states if residual is None else residual + hidden_states
    return total, norm(total if out_dtype is None else total.to(out_dtype))


def attend(
    attention: nn.Module,
    kind: type[nn.Module],
    hidden_states: torch.Tensor,
    attentions: list[torch.Tensor] | None,
    **arguments,
) -> torch.Tensor:
    """Apply `attention` to `hidden_states`; its weights are appended to `attentions`, if that is a list.

    A plain attention of class `kind` computes weights only if they are wanted. Other modules, and hooks, get everything
    that transformers' attention returns.
    """
    if is_plain(attention, kind):
        arguments["need_weights"] = attentions is not None
    attended, weights = attention(hidden_states, **arguments)
    if attentions is not None:
        attentions.append(weights)
    return attended


def add_feed_forward(
    mlp: nn.Module, kind: type[nn.Module], hidden_states: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """Return `residual + mlp(hidden_states)`, `[..., hidden_size]`; an `mlp` of class `kind` adds it itself."""
    return mlp(hidden_states, residual) if is_plain(mlp, kind) else residual + mlp(hidden_states)


def is_plain_embedding(layer: nn.Module) -> bool:
    """Tell whether `layer` is a plain embedding, which only looks up rows and sums their gradients."""
    return (
        is_plain(layer, nn.Embedding)
        and layer.max_norm is None
        and layer.padding_idx is None
        and not (layer.scale_grad_by_freq or layer.sparse)
    )


def embed(
    token_layer: nn.Embedding,
    token_ids: torch.Tensor,
    position_layer: nn.Embedding,
    position_ids: torch.Tensor,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Add token and position embeddings `[batch, length, hidden_size]` of ids `[batch, length]`.

    `out_dtype` is the dtype of the sum, by default that of the tables.
    """
    layers = token_layer, position_layer
    if all(map(is_plain_embedding, layers)) and token_layer.weight.dtype == position_layer.weight.dtype:
        return ops.embed(token_ids, position_ids, token_layer.weight, position_layer.weight, out_dtype=out_dtype)
    rows, places = token_layer(token_ids), position_layer(position_ids)
    return rows + places if out_dtype is None else rows.to(out_dtype) + places.to(out_dtype)
