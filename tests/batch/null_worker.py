"""A job's own worker over an engine without a model: rows are read and checked as ever, and nothing is drawn."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from torch import nn

from clvp_fast import ClvpFeatureExtractor, ClvpTokenizer
from clvp_fast.batch.worker import Worker
from clvp_fast.checkpoint import resolve_checkpoint
from clvp_fast.engine.requests import CandidateResult
from clvp_fast.engine.voices import VoiceCache


class _NullVoices(VoiceCache):
    """Reads recordings, and encodes none."""

    def from_features(self, input_features) -> str:
        return f"{len(input_features)} recordings"


class NullEngine:
    """Gives each request a result at once: candidates of no tokens, or an error of some kind.

    Args:
        strange: exceptions by id, which the result of that row has.
    """

    def __init__(self, max_new_tokens: int, strange: dict[str, Exception] | None = None):
        self.max_new_tokens, self.strange = max_new_tokens, strange or {}
        self.processor = SimpleNamespace(
            tokenizer=ClvpTokenizer.from_pretrained(resolve_checkpoint("random"), text_cleaning="tortoise")
        )
        self.voices = _NullVoices(SimpleNamespace(conditioning_encoder=nn.Module()), ClvpFeatureExtractor())

    def generate(self, requests, keep):
        for request in requests:
            yield self._result(request, keep)

    def _result(self, request, keep) -> CandidateResult:
        row, _ = request.id
        count = request.sampling.num_candidates
        if row.id in self.strange:
            return CandidateResult(request, error=self.strange[row.id])
        if not request.text.strip() or request.sampling.max_new_tokens > self.max_new_tokens or count > 1000:
            return CandidateResult(request, error=OverflowError("what an engine may raise"))
        return CandidateResult(
            request,
            codes=np.zeros((count, 1), dtype=np.int64),
            lengths=np.zeros(count, dtype=np.int64),
            stopped=np.ones(count, dtype=bool),
            scores=np.zeros(count, dtype=np.float32),
            kept=list(range(min(keep, count))),
            timings=dict.fromkeys(("prepare", "queue", "decode", "rank"), 0.0),
        )


def null_worker(settings, strange: dict[str, Exception] | None = None) -> Worker:
    worker = Worker.__new__(Worker)
    worker.settings = replace(settings, device="cpu", max_new_tokens=4, batch_size=8, threads=1)
    worker.engine = NullEngine(4, strange)
    worker.checkpoint_digest = "digest"
    return worker
