"""A request decoded in many random companies has the bits that it has alone: its tokens, and the states behind them."""

import random as python_random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from clvp_fast import ops
from clvp_fast.engine.decode_loop import DecodeLoop, Job
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.sampling_params import SamplingParams
from tests.engine.test_decoder import prompts, tiny
from tests.kit import isa
from tests.models.clvp.builders import STOP

PAGE_SIZE, LONGEST, REQUESTS = 16, 40, 10
INT8_BOTH = dict(weight_dtype=torch.int8, activation_dtype=torch.int8)
# The torch path of attention reads lengths, and adds up by them.
needs_own_attention = isa.needs("paged_attention_decode")


class Heard(defaultdict):
    """Keep the state of each token that is told, by candidate."""

    def __call__(self, candidate, token, state):
        self[candidate].append(state)

    def states(self, candidate):
        return torch.stack(self[candidate])


class Setting:
    """A model, requests to it and the runner's options; `alone` and `mixed` decode the requests by their numbers."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", **options):
        model = tiny()
        random = python_random.Random(str(dtype))
        lengths = [random.randint(1, 50) for _ in range(REQUESTS)]
        self.prompts = [prompt.to(device, dtype) for prompt in prompts(model, lengths)]
        with torch.no_grad():
            model.speech_decoder_model.lm_head.bias[STOP] = 1.5
        self.model = model.to(device, dtype).speech_decoder_model
        self.sampling = [self._parameters(random, seed) for seed in range(REQUESTS)]
        self.options = options
        self._alone = {}

    @staticmethod
    def _parameters(random, seed):
        """Draw parameters: each processor is on in about half of the requests; some are greedy."""

        def sometimes(off, low, high):
            return random.choice([off, random.uniform(low, high)])

        chosen = SamplingParams(
            num_candidates=random.randint(1, 6),
            temperature=sometimes(1.0, 0.5, 2.0),
            top_k=random.choice([0, random.randint(2, 50)]),
            top_p=sometimes(1.0, 0.5, 0.99),
            typical_p=sometimes(1.0, 0.5, 0.99),
            min_p=sometimes(0.0, 0.001, 0.1),
            repetition_penalty=sometimes(1.0, 0.8, 3.0),
            typical_mass=0.9 if seed % 4 == 1 else 1.0,
            max_new_tokens=random.randint(1, LONGEST),
            seed=seed * 2**60 + 1,
        )
        return replace(chosen, do_sample=False, num_candidates=1) if random.random() < 0.2 else chosen

    def loop(self, num_pages, max_batch, lag=0):
        settings = dict(num_pages=num_pages, max_batch=max_batch) | self.options
        runner = Runner(self.model, page_size=PAGE_SIZE, max_new_tokens=LONGEST, states=True, **settings)
        runner.pages.data.view(torch.uint8).fill_(0x7F)  # NaN in every dtype
        runner.warm_up()
        return DecodeLoop(runner, lag=lag)

    def job(self, number):
        return Job(self.prompts[number], self.sampling[number], Heard(list), states=True)

    def pages_for(self, number, candidates=1):
        own = -(-self.sampling[number].max_new_tokens // PAGE_SIZE)
        return -(-len(self.prompts[number]) // PAGE_SIZE) + candidates * own

    def alone(self, number):
        if number not in self._alone:
            candidates = self.sampling[number].num_candidates
            loop = self.loop(self.pages_for(number, candidates), max_batch=candidates)
            loop.add(self.job(number))
            (self._alone[number],) = finish(loop)
        return self._alone[number]

    def mixed(self, seed):
        """Decode a random company, and return pairs of a request's number and its finished job."""
        random = python_random.Random(seed)
        chosen = [random.randrange(REQUESTS) for _ in range(random.randint(2, 8))]
        least = max(self.pages_for(number) for number in chosen)
        loop = self.loop(
            num_pages=least + random.choice([0, 2, 6, 200]), max_batch=random.randint(1, 40), lag=random.randint(0, 1)
        )
        arrivals = sorted((random.choice([0, random.randint(0, 60)]), order) for order in range(len(chosen)))
        jobs, numbers, step = [], {}, 0  # numbers: of each job that was added
        while arrivals or not loop.idle:
            while arrivals and (arrivals[0][0] <= step or loop.idle):
                number = chosen[arrivals.pop(0)[1]]
                loop.add(job := self.job(number))
                numbers[job] = number
            if random.random() < 0.02:
                loop.cancel(random.choice([*numbers]))
            jobs += [(numbers[job], job) for job in loop.step()]
            step += 1
        finish(loop)
        return jobs


def finish(loop):
    """Step until nothing is left, not even pages; the jobs that finished meanwhile."""
    jobs = []
    while not loop.idle:
        jobs += loop.step()
    assert loop.step() == [] and loop.scheduler.schedule() is None and loop.scheduler.pool.used_pages == 0
    return jobs


def same_bits(found, expected):
    return all(
        np.array_equal(codes, other)
        and torch.equal(found.on_token.states(candidate), expected.on_token.states(candidate))
        for candidate, (codes, other) in enumerate(zip(found.codes, expected.codes, strict=True))
    )


@needs_own_attention
@pytest.mark.parametrize("mixes", [10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.bfloat16, dict(deterministic=True, max_batch=20)),
        (torch.float32, dict(weight_dtype=torch.int8)),
        (torch.bfloat16, dict(weight_dtype=torch.int8, deterministic=True, max_batch=20)),
        pytest.param(torch.float32, INT8_BOTH, marks=isa.needs("linear", torch.int8)),
        pytest.param(torch.bfloat16, INT8_BOTH, marks=isa.needs("linear", torch.int8)),
    ],
    ids=[
        *("float32", "bfloat16, deterministic", "int8 weights", "bfloat16, int8 weights, deterministic"),
        *("int8 weights and activations", "bfloat16, int8 weights and activations"),
    ],
)
def test_every_company(dtype, options, mixes, happened):
    setting = Setting(dtype, **options)
    finished = 0
    for seed in range(mixes):
        for number, job in setting.mixed(seed):
            assert same_bits(job, setting.alone(number)), f"request {number} in mix {seed}"
            finished += 1
    assert finished > 3 * mixes and happened["preempted"] > mixes / 2 and happened["moved"] > mixes / 2
    lengths = [len(codes) for number in range(REQUESTS) for codes in setting.alone(number).codes]
    assert len(set(lengths)) > 8, "candidates stop here and there"


def test_mixes_over_float8_pages(happened):
    """Use the reference, which treats each row alone: on a CPU no kernel reads float8 pages."""
    setting = Setting(torch.float32, deterministic=True, max_batch=20, page_dtype=torch.float8_e4m3fn)
    setting.sampling = [
        replace(sampling, max_new_tokens=min(sampling.max_new_tokens, 18)) for sampling in setting.sampling
    ]
    with ops.backend("reference"):
        finished = [same_bits(job, setting.alone(number)) for seed in range(2) for number, job in setting.mixed(seed)]
    assert len(finished) > 5 and all(finished) and happened["preempted"] > 0
