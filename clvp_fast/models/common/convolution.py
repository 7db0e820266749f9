"""Convolutions that compute in float32 where torch is slow in bfloat16."""

import torch
import torch.nn.functional as F
from torch import nn

from clvp_fast.ops.wide import multiplies_slowly


def _convolve(function, conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    bias = None if conv.bias is None else conv.bias.float()
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return function(x.float(), conv.weight.float(), bias, *options).to(x.dtype)


class Conv1d(nn.Conv1d):
    """torch's class, only with zero padding: maps `[batch, channels, length]` to other channels."""

    initializer_std: float  # the standard deviation of random weights, if a model sets one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _convolve(F.conv1d, self, x) if multiplies_slowly(x) else super().forward(x)


class Conv2d(nn.Conv2d):
    """torch's class, only with zero padding: maps `[batch, channels, height, width]` to other channels and sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _convolve(F.conv2d, self, x) if multiplies_slowly(x) else super().forward(x)
