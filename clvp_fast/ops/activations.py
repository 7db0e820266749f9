"""Activations by the names of transformers' configurations."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from clvp_fast.ops.binding import BoundCall, copying
from clvp_fast.ops.dispatch import needs_grad


def _gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def _gelu_fast(x):
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


# gelu_new is the tanh form, for which torch's fused one gives the same number.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swish": F.silu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "linear": lambda x: x,
}
# Functions that may overwrite their argument where autograd does not need it.
_IN_PLACE = {
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_new": lambda x: torch.ops.aten.gelu_.default(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: torch.ops.aten.gelu_.default(x, approximate="tanh"),
    "relu": torch.relu_,
    "silu": lambda x: F.silu(x, inplace=True),
    "swish": lambda x: F.silu(x, inplace=True),
    "selu": torch.selu_,
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "mish": lambda x: F.mish(x, inplace=True),
}


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Compute the activation of `x`, which may be overwritten where autograd does not need it."""
    if needs_grad(x):
        return ACTIVATIONS[activation](x)
    return _IN_PLACE.get(activation, ACTIVATIONS[activation])(x)


def bind_activation(x: torch.Tensor, activation: str) -> BoundCall:
    """Return a call that replaces `x` by its activation; for inference."""
    in_place = _IN_PLACE.get(activation)
    return copying(partial(ACTIVATIONS[activation], x), x) if in_place is None else partial(in_place, x)


def reference_activation(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Compute the activation of `x` by its formula."""
    if activation == "gelu":
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
    if activation in ("gelu_new", "gelu_pytorch_tanh"):
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))
    return ACTIVATIONS[activation](x)
