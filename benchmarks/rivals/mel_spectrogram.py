"""The mel spectrograms of torchaudio and flashmel, which share torchaudio's arguments."""

from collections.abc import Callable
from importlib import import_module

import torch


def transform(module: str, device: str, **options) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make `module`'s `MelSpectrogram(**options)` on `device`, which has run once.

    Raises what keeps it from running: an absent package, or one that is built for another torch.
    """
    found = import_module(module).MelSpectrogram(**options).to(device)
    found(torch.zeros(1, 4 * options["n_fft"], device=device))
    return found
