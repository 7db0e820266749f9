"""The layers of both towers of CLAP, over the operators of `clvp_fast.ops`."""

import torch
from torch import nn

from clvp_fast import ops
from clvp_fast.models.common.parameters import apply_linear
from clvp_fast.models.common.plain import activation_module, activation_name, is_plain, is_plain_linear


class Intermediate(nn.Module):
    """First half of a feed-forward layer: a linear layer and its activation."""

    def __init__(self, width: int, inner: int, hidden_act: str):
        super().__init__()
        self.dense = nn.Linear(width, inner)
        self.intermediate_act_fn = activation_module(hidden_act)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(apply_linear(self.dense, hidden_states))


class Dense(nn.Module):
    """The end of a block of the audio tower: a linear layer, and dropout."""

    def __init__(self, inner: int, width: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return self.dropout(apply_linear(self.dense, hidden_states))


def feed_forward_activation(
    intermediate: nn.Module, kind: type[Intermediate], output: nn.Module, output_kind: type[nn.Module]
) -> str | None:
    """Return the activation's name if an operator may read the weights of a feed-forward layer, else None.

    Args:
        intermediate: its first half, of the class `kind`.
        output: its second half, of the class `output_kind`: the linear layer `dense` and what follows it.
    """
    if (
        is_plain(intermediate, kind)
        and is_plain_linear(intermediate.dense)
        and is_plain(output, output_kind)
        and is_plain_linear(output.dense)
    ):
        return activation_name(intermediate.intermediate_act_fn)
    return None


def feed_forward(
    intermediate: Intermediate,
    dense: nn.Linear,
    hidden_states: torch.Tensor,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `dense(intermediate(hidden_states))`, `[..., width]`, and add `residual` if given."""
    first = intermediate.dense
    weights = first.weight, first.bias, dense.weight, dense.bias
    return ops.gelu_mlp(hidden_states, *weights, residual=residual, activation=activation)


class ClapProjectionLayer(nn.Module):
    """Project a tower's pooled output `[batch, hidden_size]` to the shared space, `[batch, projection_dim]`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.linear1 = nn.Linear(config.hidden_size, config.projection_dim)
        self.activation = activation_module(config.projection_hidden_act)
        self.linear2 = nn.Linear(config.projection_dim, config.projection_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return apply_linear(self.linear2, self.activation(apply_linear(self.linear1, hidden_states)))
