"""Measures the shipped checkpoint again, and compares the result with the figures of its model card."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

from examples.train import evaluate, model
from examples.train.card import read_figures

# Two measurements of the same may differ by at most this many standard errors of their difference.
APART = 3.0


def quality(folder: Path, checkpoint: Path, heard: int) -> Iterator[tuple[dict, dict]]:
    """Measure each evaluation of the card of `checkpoint` again; yield the result and the card's figures.

    heard: the most candidates of an evaluation that are heard; they are those of its first sentences. The work is in
    `folder`, under the digest of the weights, so that an interrupted one continues.

    Raises:
        Refused: there is no such checkpoint, or its card has no figures.
    """
    told = read_figures(checkpoint)
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]
    work = folder / f"quality-{digest}"
    model.go_on_from(work, checkpoint)
    for figures in told:
        count = figures["candidates"]
        sentences = min(figures["sentences"], max(1, heard // count))
        yield evaluate.evaluate(work, sentences, count, figures["kind"]), figures


def compare(found: dict, told: dict) -> tuple[list[str], bool]:
    """Return a line for each figure of an evaluation, and whether all of them are within `APART` standard errors."""
    pairs = {"mean candidate": ("mean", found, told)}
    for count in evaluate.GROUPS:
        if (name := f"best_of_{count}") in told:
            pairs[f"picked of {count}"] = ("picked", found[name], told[name])
    lines, good = (
        [f"{told['kind']} language model, {found['sentences']} sentences of {told['candidates']} candidates"],
        True,
    )
    for name, (figure, mine, theirs) in pairs.items():
        value, error = mine[figure], mine[f"{figure}_error"]
        card, its_error = theirs[figure], theirs[f"{figure}_error"]
        near = abs(value - card) <= APART * math.hypot(error, its_error)
        good = good and near
        verdict = "as the card says" if near else "not as the card says"
        lines.append(f"  {name}: word errors {value:.3f} ± {error:.3f}, card {card:.3f} ± {its_error:.3f}: {verdict}")
    return lines, good
