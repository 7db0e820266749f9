"""Turns codes into sound: the protocol of a vocoder, and the codec that a checkpoint folder may contain.

A checkpoint folder with `vocoder.json` (kind and sizes) and `vocoder.safetensors` (weights) has a vocoder of its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from clvp_fast.io.errors import cut, shown
from clvp_fast.io.files import write_json
from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor
from clvp_fast.vocoder.codec import Codec, settings_of, voice_of
from clvp_fast.vocoder.griffin_lim import GriffinLim

SETTINGS_FILE, WEIGHTS_FILE = "vocoder.json", "vocoder.safetensors"
KIND = "fsq-codec"


class Vocoder(Protocol):
    """Makes samples from candidates; the command line takes any object with this attribute and this method.

    sampling_rate: the rate of the samples, in Hz.
    """

    sampling_rate: int

    def speak(
        self, codes: Sequence[np.ndarray], voice: torch.Tensor, latents: Sequence[torch.Tensor] | None = None
    ) -> list[np.ndarray]:
        """Return samples of the candidates of one text.

        Args:
            codes: the candidates, each `[length]` int64, without start and stop tokens; a length may be 0.
            voice: the clip's features `[bins, frames]` float32, from the checkpoint's feature extractor.
            latents: for each candidate `[1, length, hidden_size]` float32, if the caller has them.

        Returns:
            For each candidate float32 samples in [-1, 1]; no samples for an empty one.

        Raises:
            ValueError: codes or a voice that cannot be used, missing latents that it needs, or NaN or infinite samples
                in the result.
        """
        ...


class CodecVocoder:
    """The [`Vocoder`] of a [`Codec`], followed by Griffin-Lim. It runs on the CPU and needs no latents."""

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
        """Speak as [`Vocoder.speak`]; `latents` are ignored."""
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
    """Load the vocoder of a checkpoint's folder; return None if it has none.

    Raises:
        ValueError: one of its two files is damaged, of another kind, or missing.
    """
    settings_file, weights_file = folder / SETTINGS_FILE, folder / WEIGHTS_FILE
    if not settings_file.is_file() and not weights_file.is_file():
        return None
    for path in (settings_file, weights_file):
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} has half a vocoder: {path.name} is missing")
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"{SETTINGS_FILE} must hold settings by name, not {shown(settings)}")
        kind = settings.pop("kind", None)
        if kind != KIND:
            raise ValueError(f"its kind is {shown(kind)}, and {KIND!r} alone is known")
        settings = settings_of(**settings)
        _check_weights(weights_file, settings)
        codec = Codec(**settings)
        codec.load_state_dict({name: value.float() for name, value in load_file(weights_file).items()})
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = cut(" ".join(str(error).split()), 500)
        raise ValueError(f"the vocoder of checkpoint {folder} cannot be loaded: {reason}") from error
    return CodecVocoder(codec, extractor)


def _check_weights(path: Path, settings: dict[str, Any]) -> None:
    """Raise `ValueError` for tensors that do not match the settings, before memory is allocated for them."""
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    for side in ("encoder", "decoder"):
        found = len({name.split(".")[1] for name in shapes if name.startswith(f"{side}.")})
        if found != settings[f"{side}_blocks"]:
            raise ValueError(
                f"{SETTINGS_FILE} says {side}_blocks {settings[f'{side}_blocks']}, and {path.name} has {found}"
            )
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in Codec(**settings).state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            one, other = (
                ("none" if shape is None else list(shape)) for shape in (shapes.get(name), expected.get(name))
            )
            raise ValueError(f"{path.name} has for {name} the shape {one}, and {SETTINGS_FILE} asks for {other}")
