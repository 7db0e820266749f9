"""Window attention of CLAP's audio tower, over a whole image at once or window by window."""

import math

import torch
from torch import nn

from clvp_fast import ops
from clvp_fast.models.clap.configuration import ClapAudioConfig
from clvp_fast.models.clap.layers import Dense
from clvp_fast.models.common.parameters import ArrangedLayer, apply_linear, pack_linears, project_heads
from clvp_fast.models.common.plain import drop_probability, is_plain, is_plain_linear


def cut_windows(image: torch.Tensor, window: int, shift: int) -> torch.Tensor:
    """Cut `[batch, rows, columns, width]`, shifted by `shift`, into `[batch * windows, window ** 2, width]`."""
    if shift:
        image = image.roll((-shift, -shift), (1, 2))
    cut = image.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    return cut.reshape(-1, window**2, image.shape[3])


def join_windows(windows: torch.Tensor, shape: torch.Size, window: int, shift: int) -> torch.Tensor:
    """Invert `cut_windows` for an image of a shape."""
    batch, rows, columns, _ = shape
    cut = windows.reshape(batch, rows // window, columns // window, window, window, -1)
    image = cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return image.roll((shift, shift), (1, 2)) if shift else image


class ClapAudioSelfAttention(ArrangedLayer):
    """Attention within windows, with a bias for each distance between two positions."""

    relative_position_index: torch.Tensor

    def __init__(self, config: ClapAudioConfig, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"a stage's width must be a multiple of its heads, got {width} and {num_heads}")
        self.num_heads = num_heads
        self.window_size = config.window_size
        distances = (2 * self.window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, num_heads))
        for name, value in self.initial_buffers().items():
            self.register_buffer(name, value)
        self.query = nn.Linear(width, width, bias=config.qkv_bias)
        self.key = nn.Linear(width, width, bias=config.qkv_bias)
        self.value = nn.Linear(width, width, bias=config.qkv_bias)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def initial_buffers(self) -> dict[str, torch.Tensor]:
        """Return the row of the bias table for each two positions of a window, `[positions, positions]`."""
        place = torch.arange(self.window_size**2)
        rows, columns = (x[:, None] - x for x in (place // self.window_size, place % self.window_size))
        side = 2 * self.window_size - 1
        return {"relative_position_index": (rows + self.window_size - 1) * side + columns + self.window_size - 1}

    def arrange_parameters(self) -> None:
        """Put the weights of queries, keys and values one after another, if they may be moved."""
        pack_linears(self.projections())

    def projections(self) -> list[nn.Module]:
        """Return the linear layers of queries, keys and values."""
        return [self.query, self.key, self.value]

    def bias(self) -> torch.Tensor:
        """Return the bias of the scores, `[heads, positions, positions]`, by the distance between positions."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Attend within windows `[batch * windows, places, width]`, and return the weights too if asked for.

        `attention_mask` `[windows, positions, positions]` is added to the scores.
        """
        query, key, value = (
            linear(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in self.projections()
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + self.bias()
        if attention_mask is not None:
            scores = (scores.unflatten(0, (-1, len(attention_mask))) + attention_mask[:, None]).flatten(0, 1)
        weights = self.dropout(scores.softmax(-1))
        attended = (weights @ value).transpose(1, 2).flatten(2)
        return (attended, weights) if output_attentions else (attended,)

    def attend(
        self, image: torch.Tensor, shift: int, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within all windows of an image `[batch, rows, columns, width]`, which begin `shift` places later."""
        query, key, value = project_heads(self.projections(), image, self.num_heads)
        operator = ops.window_attention_weights if output_attentions else ops.window_attention
        dropout_p = drop_probability(self.dropout)
        found = operator(query, key, value, self.bias(), window=self.window_size, shift=shift, dropout_p=dropout_p)
        attended, weights = found if isinstance(found, tuple) else (found, None)
        return attended.flatten(-2), weights


class ClapAudioSelfOutput(Dense):
    """The projection after the attention."""


class ClapAudioAttention(nn.Module):
    """Window attention and the projection of its output."""

    def __init__(self, config: ClapAudioConfig, width: int, num_heads: int):
        super().__init__()
        self.self = ClapAudioSelfAttention(config, width, num_heads)
        self.output = ClapAudioSelfOutput(width, width, config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Attend within windows `[batch * windows, places, width]`, and return the weights too if asked for."""
        attended, *weights = self.self(hidden_states, attention_mask, output_attentions)
        return (self.output(attended, hidden_states), *weights)

    def is_plain_inside(self) -> bool:
        """Tell whether `attend` computes the same as the modules inside."""
        attention, output = self.self, self.output
        return (
            is_plain(attention, ClapAudioSelfAttention)
            and all(is_plain(linear, nn.Linear) for linear in attention.projections())
            and is_plain(attention.dropout, nn.Dropout)
            and is_plain(output, ClapAudioSelfOutput)
            and is_plain_linear(output.dense)
            and is_plain(output.dropout, nn.Dropout)
        )

    def attend(
        self, image: torch.Tensor, shift: int, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within all windows of an image `[batch, rows, columns, width]`, which begin `shift` places later."""
        attended, weights = self.self.attend(image, shift, output_attentions)
        return self.output.dropout(apply_linear(self.output.dense, attended)), weights
