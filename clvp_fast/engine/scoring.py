"""The protocol between an engine and the scorer of its candidates: one method, and its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from clvp_fast.engine.requests import CandidateRequest


@dataclass(frozen=True)
class Ranking:
    """The scores of one text's candidates, in the order of the candidates; on any device.

    Args:
        scores: `[candidates]` floating point; higher is better. CLVP's are scaled cosine similarities in float32, and
            -inf for an empty candidate in mode "trimmed".
        text_embeds: `[dim]` float32, of length 1; this and the next are None if the scorer makes no embeddings.
        speech_embeds: `[candidates, dim]` float32, of length 1; zeros for an empty candidate in mode "trimmed".
    """

    scores: torch.Tensor
    text_embeds: torch.Tensor | None = None
    speech_embeds: torch.Tensor | None = None

    def top(self, k: int) -> torch.Tensor:
        """Return indices `[min(k, candidates)]` int64, best first; ties go to the earlier one. NaN counts as -inf."""
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        return self.scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf).sort(descending=True, stable=True).indices[:k]


class Scorer(Protocol):
    """Scores candidates. [`CandidateEngine`] takes any object that has this method.

    The default is [`Ranker`], with CLVP's encoders. Another scorer may, for example, turn codes into sound and score
    that.
    """

    def score(
        self, request: CandidateRequest, text_ids: torch.Tensor, codes: Sequence[np.ndarray], max_codes: int
    ) -> Ranking:
        """Score all candidates of one request. It is called in inference mode; an error fails that request alone.

        Args:
            request: the object that was given to the engine, with the text as it was written and its `id`.
            text_ids: `[length]` int64 on the CPU, the text as the decoder read it, without start and end tokens.
            codes: the candidates, each `[length]` int64, without start and stop tokens; a length may be 0.
            max_codes: the most codes that a candidate of this request could have.

        Returns:
            A [`Ranking`] with one score for each candidate.
        """
        ...


def check_scorer(scorer) -> None:
    """Raise TypeError for an object that has no method `score`."""
    if not callable(getattr(scorer, "score", None)):
        raise TypeError(
            f"a scorer needs a method score(request, text_ids, codes, max_codes), and {type(scorer).__name__} has none"
        )


def check_ranking(ranking, scorer: Scorer, num_candidates: int) -> Ranking:
    """Return the `ranking` of `scorer`; raise TypeError or ValueError where it does not fit `num_candidates`."""
    name = f"{type(scorer).__name__}.score()"
    if not isinstance(ranking, Ranking):
        raise TypeError(f"{name} must return a clvp_fast.Ranking, not {type(ranking).__name__}")
    scores = ranking.scores
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point() or scores.shape != (num_candidates,):
        found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"{name} must give floating point scores [{num_candidates}], one a candidate, not {found}")
    return ranking
