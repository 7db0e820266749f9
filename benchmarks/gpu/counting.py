"""The runs of all steps, their order and their device memory, counted without a GPU.

Bytes of the models' rows are those of weights, keys and values that the process must hold at once; those of a kernel's
rows its inputs. Memory of libraries is not counted: on the device `measuring.MOST_BYTES` is the most
that torch gives.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache, partial
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import end_to_end, kernels
from benchmarks.gpu.measuring import Item, arguments_of, items_of
from benchmarks.gpu.steps import environment
from benchmarks.gpu.supervise import Step
from benchmarks.harness import ROOT
from benchmarks.tiers import PAGE_SIZE, TIERS
from clvp_fast import ClvpConfig, ClvpModelForConditionalGeneration, SamplingParams

# Beside the text's own, the tokens of a prompt: the voice, its begin and its end.
_AROUND_TEXT = 3
# The copies of all keys and values that a rival holds at once: those before and after a step, and its inputs.
_COPIES = {"transformers, static": 2, "transformers": 3, "torch": 2}


def counted(planned: Iterable[Step]) -> Iterator[str]:
    """Yield a line a step, as it is counted, and of measurements a line a row."""
    for step in planned:
        kind = "rows" if is_measuring(step) else "tests"
        items = rows_of(step) if kind == "rows" else tests_of(step)
        workers = f" by {step.workers} workers" if step.workers > 1 else ""
        yield f"{step.name}: {len(items)} {kind}{workers}, at most {step.seconds:.0f} s"
        if kind == "rows":
            yield from (f"  {_memory(item)}  {item.name}" for item in items)


def _memory(item: Item) -> str:
    if item.provider in item.task.absent:
        return f"absent ({item.task.absent[item.provider]})"
    size = held(item)
    return " not counted" if size is None else f"{size / 1e9:9.2f} GB"


def is_measuring(step: Step) -> bool:
    return "benchmarks.gpu.measuring" in step.command


def tests_of(step: Step) -> list[str]:
    """Return the ids of a step's tests, as pytest collects them where torch reports a GPU."""
    words = step.command[step.command.index(sys.executable) :]  # without the sanitizer before it
    done = subprocess.run(
        [*words, "--collect-only", "-p", "benchmarks.gpu.pretended"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    if done.returncode:
        raise RuntimeError(f"the tests of {step.name} cannot be collected: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(" ")]


def rows_of(step: Step) -> list[Item]:
    """Return the rows that a step would measure."""
    words = step.command[step.command.index("benchmarks.gpu.measuring") + 1 :]
    arguments = arguments_of(list(words))
    return list(items_of(arguments.workload, arguments.groups, arguments.names, "cuda", smoke=False))


def held(item: Item) -> int | None:
    """Return the least bytes of device memory of an item while it is measured; None where they are not counted."""
    make = item.task.makers[item.provider]
    if isinstance(make, partial) and make.args and isinstance(make.args[0], kernels.Case):
        return _inputs(make.args[0])
    shape = item.task.shape
    if item.workload == "decode_step":
        candidates, tokens = shape["candidates"], shape["text_tokens"] + _AROUND_TEXT + shape["stored"] + PAGE_SIZE
    elif item.workload == "generate":
        candidates, tokens = shape["candidates"], shape["text_tokens"] + _AROUND_TEXT + shape["new_tokens"]
    elif item.workload == "end_to_end":
        candidates = SamplingParams.preset(shape["preset"]).num_candidates
        tokens = len(end_to_end.TEXT) + _AROUND_TEXT + shape["new_tokens"]
    else:
        return None
    copies = next((n for word, n in _COPIES.items() if item.provider.startswith(word)), 1)
    return _models() + candidates * tokens * copies * _bytes_a_token(item.provider)


def _bytes_a_token(provider: str) -> int:
    config = ClvpConfig().decoder_config
    tier = max((tier for tier in TIERS["cuda"] if tier.name in provider), key=lambda tier: len(tier.name))
    itemsize = (tier.page_dtype or tier.dtype).itemsize
    return 2 * config.num_hidden_layers * config.hidden_size * itemsize


@cache
def _models() -> int:
    """Return the bytes of all models that a measuring process holds: ours and transformers', in two types each."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ClvpModelForConditionalGeneration(ClvpConfig()).parameters())
    return 2 * parameters * (torch.float32.itemsize + torch.bfloat16.itemsize)


def _inputs(case: kernels.Case) -> int:
    """Return the bytes of the sets of inputs that a case is measured on."""
    generator = torch.Generator()
    with mock.patch.object(torch, "Generator", lambda device="cpu": generator), _OnlyCounts():
        arguments = case.inputs(0)
    size = sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor))
    return size * kernels.copies(arguments, "cuda")


class _OnlyCounts(TorchFunctionMode):
    """Makes tensors that have a shape and no memory, wherever they were to lie."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to:
            args = tuple("meta" if x == "cuda" else x for x in args)
        if "generator" in kwargs:
            kwargs["generator"] = None
            kwargs["device"] = "meta"
        elif "device" in kwargs:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)
