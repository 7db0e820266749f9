"""Figures of the trained models by the recogniser: of candidates and their ranking, and of the codec alone.

The sentences are `texts.EVALUATION`, on which nothing is trained. Rows go to `evaluation-NAME.jsonl` one by one, so
that an evaluation that was interrupted goes on; `uses.jsonl` counts how often these sentences were used. The heard
words depend only on the decoder: candidates of an earlier scorer are ranked again by the present one, not heard again.
"""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from clvp_fast import Ranker
from clvp_fast.io.files import replacing
from clvp_fast.vocoder.codec import voice_of
from clvp_fast.vocoder.griffin_lim import GriffinLim
from examples.train import data, judge, texts, voices
from examples.train.candidates import Speaker, sampling
from examples.train.model import MOST_CODES, USES, ids_of
from examples.train.state import STOP, step_of
from examples.train.train_codec import make_codec

# The numbers of candidates of which ranking picks one.
GROUPS = (4, 16, 64, 256)


def evaluate(folder: Path, sentences: int, count: int, kind: str = "open", seed: int = 7) -> dict:
    """Measure word errors of `count` candidates per sentence, and of the best-scored of each 4, 16, 64, ..."""
    step, trained = step_of(folder / "decoder.pt"), step_of(folder / "scorer.pt")
    path = folder / f"evaluation-{step}-{count}-{kind}.jsonl"
    with open(folder / USES, "a", encoding="utf-8") as uses:
        uses.write(json.dumps({"step": step, "sentences": sentences, "count": count, "kind": kind}) + "\n")
    done = len(read_rows(path))
    speaker = Speaker(folder, scorer=True)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for number in range(done, sentences):
            STOP.check()
            said = texts.EVALUATION[number]
            (result,) = speaker.candidates([said], sampling(count, seed + number), number)
            codes = [row[:length] for row, length in zip(result.codes, result.lengths, strict=True)]
            sounds = [speaker.sound(row, number) for row in codes]
            errors = list(pool.map(judge.errors_of, repeat(said), sounds, repeat(kind), chunksize=4))
            row = {
                "said": said,
                "voice": voices.NAMES[number % 2],
                "errors": errors,
                "codes": [c.tolist() for c in codes],
                "scores": result.scores.tolist(),
                "scorer": trained,
            }
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    rows = ranked(read_rows(path), speaker.model, trained)
    with replacing(path) as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"step": step, "kind": kind, **summary(rows)}


def read_rows(path: Path) -> list[dict]:
    """Return the rows of an evaluation; none of a file that there is not."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def ranked(rows: list[dict], clvp, step: int) -> list[dict]:
    """Return rows with their candidates' scores by a scorer of `step` steps, as an engine gives them."""
    ranker = Ranker(clvp)
    again = {
        index: ranker.rank(ids_of(row["said"]), row["codes"], pad_to=MOST_CODES + 1).scores.tolist()
        for index, row in enumerate(rows)
        if row.get("scorer") != step
    }
    return [row | {"scores": again[i], "scorer": step} if i in again else row for i, row in enumerate(rows)]


def summary(rows: list[dict]) -> dict:
    """Return the mean candidate's word errors, in all and by voice, and the gain of ranking by number of candidates.

    A sentence's candidates are cut into groups of that number by index; its pick is the mean over its groups, since one
    group says little. `mean_error` and `picked_error` are standard errors over sentences.
    """
    errors, scores = (np.array([row[name] for row in rows]) for name in ("errors", "scores"))
    found = {
        "sentences": len(rows),
        "mean": round(float(errors.mean()), 4),
        "mean_error": standard_error(errors.mean(1)),
    }
    for name in voices.NAMES:
        mine = [row["voice"] == name for row in rows]
        if any(mine):
            found[name] = round(float(errors[mine].mean()), 4)
    for count in GROUPS:
        if count > errors.shape[1]:
            break
        whole = errors.shape[1] // count * count
        groups, ranked = (values[:, :whole].reshape(len(rows), -1, count) for values in (errors, scores))
        best = ranked.argmax(2, keepdims=True)
        picked, mean = np.take_along_axis(groups, best, 2).mean((1, 2)), groups.mean((1, 2))
        found[f"best_of_{count}"] = {
            "picked": round(float(picked.mean()), 4),
            "picked_error": standard_error(picked),
            "mean": round(float(mean.mean()), 4),
            "least": round(float(groups.min(2).mean()), 4),
            "p": wilcoxon(mean - picked),
        }
    return found


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of some values; 0 for a single value."""
    return round(float(values.std(ddof=1) / math.sqrt(len(values))), 4) if len(values) > 1 else 0.0


def wilcoxon(differences: np.ndarray) -> float:
    """Return the probability of such differences by chance, by Wilcoxon's one-sided test of signed ranks.

    It uses the normal approximation; equal differences share their ranks, and zeros are left out.
    """
    differences = differences[np.abs(differences) > 1e-12]
    if not len(differences):
        return 1.0
    _, places, counts = np.unique(np.abs(differences).round(12), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    n = len(differences)
    spread = math.sqrt((n * (n + 1) * (2 * n + 1) - (counts**3 - counts).sum() / 2) / 24)
    return 0.5 * math.erfc((ranks[differences > 0].sum() - n * (n + 1) / 4) / spread / math.sqrt(2))


def round_trip(folder: Path, sentences: int = 40) -> dict:
    """Measure word errors of synthesised speech, through log-mel, and through the codec (closed language model).

    The sentences are `texts.HELD_OUT`, so this can be run at any time.
    """
    codec = data.load_codec(folder, make_codec())
    clips, invert = data.make_clips(folder), GriffinLim(voices.extractor())
    found = {}
    for index, name in enumerate(voices.NAMES):
        errors = {"synthesised": [], "log_mel": [], "codec": []}
        voice = voice_of(clips[index, 0])[None]
        for number, said in enumerate(texts.HELD_OUT[:sentences]):
            STOP.check()
            samples = voices.voice(name)(said, 5_000_000 + number)
            mel = voices.features(samples)
            with torch.no_grad():
                again = codec.log_mel_of(codec.levels_of(codec.codes_of(mel[None])), voice)[0]
            for way, sound in zip(errors, (samples, invert(mel).numpy(), invert(again).numpy()), strict=True):
                errors[way].append(judge.word_errors(said, judge.hear(sound)))
        found[name] = {way: round(float(np.mean(of_way)), 4) for way, of_way in errors.items()}
    return found
