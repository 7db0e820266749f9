"""What both towers of CLAP are built of, over the operators of `clvp_fast.ops`."""

import torch
from torch import nn

from clvp_fast import ops
from clvp_fast.models.clvp.layers import activation_module
from clvp_fast.models.clvp.parameters import apply_linear, is_plain


class ClapIntermediate(nn.Module):
    """First half of a feed-forward layer: a linear layer and its activation."""

    def __init__(self, width: int, inner: int, hidden_act: str):
        super().__init__()
        self.hidden_act = hidden_act
        self.dense = nn.Linear(width, inner)
        self.intermediate_act_fn = activation_module(hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(apply_linear(self.dense, hidden_states))


def is_plain_feed_forward(intermediate: nn.Module, dense: nn.Module) -> bool:
    """Whether `dense(intermediate(x))` is what an operator computes of the two layers' weights."""
    return (
        is_plain(intermediate, ClapIntermediate)
        and is_plain(intermediate.dense, nn.Linear)
        and is_plain(dense, nn.Linear)
        and intermediate.hidden_act in ops.ACTIVATIONS
    )


def feed_forward(
    intermediate: ClapIntermediate,
    dense: nn.Module,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dense(intermediate(hidden_states))`, `[..., width]`, with `residual` added where given."""
    if is_plain_feed_forward(intermediate, dense):
        first = intermediate.dense
        weights = first.weight, first.bias, dense.weight, dense.bias
        return ops.gelu_mlp(hidden_states, *weights, residual=residual, activation=intermediate.hidden_act)
    hidden_states = dense(intermediate(hidden_states))
    return hidden_states if residual is None else residual + hidden_states


class ClapProjectionLayer(nn.Module):
    """A tower's pooled output `[batch, hidden_size]` to the shared space, `[batch, projection_dim]`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.linear1 = nn.Linear(config.hidden_size, config.projection_dim)
        self.activation = activation_module(config.projection_hidden_act)
        self.linear2 = nn.Linear(config.projection_dim, config.projection_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return apply_linear(self.linear2, self.activation(apply_linear(self.linear1, hidden_states)))
