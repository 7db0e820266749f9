"""Tortoise's diffusion and vocoder as a `Vocoder` of this package: latents of candidates to sound at 24 kHz.

Both are tortoise-tts's own classes over its own files, and its own code prepares a recording for the diffusion.
"""

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clvp_fast.audio import read_audio
from clvp_fast.engine.voice_files import latents_at, read_latents, recordings_at
from clvp_fast.integrations.importing import make_tortoise_importable
from clvp_fast.io.files import user_path

#: The files of Tortoise's models, and those that its package contains.
MODELS = ("autoregressive.pth", "clvp2.pth", "diffusion_decoder.pth", "vocoder.pth")
DATA = ("tokenizer.json", "mel_norms.pth")
# The samples of a recording at 24 kHz that its diffusion gets; the sampling rates of the voice and of the sound.
_HEARD, _VOICE_RATE, _RATE = 102_400, 22_050, 24_000
_GET = (
    "tortoise-tts 3.0.0 downloads them when its TextToSpeech(models_dir=DIR) is made for the first time, from "
    "huggingface.co/Manmay/tortoise-tts"
)


def tortoise_files(folder: str | Path) -> dict[str, Path]:
    """Find Tortoise's files by name in a folder or anywhere below it, such as its own `models_dir`.

    Tokenizer and mel norms may come from the installed package.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing; the message says how to get it.
        ImportError: tortoise-tts is not installed.
    """
    place = user_path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"there is no folder {place} of Tortoise's models: {_GET}")
    package = importlib.util.find_spec("tortoise")
    beside = [Path(path, "data") for path in (package.submodule_search_locations or ())] if package else []
    found = {}
    for name in (*MODELS, *DATA):
        places: Iterable[Path] = [place / name, *sorted(place.rglob(name)), *(one / name for one in beside)]
        file = next((path for path in places if path.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{place} has no {name}, in it or below it: {_GET}")
        found[name] = file
    return found


class TortoiseVocoder:
    """A `Vocoder` for one voice, made of Tortoise's diffusion and UnivNet.

    Args:
        diffusion: a `DiffusionTts`, in eval mode.
        vocoder: a `UnivNetGenerator`, ready for inference, on the same device.
        conditioning: the voice for the diffusion, `[1, width]`, from `voice_for_diffusion`.
        iterations: iterations of the diffusion, at least 2; Tortoise's presets have 30, 80, 200 and 400.
        seed: seed of its noise; the same seed gives the same sound.

    Raises:
        ValueError: fewer than 2 iterations.
    """

    sampling_rate = _RATE

    def __init__(self, diffusion: Any, vocoder: Any, conditioning: torch.Tensor, iterations: int = 80, seed: int = 0):
        if iterations < 2:
            raise ValueError(f"Tortoise's diffusion takes from 2 iterations up, not {iterations}")
        self._api: Any = importlib.import_module("tortoise.api")
        self._diffusion, self._vocoder, self._seed = diffusion, vocoder, seed
        self._device = next(diffusion.parameters()).device
        self._conditioning = conditioning.to(self._device)
        self._diffuser = self._api.load_discrete_vocoder_diffuser(
            desired_diffusion_steps=iterations, cond_free=True, cond_free_k=2
        )

    @torch.no_grad()
    def speak(
        self, codes: Sequence[np.ndarray], voice: torch.Tensor, latents: Sequence[torch.Tensor] | None = None
    ) -> list[np.ndarray]:
        """Make sound from `latents` in the vocoder's own voice, as `clvp_fast.vocoder.Vocoder`; `voice` is ignored.

        Raises:
            ValueError: no latents, or samples that are NaN or infinite.
        """
        if latents is None:
            raise ValueError("Tortoise's diffusion needs the latents of candidates: make the engine with latents=True")
        sounds = []
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            for of_candidate in latents:
                mel = self._api.do_spectrogram_diffusion(
                    self._diffusion, self._diffuser, of_candidate.to(self._device), self._conditioning, verbose=False
                )
                sounds.append(self._vocoder.inference(mel).flatten().float().cpu().numpy().clip(-1, 1))
        if not all(np.isfinite(samples).all() for samples in sounds):
            raise ValueError("Tortoise's vocoder gives samples that are NaN or infinite: its files are damaged")
        return sounds


def load_tortoise_vocoder(
    files: dict[str, Path], place: str | Path, device: str | torch.device, iterations: int = 80, seed: int = 0
) -> TortoiseVocoder:
    """Load the vocoder of Tortoise's `files` for the voice at `place`: recordings, or a pair of latents.

    Raises:
        FileNotFoundError, ValueError: files that are damaged or of other sizes, or a voice without a part for the
            diffusion.
    """
    make_tortoise_importable()
    api: Any = importlib.import_module("tortoise.api")
    diffusion = api.DiffusionTts(
        model_channels=1024,
        num_layers=10,
        in_channels=100,
        out_channels=200,
        in_latent_channels=1024,
        in_tokens=8193,
        dropout=0,
        use_fp16=False,
        num_heads=16,
        layer_drop=0,
        unconditioned_percentage=0,
    ).eval()
    vocoder = api.UnivNetGenerator()
    _load(diffusion, files["diffusion_decoder.pth"], None)
    _load(vocoder, files["vocoder.pth"], "model_g")
    vocoder.eval(inference=True)
    diffusion, vocoder = diffusion.to(device), vocoder.to(device)
    return TortoiseVocoder(diffusion, vocoder, voice_for_diffusion(diffusion, place), iterations, seed)


def _load(module: nn.Module, path: Path, part: str | None) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state if part is None else state[part])
    except Exception as error:  # torch raises many types for a damaged file
        raise ValueError(f"{path} is not Tortoise's {path.name}, or is damaged: download it again") from error


@torch.no_grad()
def voice_for_diffusion(diffusion: Any, place: str | Path) -> torch.Tensor:
    """Return the conditioning `[1, width]` that Tortoise's diffusion gets for the voice at `place`.

    For recordings it is the mean over their first 4.3 s; for a file of latents `(auto, diffusion)`, the second.

    Raises:
        FileNotFoundError, ValueError: as from `load_voice`; also a saved voice, or latents for the decoder alone.
    """
    path, device = user_path(place), next(diffusion.parameters()).device
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is a saved voice, which tells the diffusion nothing: give its recordings")
    if (file := latents_at(path)) is not None:
        pair = read_latents(file)
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], torch.Tensor):
            raise ValueError(
                f"{file} holds latents for the decoder alone: give the pair (auto, diffusion), or recordings"
            )
        return pair[1].reshape(1, -1).float().to(device)
    resample = importlib.import_module("torchaudio").functional.resample
    api: Any = importlib.import_module("tortoise.api")
    mels = []
    for recording in recordings_at(path)[0]:
        samples = torch.from_numpy(read_audio(recording, _VOICE_RATE).samples)[None]
        samples = resample(samples, _VOICE_RATE, _RATE)[:, :_HEARD]
        samples = F.pad(samples, (0, _HEARD - samples.shape[1]))
        mels.append(api.wav_to_univnet_mel(samples.to(device), do_normalization=False, device=device))
    return diffusion.get_conditioning(torch.stack(mels, 1))
