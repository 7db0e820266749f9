"""Trains the codec, log-mel to 1000 codes at 21.5 Hz and back: first both ways, then only the way back.

In the second part codes are frozen, so that what the decoder has learned about them stays valid.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clvp_fast.vocoder import Codec, voice_of
from clvp_fast.vocoder.codec import FLOOR, SPREAD
from examples.train import data
from examples.train.state import Refused, Training, draws, note, step_of

# The number of values that each of the four numbers of a code can have.
LEVELS = (8, 5, 5, 5)
# The frames of an excerpt, and the excerpts of a step.
FRAMES, BATCH = 96, 16
# Files that depend on the codes.
OF_CODES = ("codes", "held_out.npz", "candidates", "decoder.pt", "scorer.pt")


def make_codec(width: int = 192) -> Codec:
    """Make an untrained codec: 8 * 5 * 5 * 5 codes of 4 frames each. It was better than 4096 codes at 43 Hz."""
    torch.manual_seed(0)
    return Codec(levels=LEVELS, stride=4, width=width)


def train_codec(folder: Path, codec: Codec, steps: int, files: int) -> None:
    """Train `codec` on `files` files of speech, into `codec.pt`; the last quarter of the steps is the second part.

    Raises `Refused` if the state has codes of the present codec, and training would change them.
    """
    if step_of(folder / "codec.pt") >= steps:
        return
    paths = data.make_speech(folder, files)
    clips = data.make_clips(folder)
    known = torch.stack([torch.stack([voice_of(clip) for clip in of_voice]) for of_voice in clips])
    optimizer = torch.optim.AdamW(codec.parameters(), lr=2.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    training = Training(folder, "codec", codec, [optimizer], steps, average=0.99)
    both_ways = int(0.75 * steps)
    stale = [name for name in OF_CODES if (folder / name).exists()]
    if stale and training.step < both_ways:
        raise Refused(
            f"the codec is to be trained on from step {training.step} to {steps}, and {', '.join(stale)} of {folder} "
            "are of the codec as it was: remove them, or leave the number of its steps as it was"
        )
    speech = [pair for path in paths for pair in data.read_speech(path)]
    losses = []
    codec.train()
    for step in training:
        random = draws(1, step)
        if step >= both_ways:
            for part in (codec.enter, codec.encoder, codec.quantise):
                part.requires_grad_(False)
        loss, off = reconstruction(codec, *_excerpts(speech, known, random))
        training.learn(loss)
        losses.append(off)
        if step % 250 == 249:
            note(folder, stage="codec", step=step + 1, cpu=round(training.spent), off=round(np.mean(losses), 4))
            losses.clear()


def reconstruction(codec: nn.Module, mel: torch.Tensor, voice: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the loss, and the mean error of a value of the normalised log-mel."""
    difference = (codec.log_mel_of(codec.grid_of(mel), voice) - mel) / SPREAD
    off = difference.abs().mean()
    return off + 0.3 * (difference[..., 1:] - difference[..., :-1]).abs().mean(), off.item()


def _excerpts(speech, known: torch.Tensor, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return excerpts `[BATCH, 80, FRAMES]` of random sentences, and voices from another clip, `[BATCH, 160]`."""
    mels, told = [], []
    for index in random.integers(0, len(speech), BATCH):
        number, mel = speech[index]
        mel = F.pad(mel, (0, max(0, FRAMES - mel.shape[1])), value=FLOOR)
        start = int(random.integers(0, mel.shape[1] - FRAMES + 1))
        mels.append(mel[:, start : start + FRAMES])
        told.append(known[number, random.integers(0, known.shape[1])])
    return torch.stack(mels), torch.stack(told)
