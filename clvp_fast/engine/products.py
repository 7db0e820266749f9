"""The matrix products of a decoder layer: through the layer's own modules, or over int8 weights of the engine's."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clvp_fast import ops
from clvp_fast.models.common.parameters import apply_linear, pack_linears
from clvp_fast.models.common.plain import activation_name, is_plain

# How many rows of weights are turned into 8 bits at once.
_ROWS = 256


class ModuleProducts:
    """The products of a `ClvpDecoderLayer` by its modules; its parameters are shared.

    All take and give rows `[tokens, ...]` of the model's dtype.
    """

    def __init__(self, layer: nn.Module):
        self.project = layer.attn.project
        self.mlp = layer.mlp
        self._out_proj = layer.attn.out_proj

    def out(self, attended: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return apply_linear(self._out_proj, attended, residual)


class Int8Linear:
    """A linear layer over a copy of its weights in 8 bits, symmetric, with a scale for each row.

    Args:
        weight: `[out, in]`.
        bias: `[out]`, or None; shared.
    """

    @torch.no_grad()
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        # Rows side by side, as all kernels read them best, also where `weight` is a view that has columns so.
        self.weight = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.scale = torch.empty(len(weight), device=weight.device)
        # Some rows at a time, as copies of whole weights in float32 would leave holes in the heap.
        for rows, copies, scales in zip(*(x.split(_ROWS) for x in (weight, self.weight, self.scale)), strict=True):
            wide = rows.float()
            # A row of zeros has any scale; the smallest normal number keeps it from 0 / 0.
            scales.copy_(wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127)
            copies.copy_((wide / scales[:, None]).round())
        self.bias = bias

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias, scale=self.scale, residual=residual)


class Int8Products:
    """The products of a `ClvpDecoderLayer` over int8 copies of its weights, made here; activations stay as they are.

    Raises `ValueError` if a linear layer has been replaced or hooked: its weights would not say what it computes.
    """

    def __init__(self, layer: nn.Module):
        attn, mlp = layer.attn, layer.mlp
        linears = [attn.q_proj, attn.k_proj, attn.v_proj]
        plain = all(is_plain(linear, nn.Linear) for linear in (*linears, attn.out_proj))
        activation = activation_name(mlp.act)
        if not plain or activation is None or not all(is_plain(conv, Conv1D) for conv in (mlp.c_fc, mlp.c_proj)):
            raise ValueError("int8 weights are made of plain linear layers: merge adapters, and remove hooks, first")
        self._heads = attn.num_heads, attn.head_dim
        packed = pack_linears(linears)
        if packed is None:  # they cannot be moved; what is made here is a copy in any case
            biases = [linear.bias for linear in linears]
            packed = torch.cat([linear.weight for linear in linears]), None if None in biases else torch.cat(biases)
        self._qkv = Int8Linear(*packed)
        self.out = Int8Linear(attn.out_proj.weight, attn.out_proj.bias)
        self._activation = activation
        self._in = Int8Linear(mlp.c_fc.weight.t(), mlp.c_fc.bias)
        self._out = Int8Linear(mlp.c_proj.weight.t(), mlp.c_proj.bias)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[tokens, num_heads, head_dim]`, views of one projection."""
        return self._qkv(hidden).view(*hidden.shape[:-1], 3, *self._heads).unbind(-3)

    def mlp(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        first, second = self._in, self._out
        return ops.gelu_mlp(
            hidden,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            residual=residual,
            activation=self._activation,
            scale_in=first.scale,
            scale_out=second.scale,
        )
