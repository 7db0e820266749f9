"""The host's part of a decode step: scheduling, its changes, the step's launches, and what is read of it.

Once over a null model, whose steps cost nothing, and once over the random checkpoint, whose layers are so small that
on a CPU too most of a step is the host's. A run is a request from its prefill to its last tokens, in which no candidate
stops. Beside the time stands a count, of the calls of Python functions in a step from the middle of a run.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.harness import Provider, Task, task
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.engine.decode_loop import DecodeLoop, Job
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.sampling_params import SamplingParams

PAGE_SIZE, PROMPT = 16, 70
#: Candidates, and tokens of each.
CANDIDATES, STEPS = (16, 256), 200
SMOKE = (3, 20)


class NullRunner:
    """A runner without a model: every candidate draws a 0 until it has `max_new_tokens` of them."""

    def __init__(self, max_batch: int, max_new_tokens: int):
        self.device, self.max_batch, self.max_new_tokens = torch.device("cpu"), max_batch, max_new_tokens
        num_pages = max_batch * -(-max_new_tokens // PAGE_SIZE) + -(-PROMPT // PAGE_SIZE)
        self.pages = SimpleNamespace(data=torch.empty(1, 2, num_pages, PAGE_SIZE, device="meta"))
        self._drawn = np.zeros(max_batch, dtype=np.int64)
        self._tokens = np.zeros(max_batch, dtype=np.int64)

    def apply(self, step, prompts, params) -> None:
        for admission in step.admitted:
            self._drawn[admission.slot] = 0

    def decode(self, num_slots: int) -> np.ndarray:
        self._drawn[:num_slots] += 1
        return self._drawn[:num_slots] == self.max_new_tokens

    def tokens(self, handle: np.ndarray) -> np.ndarray:
        return self._tokens[: len(handle)]

    def finished(self, handle: np.ndarray) -> np.ndarray:
        return handle


def random_runner(candidates: int, steps: int, device: str = "cpu") -> Runner:
    """Make a runner of the random checkpoint's decoder, whose candidates never stop by themselves."""
    model = load_checkpoint("random", device=device).model.speech_decoder_model
    with torch.no_grad():
        model.lm_head.bias[model.config.eos_token_id] = -1e4
    num_pages = candidates * -(-steps // PAGE_SIZE) + -(-PROMPT // PAGE_SIZE)
    runner = Runner(model, num_pages, PAGE_SIZE, candidates, steps, max_prefix_len=PROMPT)
    runner.warm_up()
    return runner


class Requests:
    """Requests of `candidates` each, one after another, that a loop over a runner decodes."""

    def __init__(self, runner: Runner | NullRunner, candidates: int, steps: int):
        self.loop = DecodeLoop(runner)
        width = runner.decoder.hidden_size if isinstance(runner, Runner) else 1
        prompt = torch.randn(PROMPT, width, generator=torch.Generator().manual_seed(0)).to(runner.device)
        self.job = Job(prompt, SamplingParams(candidates, max_new_tokens=steps, seed=1))

    def begin(self) -> None:
        self.job.begin()
        self.loop.add(self.job)

    def run(self) -> list[np.ndarray]:
        """Run one request, and return the tokens of its candidates."""
        self.begin()
        while not self.loop.finished:
            self.loop.advance()
        self.loop.finished.clear()
        return self.job.codes


def python_calls(call: Callable[[], object]) -> int:
    """Count the Python functions that a call enters."""
    entered, before = 0, sys.getprofile()

    def count(frame, event, argument) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


def calls_of_a_step(requests: Requests) -> int:
    """Count those of a step that admits no candidate, after others of its kind."""
    requests.begin()
    for _ in range(3):
        requests.loop.advance()
    counted = python_calls(requests.loop.advance)
    while not requests.loop.finished:
        requests.loop.advance()
    requests.loop.finished.clear()
    return counted


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    steps = SMOKE[1] if smoke else STEPS
    for candidates in SMOKE[:1] if smoke else CANDIDATES:
        for model, make in (("null", _null), ("random", partial(_random, device))):
            # They are two shapes, and no rivals.
            shape = {"model": model, "candidates": candidates, "steps": steps, "prompt": PROMPT}
            yield task("host_step", shape, {"clvp_fast": partial(make, candidates, steps)}, 1 if smoke else 5)


def _null(candidates: int, steps: int) -> Provider:
    requests = Requests(NullRunner(candidates, steps), candidates, steps)
    wrong = sum(len(codes) != steps for codes in requests.run())
    return Provider("clvp_fast", requests.run, wrong, 0, steps, {"python_calls": calls_of_a_step(requests)})


def _random(device: str, candidates: int, steps: int) -> Provider:
    """Make the provider; its error is the number of tokens that the first candidate draws otherwise than alone."""
    requests = Requests(random_runner(candidates, steps, device), candidates, steps)
    alone = Requests(random_runner(1, steps, device), 1, steps)
    wrong = int((requests.run()[0] != alone.run()[0]).sum())
    return Provider("clvp_fast", requests.run, wrong, 0, steps, {"python_calls": calls_of_a_step(requests)})
