"""The protocol between an engine and the scorer of its candidates: one method, and its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from clvp_fast.engine.requests import CandidateRequest


@dataclass(frozen=True)
class Ranking:
    """The scores of one text's candidates, in the order in which the candidates were given; on any device.

    Args:
        scores: `[candidates]` floating point, the higher the better. CLVP's are float32, scaled cosine similarities,
            and -inf for an empty candidate of mode "trimmed".
        text_embeds: `[dim]` float32, of length 1; None of a scorer that embeds nothing, as the next.
        speech_embeds: `[candidates, dim]` float32, of length 1; zeros for an empty candidate as above.
    """

    scores: torch.Tensor
    text_embeds: torch.Tensor | None = None
    speech_embeds: torch.Tensor | None = None

    def top(self, k: int) -> torch.Tensor:
        """Return indices `[min(k, candidates)]` int64, best first, of equal ones the earlier. NaN counts as -inf."""
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        return self.scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf).sort(descending=True, stable=True).indices[:k]


class Scorer(Protocol):
    """A judge of candidates; [`CandidateEngine`] takes any object that has this method.

    The engine's own is [`Ranker`], with CLVP's encoders. Another one may turn codes into sound and listen to that.
    """

    def score(
        self, request: CandidateRequest, text_ids: torch.Tensor, codes: Sequence[np.ndarray], max_codes: int
    ) -> Ranking:
        """Judge all candidates of one request. Called in inference mode; what it raises fails that request alone.

        Args:
            request: the very object that was given to the engine, with the text as it was written and its `id`.
            text_ids: `[length]` int64 on the CPU, the text as the decoder read it, without tokens around it.
            codes: the candidates, each `[length]` int64, without start and stop token; a length may be 0.
            max_codes: the most codes that a candidate of this request could have.

        Returns:
            A [`Ranking`] of as many scores as there are candidates.
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
