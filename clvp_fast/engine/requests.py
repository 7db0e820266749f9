"""Requests to the engine, and their results. Arrays on the way out are numpy's; nothing here needs torch."""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np

from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.io.errors import sentence, shown


@dataclass(frozen=True, eq=False)
class CandidateRequest:
    """A text to speak and a voice to speak it in.

    Equal to itself alone, so that it can be a key. The content of arrays is looked at when the request's turn comes: a
    bad clip fails its own request and no other.

    Args:
        text: to be cleaned and tokenized; or `input_ids`: token ids `[length]`.
        audio: mono samples `[num_samples]` with `sampling_rate`, in Hz; or the path of a recording; or a dict of
            "array" and "sampling_rate", as datasets gives it; or a list of such clips of one voice, which are averaged
            as Tortoise does. Or `input_features`: log-mel of the clip `[1, channels, frames]`; or
            `conditioning`: a voice that the engine has saved, its path, or a bare latent `[hidden_size]`, Tortoise's
            pair of latents, or the path of either as `.pth`.
        crop_seed: of the 6 s that are used of longer clips, as Tortoise takes them at random; None: the first.
        sampling: None: the parameters given to `generate`.
        timeout: seconds from submission, after which the request fails; None: it waits.
        id: anything of the caller's own; the engine does not look at it.

    Raises:
        ValueError: not exactly one text or not exactly one voice, or a value that cannot be.
    """

    text: str | None = None
    input_ids: Any = field(default=None, repr=False)
    audio: Any = field(default=None, repr=False)
    sampling_rate: int | None = None
    input_features: Any = field(default=None, repr=False)
    conditioning: Any = field(default=None, repr=False)
    crop_seed: int | None = None
    sampling: SamplingParams | None = None
    timeout: float | None = None
    id: Any = None

    def __post_init__(self):
        self._exactly_one("text", "input_ids")
        self._exactly_one("audio", "input_features", "conditioning")
        if self.text is not None and not isinstance(self.text, str):
            raise ValueError(f"text must be one string, not {type(self.text).__name__}: give a request for each text")
        if self.audio is None and self.sampling_rate is not None:
            raise ValueError("sampling_rate is that of audio, which is not given: leave it out")
        if self.sampling_rate is not None:
            check_rate(self.sampling_rate)
        if self.crop_seed is not None:
            if isinstance(self.crop_seed, bool) or not isinstance(self.crop_seed, Integral):
                raise ValueError(f"crop_seed must be a whole number, or None, not {shown(self.crop_seed)}")
            if self.audio is None:
                raise ValueError("crop_seed is that of audio, which is not given: leave it out")
        if self.timeout is not None:
            object.__setattr__(self, "timeout", _seconds(self.timeout))
        if self.sampling is not None and not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"sampling must be SamplingParams, not {type(self.sampling).__name__}")

    def _exactly_one(self, *names: str) -> None:
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"a request needs exactly one of {', '.join(names)}, and {found} came")


def check_rate(rate) -> None:
    """Raise `ValueError` for a sampling rate that cannot be."""
    if isinstance(rate, bool) or not isinstance(rate, Integral) or rate <= 0:
        raise ValueError(f"sampling_rate must be a positive whole number of Hz, not {shown(rate)}")


def _seconds(timeout) -> float:
    """Return a timeout as a float; raise `ValueError` for anything else."""
    seconds = math.nan
    if isinstance(timeout, Real) and not isinstance(timeout, bool):
        with suppress(OverflowError):  # an integer beyond the range of a float
            seconds = float(timeout)
    if not 0 < seconds < math.inf:
        raise ValueError(f"timeout must be a number of seconds above 0, or None to wait, not {shown(timeout)}")
    return seconds


# The fields of a failed request's result. Their type has no None, because callers look at `error` first.
_NOT_MADE: Any = None


@dataclass(eq=False)
class CandidateResult:
    """All candidates of a request, in the order of their indices; or the error that kept them from being made.

    Args:
        request: the very object that was given.
        codes: `[num_candidates, longest]` int64, speech tokens without the start, padded with the stop token.
        lengths: `[num_candidates]` int64, tokens before the stop.
        stopped: `[num_candidates]` bool, whether a stop came before `max_new_tokens`.
        scores: `[num_candidates]` float32, of the same row of `codes`; higher is better.
        text_embeds: `[projection_dim]` float32; speech_embeds: `[num_candidates, projection_dim]` float32; normalised.
            None of a scorer that embeds nothing.
        kept: `[keep]` int64, indices of the best candidates, the best first.
        latents: by the index of each kept candidate `[1, latents, hidden_size]` float32, what Tortoise's diffusion
            takes: a state for each code and for eight codes of silence behind them; None if not asked for.
        timings: seconds of `prepare`, `queue`, `decode` and `rank`.
        error: None, or why the request failed; all fields but `request` and `timings` are then None.
    """

    request: CandidateRequest
    codes: np.ndarray = _NOT_MADE
    lengths: np.ndarray = _NOT_MADE
    stopped: np.ndarray = _NOT_MADE
    scores: np.ndarray = _NOT_MADE
    text_embeds: np.ndarray | None = None
    speech_embeds: np.ndarray | None = None
    kept: np.ndarray = _NOT_MADE
    latents: dict[int, Any] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None

    def failure(self, dtype: Any = "its dtype") -> str | None:
        """Return in one sentence why no candidate can be used: the error, or scores that are not finite; else None.

        A score of -inf is allowed for a candidate without tokens, which cannot be judged by itself.
        """
        if self.error is not None:
            return sentence(self.error)
        if not np.isfinite(self.scores[(self.lengths > 0) | (self.scores != -math.inf)]).all():
            return f"the scores are not finite in {dtype}; try float32"
        return None

    def best(self, k: int = 1) -> list[tuple[int, np.ndarray, float]]:
        """Return the `k` best candidates, the best first: index, codes `[length]` without stop and padding, and score.

        Raises `ValueError` if `k` is less than 1 or more than were kept, `RuntimeError` if the request failed.
        """
        if self.error is not None:
            raise RuntimeError(f"the request failed and has no candidates: {self.error}") from self.error
        if not 1 <= k <= len(self.kept):
            raise ValueError(f"best() gives 1 to {len(self.kept)} candidates, as many as were kept, not {k}")
        kept = [int(i) for i in self.kept[:k]]
        return [(i, self.codes[i, : self.lengths[i]], float(self.scores[i])) for i in kept]
