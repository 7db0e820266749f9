"""Word errors of the checkpoint `demo` by precision, sampling and scoring, as a recogniser hears them.

Every way speaks the same sentences with the same seeds. pocketsphinx, which saw nothing of the training, hears the
candidates, over a language model of the domain's words alone. Nothing was trained on the sentences, `texts.HELD_OUT`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch

from benchmarks.harness import ROOT, Provider, Task, task
from benchmarks.providers import Absent
from benchmarks.score import ranks
from benchmarks.tiers import require_served
from clvp_fast import CandidateEngine, CandidateRequest, CandidateResult
from clvp_fast.audio import load_audio
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.ops.paged_attention import FLOAT8

SHAPE = {"sentences": 24, "candidates": 16}
SMOKE = {"sentences": 2, "candidates": 3}
VOICE = ROOT / "examples/voice.flac"


@dataclass(frozen=True)
class Way:
    """One way to speak; the first of `WAYS` is what the others are compared with.

    options: of the engine. greedy: draw no candidates, but take the likeliest codes. alone: speak each sentence in a
        call of its own.
    """

    name: str
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)
    greedy: bool = False
    alone: bool = False


WAYS = (
    Way("float32"),
    Way("float32, each sentence alone", alone=True),
    Way("float32, trimmed scores", options={"scoring": "trimmed"}),
    Way("float32, greedy", greedy=True),
    Way("bfloat16", torch.bfloat16),
    Way("float32, int8 weights", options={"weight_dtype": torch.int8}),
    Way("bfloat16, int8 weights", torch.bfloat16, options={"weight_dtype": torch.int8}),
    Way("float32, int8 products", options={"weight_dtype": torch.int8, "activation_dtype": torch.int8}),
    Way("float32, float8 pages", options={"page_dtype": FLOAT8}),
)


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    shape = SMOKE if smoke else SHAPE
    expected = cache(partial(Spoken, WAYS[0], device, shape))
    makers = {f"clvp_fast {way.name}": partial(_made, expected, way, device, shape) for way in WAYS}
    yield task("speech", shape, makers, 1 if smoke else 3)


class Spoken:
    """The candidates of all sentences, as one way speaks them.

    codes: `[sentences][candidates]`, each `[length]`. scores, errors: `[sentences, candidates]`; an error is the share
        of wrong words that a recogniser hears.

    Raises:
        Absent: the recipe's packages are not installed, or there is no such kernel or device.
    """

    def __init__(self, way: Way, device: str, shape: dict):
        try:
            from examples.train import candidates, judge, texts
            from examples.train.state import Refused

            judge.recogniser("closed")
        except (ImportError, Refused) as error:
            raise Absent(str(error)) from error
        require_served(way.dtype, way.options.get("activation_dtype"), device)
        checkpoint = load_checkpoint("demo", device=device, dtype=way.dtype)
        self.way, self.engine = way, CandidateEngine(checkpoint.model, checkpoint.processor, **way.options)
        extractor = checkpoint.feature_extractor
        samples, _ = load_audio(VOICE, extractor.sampling_rate)
        clip = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
        said = texts.HELD_OUT[: shape["sentences"]]
        sampling = candidates.sampling(1 if way.greedy else shape["candidates"], seed=0)
        self.requests = [
            CandidateRequest(
                text=texts.written(text, "."),
                input_features=clip.to(way.dtype),
                sampling=replace(sampling, do_sample=not way.greedy, seed=place),
                id=place,
            )
            for place, text in enumerate(said)
        ]
        results = self.speak()
        self.codes = [
            [row[:length] for row, length in zip(result.codes, result.lengths, strict=True)] for result in results
        ]
        self.scores = torch.from_numpy(np.stack([result.scores for result in results]))
        errors = [
            [judge.errors_of(text, sound, "closed") for sound in checkpoint.vocoder.speak(codes, clip[0])]
            for text, codes in zip(said, self.codes, strict=True)
        ]
        self.errors = np.array(errors)

    def speak(self) -> list[CandidateResult]:
        """Return the results of all sentences, in their order."""
        calls = self.requests if self.way.alone else [self.requests]
        results = [result for call in calls for result in self.engine.generate(call)]
        if failed := [result.error for result in results if result.error is not None]:
            raise failed[0]
        return sorted(results, key=lambda result: result.request.id)

    def scores_of(self, codes: list[list[np.ndarray]]) -> torch.Tensor:
        """Return this way's scores `[sentences, candidates]` of given candidates."""
        tokenizer, longest = self.engine.processor.tokenizer, self.engine.max_new_tokens + 1
        rows = [
            self.engine.scorer.rank(torch.tensor(tokenizer(request.text)["input_ids"]), own, pad_to=longest).scores
            for request, own in zip(self.requests, codes, strict=True)
        ]
        return torch.stack(rows)

    @property
    def picked(self) -> np.ndarray:
        """The errors of each sentence's candidate with the highest score."""
        return np.take_along_axis(self.errors, self.scores.numpy().argmax(1)[:, None], 1)[:, 0]


def _made(expected_of: Callable[[], Spoken], way: Way, device: str, shape: dict) -> Provider:
    expected = expected_of()
    found = expected if way is WAYS[0] else Spoken(way, device, shape)
    more = found.errors.mean(1) - expected.errors.mean(1)
    counted = {
        "word_errors": float(found.errors.mean()),
        "more_word_errors": float(more.mean()),
        "more_word_errors_error": float(more.std(ddof=1) / len(more) ** 0.5),
        "picked_word_errors": float(found.picked.mean()),
    }
    if not way.greedy:
        pairs = [pair for both in zip(found.codes, expected.codes, strict=True) for pair in zip(*both, strict=True)]
        counted["same_codes"] = sum(map(lambda pair: np.array_equal(*pair), pairs)) / len(pairs)
        again = found.scores_of(expected.codes)
        counted |= ranks(again, expected.scores)
    return Provider(f"clvp_fast {way.name}", found.speak, abs(float(more.mean())), 1.0, counted=counted)
