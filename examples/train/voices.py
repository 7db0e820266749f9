"""The two synthetic voices that the demo is trained on, and how their speech becomes features.

`rms` is one of flite's voices, made from CMU ARCTIC recordings; `heart` is that of the package hibari-tts. The README
of this folder has their licences.
"""

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from clvp_fast import ClvpFeatureExtractor
from clvp_fast.audio import load_audio
from examples.train.state import Refused

RATE = 22050
NAMES = ("heart", "rms")


def _finish(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample to 22.05 kHz, cut the silence around to 50 ms, and set one loudness."""
    samples = np.asarray(samples, dtype=np.float32).squeeze()
    if rate != RATE:
        import soxr

        samples = soxr.resample(samples, rate, RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    margin = RATE // 20
    samples = samples[max(loud[0] - margin, 0) : loud[-1] + margin]
    return (samples * (0.08 / np.sqrt(np.square(samples).mean()))).clip(-1, 1).astype(np.float32)


class Flite:
    """A voice of the program flite."""

    def __init__(self, voice: str):
        if shutil.which("flite") is None:
            raise Refused("the program flite is not installed: apt-get install flite")
        self.voice = voice

    def __call__(self, said: str, seed: int = 0) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="clvp-fast-flite-") as folder:
            path = Path(folder) / "said.wav"
            subprocess.run(["flite", "-voice", self.voice, "-t", said, "-o", path], check=True)
            return _finish(*_read(path))


def _read(path: Path) -> tuple[np.ndarray, int]:
    samples, _ = load_audio(path, RATE)
    return samples, RATE


class Heart:
    """The voice of hibari-tts; its noise follows from the seed."""

    def __init__(self):
        try:
            from hibari import Hibari
        except ImportError as error:
            raise Refused("the package hibari-tts is not installed: pip install hibari-tts") from error
        self.synthesise = Hibari(threads=1)

    def __call__(self, said: str, seed: int = 0) -> np.ndarray:
        return _finish(self.synthesise(said.capitalize() + ".", seed=seed), 24000)


@cache
def voice(name: str):
    """Return the synthesiser of a name: `(text, seed)` → float32 samples at 22.05 kHz."""
    return Heart() if name == "heart" else Flite(name)


@cache
def extractor() -> ClvpFeatureExtractor:
    return ClvpFeatureExtractor()


def features(samples: np.ndarray) -> torch.Tensor:
    """Return log-mel `[80, frames]` of whole samples."""
    found = extractor()(samples, sampling_rate=RATE, padding=False, max_length=len(samples), return_tensors="pt")
    return found["input_features"][0]


def clip_features(samples: np.ndarray) -> torch.Tensor:
    """Return log-mel `[80, frames]` of a voice's clip, cut or filled up to 6 s, as the command line makes it."""
    return extractor()(samples, sampling_rate=RATE, return_tensors="pt")["input_features"][0]
