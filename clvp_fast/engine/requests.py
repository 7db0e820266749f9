"""Requests to the engine, and their results. Arrays of results are numpy's; nothing here needs torch."""

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

    A request equals only itself, so it can be a key. The content of arrays is checked when the engine takes the
    request: a bad clip fails its own request and no other.

    Args:
        text: the text, which is cleaned and tokenized; or `input_ids`: token ids `[length]`.
        audio: mono samples `[num_samples]` with `sampling_rate`, in Hz; or the path of a recording; or a dict of
            "array" and "sampling_rate", as datasets gives it; or a list of such clips of one voice, which are averaged
            as in Tortoise. Instead of `audio`: `input_features`, the clip's log-mel `[1, channels, frames]`; or
            `conditioning`: a [`Voice`], the path of a saved one, a bare latent `[hidden_size]`, Tortoise's pair of
            latents, or the path of either as `.pth`.
        crop_seed: seed of the random 6 s that are used of a longer clip, as in Tortoise; None: its first 6 s.
        sampling: parameters of this request; None: those given to `generate`.
        timeout: seconds from submission after which the request fails; None: no limit.
        id: anything that the caller likes; the engine does not use it.

    Raises:
        ValueError: no text or two, no voice or two, or an impossible value.
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
    """Raise `ValueError` for an impossible sampling rate."""
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
    """All candidates of a request, in the order of their indices; or the error because of which there are none.

    Args:
        request: the object that was submitted.
        codes: `[num_candidates, longest]` int64, speech tokens without the start token, padded with the stop token.
        lengths: `[num_candidates]` int64, the number of tokens before the stop token.
        stopped: `[num_candidates]` bool, whether the candidate drew the stop token within `max_new_tokens`.
        scores: `[num_candidates]` float32, one for each row of `codes`; higher is better.
        text_embeds: `[projection_dim]` float32; speech_embeds: `[num_candidates, projection_dim]` float32; normalised.
            None if the scorer makes no embeddings.
        kept: `[keep]` int64, indices of the best candidates, best first.
        latents: by the index of each kept candidate, `[1, latents, hidden_size]` float32 for Tortoise's diffusion: a
            state for each code and for the eight codes of silence after them; None if the engine makes none.
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
        """Return why no candidate can be used, in one sentence (the error, or scores that are not finite), or None.

        A score of -inf is allowed for a candidate without tokens, which cannot be scored alone.
        """
        if self.error is not None:
            return sentence(self.error)
        if not np.isfinite(self.scores[(self.lengths > 0) | (self.scores != -math.inf)]).all():
            return f"the scores are not finite in {dtype}; try float32"
        return None

    def best(self, k: int = 1) -> list[tuple[int, np.ndarray, float]]:
        """Return the `k` best candidates, best first: index, codes `[length]` without stop and padding, and score.

        Raises `ValueError` if `k` is less than 1 or more than were kept, `RuntimeError` if the request failed.
        """
        if self.error is not None:
            raise RuntimeError(f"the request failed and has no candidates: {self.error}") from self.error
        if not 1 <= k <= len(self.kept):
            raise ValueError(f"best() gives 1 to {len(self.kept)} candidates, as many as were kept, not {k}")
        kept = [int(i) for i in self.kept[:k]]
        return [(i, self.codes[i, : self.lengths[i]], float(self.scores[i])) for i in kept]
