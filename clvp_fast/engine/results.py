"""The result of a request whose candidates are all drawn: its ranking, on the way to the host and there."""

import time
from collections.abc import Callable

import numpy as np
import torch

from clvp_fast.engine.calls import Pending
from clvp_fast.engine.decode_loop import Job
from clvp_fast.engine.host_copy import HostCopy
from clvp_fast.engine.memory import trim_heap
from clvp_fast.engine.requests import CandidateResult
from clvp_fast.engine.scoring import Scorer, check_ranking
from clvp_fast.models.clvp.tokens import fill_up

# Maps a prompt `[length, hidden_size]`, codes `[length]` and the length that the codes are filled up to.
Latents = Callable[[torch.Tensor, np.ndarray, int], torch.Tensor]


class ResultUnderWay:
    """The result of a request, whose ranking is queued on the device behind other requests' steps.

    Args:
        pending, job: the request, and its job, which is done.
    """

    def __init__(self, pending: Pending, job: Job):
        self.pending, self._job = pending, job
        self._decoded = time.perf_counter()
        if job.prompt.device.type == "cpu":
            trim_heap()
        drawn, stop = job.all_codes(), job.sampling.stop_token
        assert stop is not None  # `Door` has set it
        stopped = np.array([len(codes) > 0 and codes[-1] == stop for codes in drawn])
        self._spoken = [codes[: len(codes) - ended] for codes, ended in zip(drawn, stopped, strict=True)]
        lengths = np.array([len(codes) for codes in self._spoken])
        codes = fill_up(self._spoken, max(lengths.max(), 1), stop)
        self._result = CandidateResult(pending.request, codes=codes, lengths=lengths, stopped=stopped)
        self._copy: HostCopy  # by `rank`

    def rank(self, scorer: Scorer) -> None:
        """Queue the ranking and its copy. Errors of the scorer are raised."""
        pending, spoken = self.pending, self._spoken
        ranking = scorer.score(pending.request, pending.text_ids, spoken, self._job.sampling.max_new_tokens)
        check_ranking(ranking, scorer, len(spoken))
        best, embeds = ranking.top(min(pending.keep, len(spoken))), (ranking.text_embeds, ranking.speech_embeds)
        self._copy = HostCopy(best, ranking.scores.float(), *(x if x is None else x.float() for x in embeds))

    @property
    def arrived(self) -> bool:
        """Tell whether `finish` need not wait for the device."""
        return self._copy.arrived

    def finish(self, latents: Latents | None) -> CandidateResult:
        """Return the result, once it has arrived; `latents` makes those of the candidates that are kept, if any."""
        result, job = self._result, self._job
        result.kept, result.scores, result.text_embeds, result.speech_embeds = self._copy.wait()
        if latents is not None:
            longest = job.sampling.max_new_tokens
            result.latents = {i: latents(job.prompt, self._spoken[i], longest) for i in result.kept.tolist()}
        assert job.started_at is not None  # the job is done
        result.timings = {
            "prepare": self.pending.prepared - self.pending.submitted,
            "queue": job.started_at - self.pending.prepared,
            "decode": self._decoded - job.started_at,
            "rank": time.perf_counter() - self._decoded,
        }
        return result
