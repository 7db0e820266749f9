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
    """A ranking that is queued on the device, behind the steps of other requests, whose results are being copied.

    Args:
        pending, job: a request, and its job, which is done.
        scorer: ranks the candidates. Its errors are raised.
        latents: makes the latents of those that are kept; None: the result has none.
    """

    def __init__(self, pending: Pending, job: Job, scorer: Scorer, latents: Latents | None):
        self.pending, self._job, self._latents = pending, job, latents
        self._decoded = time.perf_counter()
        if job.prompt.device.type == "cpu":
            trim_heap()
        drawn, stop = job.all_codes(), job.sampling.stop_token
        assert stop is not None  # `Door` has set it
        stopped = np.array([len(codes) > 0 and codes[-1] == stop for codes in drawn])
        spoken = self._spoken = [codes[: len(codes) - ended] for codes, ended in zip(drawn, stopped, strict=True)]
        lengths = np.array([len(codes) for codes in spoken])
        codes = fill_up(spoken, max(lengths.max(), 1), stop)
        self._result = CandidateResult(pending.request, codes=codes, lengths=lengths, stopped=stopped)
        ranking = scorer.score(pending.request, pending.text_ids, spoken, job.sampling.max_new_tokens)
        check_ranking(ranking, scorer, len(spoken))
        numbers = ranking.scores, ranking.text_embeds, ranking.speech_embeds
        self._copy = HostCopy(
            ranking.top(min(pending.keep, len(spoken))), *(None if x is None else x.float() for x in numbers)
        )

    @property
    def arrived(self) -> bool:
        """Tell whether `finish` need not wait for the device."""
        return self._copy.arrived

    def finish(self) -> CandidateResult:
        """Return the result, once it has arrived."""
        result, job = self._result, self._job
        result.kept, result.scores, result.text_embeds, result.speech_embeds = self._copy.wait()
        if self._latents is not None:
            longest = job.sampling.max_new_tokens
            result.latents = {i: self._latents(job.prompt, self._spoken[i], longest) for i in result.kept.tolist()}
        assert job.started_at is not None  # the job is done
        result.timings = {
            "prepare": self.pending.prepared - self.pending.submitted,
            "queue": job.started_at - self.pending.prepared,
            "decode": self._decoded - job.started_at,
            "rank": time.perf_counter() - self._decoded,
        }
        return result
