"""The decoder's own candidates with their word errors by a recogniser, for the training of the scorer."""

from pathlib import Path

import numpy as np
import torch

from clvp_fast import CandidateEngine, CandidateRequest, ClvpFeatureExtractor, ClvpProcessor, SamplingParams
from clvp_fast.vocoder import CodecVocoder
from examples.train import data, judge, texts
from examples.train.model import MOST_CODES, assemble, tokenizer
from examples.train.state import STOP, note, save_arrays, step_of
from examples.train.train_codec import make_codec

# The number of sentences in a file, and of candidates for each.
SENTENCES, EACH = 20, 8


class Speaker:
    """Candidates of sentences and their sound, by the package's engine and vocoder, in each of the two voices."""

    def __init__(self, folder: Path, model=None, scorer: bool = False):
        extractor = ClvpFeatureExtractor()
        self.clips = data.make_clips(folder)
        self.vocoder = CodecVocoder(data.load_codec(folder, make_codec()), extractor)
        self.model = assemble(folder, scorer) if model is None else model
        self.engine = CandidateEngine(self.model, ClvpProcessor(extractor, tokenizer()))

    def candidates(self, said: list[str], sampling: SamplingParams, first: int = 0):
        """Yield the engine's results, sentence by sentence; the voices take turns from sentence number `first` on."""
        requests = [
            CandidateRequest(text=text, input_features=self.clip(first + index)[None], id=index)
            for index, text in enumerate(said)
        ]
        results = sorted(self.engine.generate(requests, sampling), key=lambda result: result.request.id)
        for result in results:
            if result.error is not None:
                raise result.error
        return results

    def clip(self, number: int) -> torch.Tensor:
        """Return the voice's clip of sentence `number`: `[80, frames]`."""
        return self.clips[number % 2, number % data.CLIPS]

    def sound(self, codes: np.ndarray, number: int) -> np.ndarray:
        """Return samples of a candidate of sentence `number`; a quarter of a second of silence for no codes."""
        if len(codes) < 2:
            return np.zeros(5512, dtype=np.float32)
        return self.vocoder.speak([codes], self.clip(number))[0]


def sampling(count: int, seed: int, temperature: float = 0.8) -> SamplingParams:
    """Return Tortoise's sampling settings, without the repetition penalty, because a codec's speech repeats codes."""
    return SamplingParams(
        num_candidates=count, temperature=temperature, repetition_penalty=1.0, max_new_tokens=MOST_CODES, seed=seed
    )


def make_candidates(folder: Path, count: int, least_steps: int) -> None:
    """Make files of candidates 0 to `count` for fresh sentences, each by the decoder of that moment.

    Waits for a decoder of `least_steps` steps.
    """
    made_by = None
    for number in range(count):
        path = folder / "candidates" / f"{number:04d}.npz"
        if path.is_file():
            continue
        while step_of(folder / "decoder.pt") < least_steps:
            STOP.wait(5)
        if made_by != (changed := (folder / "decoder.pt").stat().st_mtime):
            made_by, speaker = changed, Speaker(folder)
        errors = candidates_file(path, speaker, number)
        note(folder, stage="candidates", file=number, word_errors=round(errors, 3))


def candidates_file(path: Path, speaker: Speaker, number: int) -> float:
    """Write one file: codes, ends, sentences and word errors of `EACH` candidates a sentence; return their mean."""
    lines = texts.Writer(3_000_000 + number).sentences(texts.UNSEEN)
    said = [next(lines) for _ in range(SENTENCES)]
    # Candidates at higher temperatures have more errors, so that the scorer sees candidates of all kinds.
    results = speaker.candidates(said, sampling(EACH, number, (0.7, 0.9, 1.1)[number % 3]))
    codes, errors = [], []
    for index, result in enumerate(results):
        for row, length in zip(result.codes, result.lengths, strict=True):
            STOP.check()
            codes.append(row[:length].astype(np.int16))
            errors.append(judge.word_errors(said[index], judge.hear(speaker.sound(row[:length], index))))
    ends = np.cumsum([len(row) for row in codes])
    save_arrays(path, codes=np.concatenate(codes), ends=ends, said=np.array(said), errors=np.array(errors))
    return float(np.mean(errors))


def read_candidates(path: Path) -> list[tuple[str, list[torch.Tensor], torch.Tensor]]:
    """Yield triples of a sentence, its candidates' codes `[length]` int64, and their word errors `[candidates]`."""
    with np.load(path) as kept:
        rows, said = np.split(kept["codes"].astype(np.int64), kept["ends"][:-1]), kept["said"].tolist()
        errors = torch.from_numpy(kept["errors"]).float().view(len(said), -1)
    count = errors.shape[1]
    grouped = [[torch.from_numpy(row) for row in rows[i * count : (i + 1) * count]] for i in range(len(said))]
    return list(zip(said, grouped, errors, strict=True))
