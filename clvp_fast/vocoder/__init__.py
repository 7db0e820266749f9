"""Codes to sound: the protocol of a vocoder, and the one that a checkpoint folder may bring.

A checkpoint folder with `vocoder.json` (kind and sizes) and `vocoder.safetensors` (weights) has a vocoder of its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clvp_fast.io.files import write_json
from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor
from clvp_fast.vocoder.codec import Codec, voice_of
from clvp_fast.vocoder.griffin_lim import GriffinLim

SETTINGS_FILE, WEIGHTS_FILE = "vocoder.json", "vocoder.safetensors"
KIND = "fsq-codec"


class Vocoder(Protocol):
    """A maker of samples from candidates; the command line takes any object with these two.

    sampling_rate: of the samples, in Hz.
    """

    sampling_rate: int

    def speak(
        self, codes: Sequence[np.ndarray], voice: torch.Tensor, latents: Sequence[torch.Tensor] | None = None
    ) -> list[np.ndarray]:
        """Return samples of the candidates of one text.

        Args:
            codes: the candidates, each `[length]` int64, without start and stop token; a length may be 0.
            voice: the clip's features `[bins, frames]` float32, from the checkpoint's feature extractor.
            latents: of each candidate `[1, length, hidden_size]` float32, where the caller has them.

        Returns:
            For each candidate float32 samples in [-1, 1]; none for an empty one.

        Raises:
            ValueError: codes or a voice that cannot be spoken, latents that are needed and absent, or samples that come
                out as NaN or infinite.
        """
        ...


class CodecVocoder:
    """The [`Vocoder`] of a [`Codec`], with Griffin-Lim behind it. It runs on the CPU and needs no latents."""

    def __init__(self, codec: Codec, extractor: ClvpFeatureExtractor, iterations: int = 32):
        self.codec = codec.eval()
        self.sampling_rate = extractor.sampling_rate
        self.invert = GriffinLim(extractor, iterations)

    @torch.no_grad()
    def log_mel(self, codes: np.ndarray | torch.Tensor, voice: torch.Tensor) -> torch.Tensor:
        """Decode codes `[length]` in a voice `[bins, frames]` to log-mel `[bins, stride * length]` float32."""
        codes = torch.as_tensor(codes, device="cpu")
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.codec.num_codes:
            found = f"{int(codes.min())} to {int(codes.max())}"
            raise ValueError(f"the vocoder knows codes from 0 to {self.codec.num_codes - 1}, and these are {found}")
        if voice.ndim != 2 or voice.shape[0] != self.codec.bins:
            raise ValueError(f"a voice must be [{self.codec.bins}, frames], got {list(voice.shape)}")
        voice = voice_of(voice.float().cpu())
        return self.codec.log_mel_of(self.codec.levels_of(codes[None]), voice[None])[0]

    def speak(
        self, codes: Sequence[np.ndarray], voice: torch.Tensor, latents: Sequence[torch.Tensor] | None = None
    ) -> list[np.ndarray]:
        """Do as [`Vocoder.speak`]; `latents` are not looked at."""
        sounds = [
            self.invert(self.log_mel(row, voice)).numpy() if len(row) else np.zeros(0, dtype=np.float32)
            for row in codes
        ]
        if not all(np.isfinite(samples).all() for samples in sounds):
            raise ValueError("the vocoder gives samples that are NaN or infinite: its weights are damaged")
        return sounds


def save_vocoder(folder: Path, codec: Codec, dtype: torch.dtype = torch.float16) -> None:
    """Write the two files of a [`CodecVocoder`] into a checkpoint's folder."""
    write_json(folder / SETTINGS_FILE, {"kind": KIND, **codec.settings})
    save_file({name: value.to(dtype) for name, value in codec.state_dict().items()}, folder / WEIGHTS_FILE)


def load_vocoder(folder: Path, extractor: ClvpFeatureExtractor) -> CodecVocoder | None:
    """Load the vocoder of a checkpoint's folder; None where it has none.

    Raises:
        ValueError: one of its files is damaged, of another kind, or absent beside the other.
    """
    settings_file, weights_file = folder / SETTINGS_FILE, folder / WEIGHTS_FILE
    if not settings_file.is_file() and not weights_file.is_file():
        return None
    for path in (settings_file, weights_file):
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} has half a vocoder: {path.name} is missing")
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        kind = settings.pop("kind", None)
        if kind != KIND:
            raise ValueError(f"its kind is {kind!r}, and {KIND!r} alone is known")
        codec = Codec(**settings)
        codec.load_state_dict({name: value.float() for name, value in load_file(weights_file).items()})
    except (SafetensorError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the vocoder of checkpoint {folder} cannot be loaded: {reason}") from error
    return CodecVocoder(codec, extractor)
