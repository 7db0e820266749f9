"""Measures the shipped checkpoint again, and compares the result with the figures of its model card."""

import hashlib
import json
import math
from pathlib import Path

from examples.train import evaluate, model
from examples.train.card import FIGURES
from examples.train.state import Refused

# Two measurements of the same may differ by at most this many standard errors of their difference.
APART = 3.0


def quality(folder: Path, checkpoint: Path, sentences: int, count: int, kind: str) -> tuple[dict, dict]:
    """Measure `checkpoint`; return the result, and the card's figures for as many candidates.

    The work is in `folder`, under the digest of the weights, so that an interrupted one continues.

    Raises:
        Refused: there is no such checkpoint, or its card has no figure of this kind and number of candidates.
    """
    if not (checkpoint / FIGURES).is_file():
        raise Refused(f"{checkpoint} has no {FIGURES}: export a trained checkpoint there first")
    told = json.loads((checkpoint / FIGURES).read_text(encoding="utf-8"))
    for figures in told:
        if figures["kind"] == kind and f"best_of_{count}" in figures:
            break
    else:
        raise Refused(f"the card of {checkpoint} has no figure of {count} candidates and the {kind} language model")
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]
    work = folder / f"quality-{digest}"
    model.go_on_from(work, checkpoint)
    return evaluate.evaluate(work, sentences, count, kind), figures


def compare(found: dict, told: dict, count: int) -> tuple[list[str], bool]:
    """Return a line for each figure, and whether all of them are within `APART` standard errors."""
    best, told_best = found[f"best_of_{count}"], told[f"best_of_{count}"]
    pairs = {
        "mean candidate": (found["mean"], found["mean_error"], told["mean"], told["mean_error"]),
        f"picked of {count}": (best["picked"], best["picked_error"], told_best["picked"], told_best["picked_error"]),
    }
    lines, good = [], True
    for name, (mine, error, theirs, their_error) in pairs.items():
        near = abs(mine - theirs) <= APART * math.hypot(error, their_error)
        good = good and near
        verdict = "as the card says" if near else "not as the card says"
        lines.append(f"{name}: word errors {mine:.3f} ± {error:.3f}, card {theirs:.3f} ± {their_error:.3f}: {verdict}")
    return lines, good
