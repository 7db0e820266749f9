"""The engine itself over a null device, whose steps cost nothing, and four requests to it."""

from types import SimpleNamespace

import numpy as np
import torch

from clvp_fast.engine.decode_loop import DecodeLoop, Job
from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.requests import CandidateRequest
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.scoring import Ranking
from clvp_fast.engine.turns import Turns
from clvp_fast.engine.work import Work
from tests.engine.null_engine import NullDevice


class NullRunner:
    """A runner over a `NullDevice`: tokens are numbers that seed, candidate and step make; pages of two tokens."""

    def __init__(self, num_pages=9, page_size=2, max_batch=3, max_new_tokens=9):
        self.device, self.max_batch, self.max_new_tokens = torch.device("cpu"), max_batch, max_new_tokens
        self.pages = SimpleNamespace(data=torch.empty(1, 1, num_pages, page_size))
        self.reset()

    @property
    def decoding(self):
        """The seeds of the requests that hold slots."""
        return {self.params[state[0]].seed for state in self.null.slots.values()}

    def warm_up(self, progress=None):
        pass

    def require_kernel(self):
        pass

    def outdated(self):
        return None

    def reset(self):
        self.null, self.params = NullDevice(self.pages.data.shape[3], {}), {}

    def apply(self, step, prompts, params):
        self.params |= params
        for key, of_request in params.items():
            for i in range(of_request.num_candidates):
                self.null.length_of[key, i] = 1 + (of_request.seed + 2 * i) % of_request.max_new_tokens
        self.null.apply(step)

    def decode(self, num_slots):
        tokens, ended = np.full(num_slots, -1), np.ones(num_slots, dtype=bool)
        alive = [slot for slot, state in self.null.slots.items() if not state[5]]
        done = self.null.decode()
        for slot in alive:
            key, candidate, _, _, stored, _ = self.null.slots[slot]
            tokens[slot], ended[slot] = 1000 * self.params[key].seed + 100 * candidate + stored, slot in done
        return tokens, ended

    def tokens(self, handle):
        return handle[0]

    def finished(self, handle):
        return handle[1]


class NullScorer:
    def score(self, request, text_ids, codes, max_codes):
        return Ranking(torch.tensor([float(len(row)) for row in codes]))


class NullDoor:
    def admit(self, request, sampling, place):
        return None, Job(torch.zeros(len(request.input_ids), 1, device="meta"), request.sampling)


def null_engine(lag=0, max_batch=3, num_pages=9):
    """Make a `CandidateEngine` with a null device below it, and neither model nor texts above."""
    engine = object.__new__(CandidateEngine)
    engine._turns, engine._door = Turns(), NullDoor()
    engine._work = Work(
        NullScorer(),
        lambda max_batch: SimpleNamespace(max_batch=max_batch),
        lambda memory: NullRunner(num_pages, max_batch=memory.max_batch),
        max_batch,
    )
    engine._work.loop = DecodeLoop(engine._work.loop.runner, lag=lag)
    return engine


def null_request(seed=0, num_candidates=1, max_new_tokens=9, length=1, **options):
    params = SamplingParams(num_candidates, max_new_tokens=max_new_tokens, seed=seed, stop_token=9999)
    return CandidateRequest(input_ids=[1] * length, conditioning=0, sampling=params, **options)


def asked():
    """Four requests that do not fit in the slots at once, and whose candidates are preempted."""
    counts = ((2, 7), (3, 9), (1, 2), (2, 5))
    return [null_request(i, n, m, 1 + i) for i, (n, m) in enumerate(counts)]


def codes(results):
    """Return the codes of results without an error, by the seeds of their requests."""
    return {
        result.request.sampling.seed: [row[:n].tolist() for row, n in zip(result.codes, result.lengths, strict=True)]
        for result in results
        if result.error is None
    }
