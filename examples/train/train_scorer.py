"""Trains the text and the speech encoder to tell speech that says a text from speech that does not.

The wrong texts are the others of the batch, and the right one with a word replaced, dropped, doubled or swapped. The
wrong codes are those of the other texts, and the right ones with a stretch cut, doubled, torn off or taken from another
sentence. Of the decoder's own candidates, those with fewer word errors must score higher. There are few of these, and
they would be learned by heart; so each is compared at most twice, in the last steps, and some codes of every row are
moved to a neighbour that sounds nearly the same.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clvp_fast.models.clvp.similarity import normalized
from examples.train import data
from examples.train.candidates import read_candidates
from examples.train.model import MOST_CODES, ids_of
from examples.train.muon import optimizers
from examples.train.precision import products
from examples.train.state import Training, draws, note
from examples.train.texts import WORDS, written
from examples.train.train_codec import LEVELS

# The true pairs of a step, and the texts whose own candidates are compared.
BATCH, COMPARED = 32, 8
# A text's candidates are compared so many times. After twenty times 99 % of their pairs were in order, and 58 % of
# those of unseen texts; after two times 84 % and 57 %.
PASSES = 2
# The least difference of word errors by which candidates are ordered, because the recogniser makes errors too. Of the
# files of candidates, one in so many is only looked at.
DIFFERENCE, LOOKED_AT = 0.12, 10
# The largest share of a row's codes that are moved.
MOVED = 0.15


class ScorerPart(nn.Module):
    """The parts of a model that this trains, under the names that they have in it."""

    def __init__(self, model):
        super().__init__()
        self.text_encoder_model, self.speech_encoder_model = model.text_encoder_model, model.speech_encoder_model
        self.logit_scale = model.logit_scale
        config = model.config
        self.end, self.silence = config.text_config.eos_token_id, config.decoder_config.decoder_fixing_codes[0]

    def texts(self, lines: list[str]) -> torch.Tensor:
        """Return embeddings `[texts, dim]` of length 1."""
        ids = [torch.tensor([*ids_of(line), self.end]) for line in lines]
        tokens, mask = _filled(ids, 0)
        return normalized(self.text_encoder_model(input_ids=tokens, attention_mask=mask).embeds)

    def speech(self, rows: list[torch.Tensor], length: int | None) -> torch.Tensor:
        """Return embeddings `[rows, dim]` of length 1, padded with silence to `length`, or each at its own for None."""
        if length is None:
            tokens, mask = _filled(rows, self.silence)
            return normalized(self.speech_encoder_model(input_ids=tokens, attention_mask=mask).embeds)
        tokens = torch.stack([F.pad(row, (0, length - len(row)), value=self.silence) for row in rows])
        return normalized(self.speech_encoder_model(input_ids=tokens).embeds)


def _filled(rows: list[torch.Tensor], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as `[rows, longest]`, and the mask of their own numbers."""
    longest = max(map(len, rows))
    tokens = torch.stack([F.pad(row, (0, longest - len(row)), value=fill) for row in rows])
    return tokens, (torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]).long()


def train_scorer(folder: Path, model, steps: int) -> None:
    """Train into `scorer.pt`, on the existing codes and candidates and on new ones as they come."""
    part = ScorerPart(model).train()
    training = Training(folder, "scorer", part, optimizers(part.named_parameters(), lr=0.01), steps, average=0.995)
    if training.step >= training.steps:
        return
    corpus = data.Corpus(folder, lambda said: [len(said) // 200])  # all of one length, so any can be in a batch
    own: dict[Path, list] = {}
    looked_at: dict[Path, list] = {}
    rows = []
    for step in training:
        if step % 50 == 0:
            corpus.refresh()
            for path in sorted((folder / "candidates").glob("*.npz")):
                files = looked_at if int(path.stem) % LOOKED_AT == LOOKED_AT - 1 else own
                files.setdefault(path, read_candidates(path))
        random = draws(3, step)
        compared = compared_at(training.steps - step, [item for items in own.values() for item in items])
        loss, row = _loss(part, corpus, compared, random, spoilt=step > 0.1 * steps)
        training.learn(loss)
        rows.append(row)
        if step % 100 == 99:
            told = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
            means = {name: round(float(np.mean(values)), 3) for name, values in told.items() if values}
            unseen = _in_order(part, [item for items in looked_at.values() for item in items])
            note(
                folder,
                stage="scorer",
                step=step + 1,
                cpu=round(training.spent),
                **means,
                files=len(own),
                unseen_pairs=round(unseen, 3),
            )
            rows.clear()


@torch.no_grad()
def _in_order(part: ScorerPart, compared: list) -> float:
    """Return the share of pairs of candidates that score in the order of their word errors; NaN without candidates."""
    part.eval()
    shares = []
    for item in compared:
        scores = (
            part.texts([written(item[0], ".")]).float() @ part.speech([r for r in item[1] if len(r)], None).float().T
        )
        shares.append(own_pairs(scores, [item])[1])
    part.train()
    return float(np.nanmean(shares)) if shares else float("nan")


def compared_at(left: int, own: list) -> list:
    """Return the sentences whose candidates are compared when `left` steps are left; their word errors differ.

    Each sentence has its turn `PASSES` times in all, in another order each time; before that there are none.
    """
    differing = [item for item in own if item[2].max() - item[2].min() > DIFFERENCE]
    order = np.concatenate([draws(4, number).permutation(len(differing)) for number in range(PASSES)])
    return [differing[index] for index in order[(left - 1) * COMPARED : left * COMPARED]]


def _loss(part: ScorerPart, corpus: data.Corpus, compared: list, random: np.random.Generator, spoilt: bool):
    """Return the loss, and a row of its parts."""
    items = [corpus.items[index] for index in corpus.batch(random, BATCH)]
    said, codes = [item[1] for item in items], [item[2] for item in items]
    lines, rows = list(said), list(codes)
    if spoilt:
        lines += [spoil_text(text, random) for text in said]
        rows += [spoil_codes(codes[k], codes[(k + 1) % len(codes)], random) for k in range(0, len(codes), 2)]
    own_lines, own_rows = [item[0] for item in compared], [row for item in compared for row in item[1] if len(row)]
    lines, rows = [*lines, *own_lines], [move_codes(row, random) for row in (*rows, *own_rows)]
    lines = [written(line, ("", ".")[int(random.random() < 0.5)]) for line in lines]

    kind = random.random()
    longest = max(map(len, rows))
    length = None if kind < 0.5 else MOST_CODES if kind < 0.75 else int(random.integers(longest, MOST_CODES + 1))
    with products():
        text, speech = part.texts(lines).float(), part.speech(rows, length).float()
    scores = text @ speech.T * part.logit_scale.clamp(max=4.6).exp()

    count = len(said)
    mask = torch.tensor([[i != j and said[i] == said[j] for j in range(count)] for i in range(count)])
    of_text = scores[:count, : len(scores[0]) - len(own_rows)].clone()
    of_text[:, :count] = of_text[:, :count].masked_fill(mask, -1e4)
    of_speech = scores[: len(scores) - len(own_lines), :count].clone()
    of_speech[:count] = of_speech[:count].masked_fill(mask, -1e4)
    target = torch.arange(count)
    loss = (F.cross_entropy(of_text, target) + F.cross_entropy(of_speech.T, target)) / 2
    row = {
        "loss": loss.item(),
        "text_to_speech": (of_text.argmax(1) == target).float().mean().item(),
        "speech_to_text": (of_speech.argmax(0) == target).float().mean().item(),
        "own_pairs": None,
    }
    if compared:
        own_loss, row["own_pairs"] = own_pairs(scores[-len(compared) :, -len(own_rows) :], compared)
        loss = loss + own_loss
    return loss, row


def own_pairs(scores: torch.Tensor, compared: list) -> tuple[torch.Tensor, float]:
    """Return the loss of a text's candidates by the order of their word errors, and the share of pairs in order.

    Args:
        scores: `[texts, all candidates]`, those of a text one after another, empty ones left out.
        compared: the items of `read_candidates`, one for each text.
    """
    losses, right, start = [], [], 0
    for index, (_, rows, errors) in enumerate(compared):
        kept = errors[[len(row) > 0 for row in rows]]
        own = scores[index, start : start + len(kept)]
        start += len(kept)
        better = (kept[:, None] < kept[None] - DIFFERENCE).nonzero()
        if len(better):
            ahead = own[better[:, 0]] - own[better[:, 1]]
            losses.append(F.softplus(-ahead).mean())
            right.append((ahead > 0).float().mean().item())
    if not losses:
        return scores.sum() * 0, float("nan")
    return torch.stack(losses).mean(), float(np.mean(right))


def spoil_text(text: str, random: np.random.Generator) -> str:
    """Return a text with one word replaced, dropped, doubled or swapped with another."""
    words, kind = text.split(), random.random()
    place, other = random.integers(0, len(words), 2)
    if kind < 0.6 or len(words) == 1:
        words[place] = WORDS[random.integers(len(WORDS))]
    elif kind < 0.8:
        del words[place]
    elif kind < 0.9:
        words.insert(place, words[place])
    else:
        words[place], words[other] = words[other], words[place]
    changed = " ".join(words)
    return changed if changed != text else f"{text} {WORDS[random.integers(len(WORDS))]}"


def spoil_codes(codes: torch.Tensor, other: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Return codes `[length]` with a stretch cut, doubled, torn off at the end, or replaced by one of `other`."""
    length, kind = len(codes), random.random()
    start, count = int(random.integers(0, max(1, length - 6))), int(random.integers(4, 14))
    end = min(length, start + count)
    if kind < 0.25 and length > 16:
        return torch.cat([codes[:start], codes[end:]])
    if kind < 0.4 and length + count <= MOST_CODES:
        return torch.cat([codes[:end], codes[start:end], codes[end:]])
    if kind < 0.5:
        return codes[: max(4, int(length * random.uniform(0.4, 0.85)))]
    place = int(random.integers(0, max(1, len(other) - count)))
    return torch.cat([codes[:start], other[place : place + count], codes[end:]])[:MOST_CODES]


def move_codes(codes: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Return codes `[length]` of which up to the share MOVED lie one level beside, in one of the codec's numbers."""
    moved = random.random(len(codes)) < random.uniform(0, MOVED)
    number = random.integers(0, len(LEVELS), len(codes))
    place, levels = np.cumprod([1, *LEVELS[:-1]])[number], np.array(LEVELS)[number]
    level = codes.numpy() // place % levels
    beside = np.clip(level + random.choice([-1, 1], len(codes)), 0, levels - 1)
    return codes + torch.from_numpy(np.where(moved, (beside - level) * place, 0))
