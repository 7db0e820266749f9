"""An independent recogniser: pocketsphinx with its own English model, which saw nothing of this recipe.

"open" is its own trigram model of English; "closed" knows only the domain's words, all equally likely.
"""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from examples.train.state import Refused
from examples.train.texts import WORDS
from examples.train.voices import RATE

KINDS = ("open", "closed")


@cache
def recogniser(kind: str):
    """Return the recogniser of a kind."""
    try:
        from pocketsphinx import Decoder, get_model_path
    except ImportError as error:
        raise Refused("the package pocketsphinx is not installed: pip install pocketsphinx") from error
    base = Path(get_model_path("en-us"))
    settings = {"hmm": str(base / "en-us"), "dict": str(base / "cmudict-en-us.dict"), "loglevel": "FATAL"}
    if kind == "open":
        return Decoder(**settings, lm=str(base / "en-us.lm.bin"))
    known = [word for word in WORDS if Decoder(**settings, lm=None).lookup_word(word)]
    with tempfile.TemporaryDirectory(prefix="clvp-fast-judge-") as folder:
        path = Path(folder, "closed.lm")
        path.write_text(flat_model(known), encoding="ascii")
        return Decoder(**settings, lm=str(path))


def flat_model(words: list[str]) -> str:
    """Return a language model in ARPA's format in which each word is equally likely anywhere."""
    share = f"{np.log10(1 / (len(words) + 1)):.4f}"
    rows = [f"{share} </s>", "-99 <s>", *(f"{share} {word}" for word in words)]
    return "\n".join(["\\data\\", f"ngram 1={len(rows)}", "", "\\1-grams:", *rows, "", "\\end\\", ""])


def hear(samples: np.ndarray, kind: str = "closed") -> str:
    """Return the recognised words of samples at 22.05 kHz; "" for none."""
    import soxr

    silence = np.zeros(4000, dtype=np.float32)
    sound = soxr.resample(np.concatenate([silence, samples, silence]), RATE, 16000)
    sound = sound / max(float(np.abs(sound).max()), 1e-5) * 0.5
    # The recogniser fails on digital silence.
    noise = np.random.default_rng(0).integers(-3, 4, len(sound))
    decoder = recogniser(kind)
    decoder.start_utt()
    decoder.process_raw(((sound * 32767).astype(np.int16) + noise.astype(np.int16)).tobytes(), full_utt=True)
    decoder.end_utt()
    heard = decoder.hyp()
    return heard.hypstr if heard else ""


def errors_of(said: str, samples: np.ndarray, kind: str) -> float:
    """Return the word errors of samples."""
    return word_errors(said, hear(samples, kind))


def word_errors(said: str, heard: str) -> float:
    """Return the share of wrong words: insertions, deletions and replacements over the words said; at most 1."""
    wanted, found = said.split(), heard.split()
    row = list(range(len(found) + 1))
    for index, word in enumerate(wanted, start=1):
        before, row[0] = row[0], index
        for place, other in enumerate(found, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return min(1.0, row[-1] / len(wanted))
