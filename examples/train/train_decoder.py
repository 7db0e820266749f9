"""Trains the conditioning encoder and the decoder to predict the next code of a text in a voice."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from examples.train import data
from examples.train.model import PARTS, ids_of, speech_logits
from examples.train.muon import optimizers
from examples.train.precision import products
from examples.train.state import Training, draws, note
from examples.train.texts import written

BATCH = 32


class DecoderPart(nn.Module):
    """The parts of a model that this trains, under the names that they have in it."""

    def __init__(self, model):
        super().__init__()
        self.conditioning_encoder, self.speech_decoder_model = model.conditioning_encoder, model.speech_decoder_model
        assert all(name.startswith(PARTS["decoder"]) for name in self.state_dict())


def train_decoder(folder: Path, model, codec, steps: int) -> None:
    """Train into `decoder.pt`, on the existing codes and on new ones as they come."""
    part = DecoderPart(model).train()
    training = Training(folder, "decoder", part, optimizers(part.named_parameters(), lr=0.02), steps)
    if training.step >= training.steps:
        return
    clips, held_out = data.make_clips(folder), data.make_held_out(folder, codec)
    # A full stop makes a text one token longer, so all texts of a batch have it or none.
    corpus = data.Corpus(folder, lambda said: list(ids_of(said)))
    losses, tokens, spent = [], 0, training.spent
    for step in training:
        random = draws(2, step)
        loss, count = _loss(model, corpus, clips, random)
        training.learn(loss)
        losses.append(loss.item())
        tokens += count
        if step % 50 == 49:
            corpus.refresh()
        if step % 100 == 99:
            held = held_out_loss(model, held_out[:80], clips) if step % 500 == 499 else None
            rate = tokens / max(training.spent - spent, 1e-9)
            note(
                folder,
                stage="decoder",
                step=step + 1,
                cpu=round(training.spent),
                loss=round(np.mean(losses), 3),
                tokens_a_second=round(rate),
                sentences=len(corpus),
                **({} if held is None else {"held_out": held}),
            )
            losses, tokens, spent = [], 0, training.spent


def _loss(model, corpus: data.Corpus, clips: torch.Tensor, random: np.random.Generator) -> tuple[torch.Tensor, int]:
    """Return the mean loss of a code of a batch, and the number of tokens that went through the decoder."""
    chosen = corpus.batch(random, BATCH)
    ending = ("", ".")[int(random.random() < 0.5)]
    rows = [corpus.items[index] for index in chosen]
    ids = torch.tensor([ids_of(written(said, ending)) for _, said, _ in rows])
    codes, target = padded([codes for *_, codes in rows], model.config.decoder_config.eos_token_id)
    spoken = torch.stack([of_voice[random.integers(len(of_voice))] for of_voice in clips])
    with products():
        voices = model.conditioning_encoder.encode_voice(spoken)[[number for number, *_ in rows]]
        logits = speech_logits(model, voices, ids, codes)
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-100)
    return loss, len(rows) * (ids.shape[1] + 4) + target.numel()


def padded(rows: list[torch.Tensor], stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[rows, longest]` filled up with `stop`, and targets `[rows, longest + 1]`, -100 after the end."""
    longest = max(map(len, rows))
    codes = torch.stack([F.pad(row, (0, longest - len(row)), value=stop) for row in rows])
    target = F.pad(codes, (0, 1), value=stop)
    for row, target_row in zip(rows, target, strict=True):
        target_row[len(row) + 1 :] = -100
    return codes, target


@torch.no_grad()
def held_out_loss(model, held_out, clips: torch.Tensor) -> list[float]:
    """Return the mean loss of a code of sentences outside of training, for each voice."""
    model.eval()
    voices = model.conditioning_encoder.encode_voice(clips[:, 0])
    means = []
    for items in data.each_voice(held_out):
        losses = []
        for number, said, codes in items:
            codes, target = padded([codes], model.config.decoder_config.eos_token_id)
            logits = speech_logits(model, voices[number : number + 1], torch.tensor([ids_of(said)]), codes)
            losses.append(F.cross_entropy(logits[0], target[0]).item())
        means.append(round(float(np.mean(losses)), 3))
    model.train()
    return means
