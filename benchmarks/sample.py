"""Drawing the next token of many candidates, against transformers' processors in a row."""

from collections.abc import Iterator

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks.harness import Task
from benchmarks.kernels import Case, ours, tasks as tasks_of
from clvp_fast.ops import sample
from clvp_fast.ops.sampling import reference as sample_reference

VOCABULARY, TOKENS_SO_FAR = 8194, 200
CANDIDATES = {"cpu": (16,), "cuda": (256, 16), "smoke": (3,)}
# Tortoise's own settings; top_k it has from transformers' defaults.
TEMPERATURE, TOP_P, PENALTY = 0.8, 0.8, 2.0


def make_inputs(seed, candidates, device):
    generator = torch.Generator(device).manual_seed(seed)
    logits = 3 * torch.randn(candidates, VOCABULARY, generator=generator, device=device)
    drawn = torch.randint(VOCABULARY, (candidates, TOKENS_SO_FAR), generator=generator, device=device)
    member = torch.zeros(candidates, -(-VOCABULARY // 32) * 32, dtype=torch.int64, device=device).scatter_(1, drawn, 1)
    words = (member.view(candidates, -1, 32) << torch.arange(32, device=device)).sum(-1)
    seen = torch.where(words >= 2**31, words - 2**32, words).int()
    numbers = torch.arange(candidates, device=device)
    settings = [torch.full((candidates,), x, dtype=torch.float64, device=device) for x in (TEMPERATURE, TOP_P, PENALTY)]
    state = torch.zeros_like(numbers), torch.zeros_like(numbers, dtype=torch.bool)
    return logits, seen, *state, numbers, numbers * 0 + seed, numbers * 0 + TOKENS_SO_FAR, *settings, drawn


def call(logits, seen, lengths, done, candidate, seed, step, temperature, top_p, penalty, drawn):
    return sample(
        logits,
        seen,
        lengths,
        done,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=penalty,
        seed=seed,
        candidate=candidate,
        step=step,
        stop_token=-1,
        pad_token=0,
    )


def reference(logits, seen, lengths, done, candidate, seed, step, temperature, top_p, penalty, drawn):
    """Return the same draw, and the allowed tokens: `[candidates, 1 + vocabulary]`."""
    numbers = (temperature, None, top_p, None, None, penalty, seed, candidate, step)
    tokens = sample_reference(logits, seen, lengths, done, *numbers, -1, 0, True, None)
    return torch.cat((tokens[:, None].double(), processors(logits, drawn).isfinite().double()), 1)


def chain() -> LogitsProcessorList:
    return LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(PENALTY), TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)]
    )


def processors(logits, drawn):
    return chain()(drawn, logits)


def with_processors(logits, seen, lengths, done, candidate, seed, step, temperature, top_p, penalty, drawn):
    """Run transformers' loop: it draws other random numbers, so that only the allowed tokens are compared."""
    return processors(logits, drawn).softmax(-1).multinomial(1)[:, 0]


def forbidden(tokens, expected) -> float:
    """Return the share of candidates whose token may not be drawn at all."""
    return float(1 - expected[:, 1:].gather(1, tokens[:, None]).mean())


def cases(device: str, smoke: bool = False):
    for candidates in CANDIDATES["smoke" if smoke else device]:
        providers, absent = ours(call, "sample", device)
        yield Case(
            shape=dict(candidates=candidates, vocabulary=VOCABULARY, temperature=TEMPERATURE, top_p=TOP_P),
            dtype=torch.float32,
            inputs=lambda seed, candidates=candidates: make_inputs(seed, candidates, device),
            reference=reference,
            providers=providers | {"transformers' processors": with_processors},
            bytes=candidates * (4 * VOCABULARY + VOCABULARY // 8),
            absent=absent,
            error=forbidden,
        )


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    return tasks_of("sample", cases(device, smoke), device, smoke)
