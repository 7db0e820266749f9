"""A small codec of speech: log-mel spectrograms to codes and back, by finite scalar quantisation.

`stride` frames of a log-mel spectrogram become one code: each of a few numbers is rounded to one of its levels, and the
code is the index of their combination (Mentzer et al., "Finite Scalar Quantization", 2023). The decoder gets the voice
as mean and spread of a clip's log-mel, so that codes describe what is said and not who says it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clvp_fast.io.errors import shown

# Mean and spread of log-mel values of natural speech; the floor of the features is log(1e-5).
MEAN, SPREAD, FLOOR = -5.0, 3.5, math.log(1e-5)
# A decoder's vocabulary has only a few thousand codes.
_MOST_CODES = 2**31


class CodecBlock(nn.Module):
    """A residual block: five taps of each channel over time, then a feed-forward layer."""

    def __init__(self, width: int, dilation: int = 1):
        super().__init__()
        self.taps = nn.Parameter(torch.randn(5, width) * 0.3)
        self.dilation = dilation
        self.norm = nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.normal_(self.narrow.weight, std=0.01)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[batch, time, width]` to the same shape."""
        length, step = x.shape[1], self.dilation
        padded = F.pad(x, (0, 0, 2 * step, 2 * step))
        mixed = padded[:, :length] * self.taps[0]
        for index in range(1, 5):
            mixed = mixed + padded[:, index * step : index * step + length] * self.taps[index]
        return x + self.narrow(F.gelu(self.widen(self.norm(mixed))))


def settings_of(
    levels: Sequence[int] = (8, 5, 5, 5),
    stride: int = 4,
    width: int = 192,
    bins: int = 80,
    encoder_blocks: int = 2,
    decoder_blocks: int = 4,
) -> dict[str, Any]:
    """Return the settings of a [`Codec`] by name.

    Args:
        levels: how many values each rounded number can have; their product is the number of codes.
        stride: frames per code.
        width: width of the layers, which run at the rate of the codes.
        bins: mel channels.
        encoder_blocks, decoder_blocks: how many [`CodecBlock`]s encoder and decoder have.

    Raises:
        TypeError: an unknown setting.
        ValueError: a setting that is not a whole number, or too small; fewer than two levels, or too many codes.
    """
    sizes = {"stride": stride, "width": width, "bins": bins}
    blocks = {"encoder_blocks": encoder_blocks, "decoder_blocks": decoder_blocks}
    for name, value in (sizes | blocks).items():
        least = int(name in sizes)
        if not _is_whole(value, least):
            raise ValueError(f"{name} must be a whole number from {least} up, not {shown(value)}")
    if not isinstance(levels, (list, tuple)) or not levels or not all(_is_whole(level, 2) for level in levels):
        raise ValueError(f"levels must be whole numbers from 2 up, such as [8, 5, 5, 5], not {shown(levels)}")
    if math.prod(levels) > _MOST_CODES:
        raise ValueError(f"levels {shown(levels)} make more than {_MOST_CODES} codes")
    return {"levels": list(levels), **sizes, **blocks}


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class Codec(nn.Module):
    """Log-mel spectrograms to codes, and codes with a voice back to log-mel spectrograms.

    Args:
        settings: as `settings_of` takes them.

    Raises:
        TypeError, ValueError: as `settings_of`.
    """

    middle: torch.Tensor
    places: torch.Tensor

    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = settings_of(**settings)
        levels, stride, width, bins, encoder_blocks, decoder_blocks = self.settings.values()
        self.levels, self.stride, self.bins = tuple(levels), stride, bins
        self.enter = nn.Linear(bins * stride, width)
        self.encoder = nn.Sequential(*[CodecBlock(width) for _ in range(encoder_blocks)])
        self.quantise = nn.Linear(width, len(levels))
        self.voice = nn.Sequential(nn.Linear(2 * bins, width), nn.GELU(), nn.Linear(width, 2 * width))
        self.expand = nn.Linear(len(levels), width)
        self.decoder = nn.ModuleList([CodecBlock(width, 1 + index % 2) for index in range(decoder_blocks)])
        self.leave = nn.Linear(width, bins * stride)
        self.smooth = nn.Conv1d(bins, bins, 5, padding=2)
        for parameter in self.smooth.parameters():
            nn.init.zeros_(parameter)
        middle = (torch.tensor(levels, dtype=torch.float32) - 1) / 2
        places = [math.prod(levels[:index]) for index in range(len(levels))]
        self.register_buffer("middle", middle, persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)

    def grid_of(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Map log-mel `[clips, bins, stride * codes]` to levels `[clips, codes, len(levels)]`.

        The levels are whole numbers from 0; their gradient is that of the numbers before rounding.
        """
        frames = (log_mel.transpose(1, 2) - MEAN) / SPREAD
        stacked = frames.reshape(log_mel.shape[0], log_mel.shape[2] // self.stride, -1)
        level = (torch.tanh(self.quantise(self.encoder(self.enter(stacked)))) + 1) * self.middle
        return level + (level.round() - level).detach()

    @torch.no_grad()
    def codes_of(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Encode log-mel `[clips, bins, frames]` as codes `[clips, ceil(frames / stride)]` int64."""
        missing = -log_mel.shape[-1] % self.stride
        padded = F.pad(log_mel, (0, missing), mode="replicate") if missing else log_mel
        return (self.grid_of(padded).round().long() * self.places).sum(-1)

    def levels_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the levels `[clips, codes, len(levels)]` float32 of codes `[clips, codes]`."""
        sizes = torch.tensor(self.levels, device=codes.device)
        return ((codes[..., None] // self.places) % sizes).to(self.middle.dtype)

    def log_mel_of(self, grid: torch.Tensor, voice: torch.Tensor) -> torch.Tensor:
        """Decode levels `[clips, codes, len(levels)]` in voices `[clips, 2 * bins]` to `[clips, bins, frames]`."""
        x = self.expand(grid / self.middle - 1)
        scale, shift = self.voice(voice)[:, None].chunk(2, -1)
        for index, block in enumerate(self.decoder):
            if index < 2:
                x = x * (1 + scale) + shift
            x = block(x)
        rough = self.leave(x).reshape(x.shape[0], -1, self.bins).transpose(1, 2)
        return (rough + self.smooth(rough)) * SPREAD + MEAN


def voice_of(log_mel: torch.Tensor) -> torch.Tensor:
    """Return mean and spread of each channel, `[2 * bins]`, of a voice's log-mel `[bins, frames]`.

    Frames of digital silence, with which a short clip is filled up, are left out.
    """
    heard = log_mel[:, log_mel.mean(0) > FLOOR + 1]
    if heard.shape[1] < 2:
        raise ValueError("the voice's clip is silent: give one that can be heard")
    heard = (heard - MEAN) / SPREAD
    return torch.cat([heard.mean(-1), heard.std(-1)])
