"""The launches of a real decode step, recorded without a GPU.

The step is the one that `Runner` captures: its own list of calls, over a model on the `meta` device, whose tensors have
shapes and no storage. Triton compiles what launchers would launch and runs nothing; each operator of torch that
computes something counts as one launch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.aot.compiling import TOOLS, Driver, printed, resources
from benchmarks.cost.machine_code import Arm, arms
from benchmarks.tiers import PAGE_SIZE
from clvp_fast import ClvpConfig
from clvp_fast.engine import weights
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.scheduler import Prefill
from clvp_fast.models.clvp.causal_lm import ClvpForCausalLM
from clvp_fast.ops import dispatch

ARCHITECTURE = 90
# Operators that allocate.
_FREE = ("empty", "new_empty")


@dataclass(frozen=True)
class Code:
    """A compiled kernel: its arms, and what a program of it takes of a multiprocessor."""

    arms: tuple[Arm, ...]
    registers: int
    shared_bytes: int


@dataclass(frozen=True)
class Launch:
    """One launch.

    Args:
        kernel: the kernel's name, or the operator's of torch.
        arguments: by name for a kernel of ours; by place for an operator of torch, with its result as `out`.
        programs, warps: of the grid, and of a program; 0 where they are not known, for an operator of torch.
        code: None for an operator of torch.
    """

    kernel: str
    arguments: dict[Any, Any]
    programs: int = 0
    warps: int = 0
    stages: int = 1
    code: Code | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Yield a list that fills with the launches of the block; the process keeps Triton's driver of an H200."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        arguments = dict(zip(self.arg_names, args, strict=False)) | options
        programs = 1
        for size in grid(arguments) if callable(grid) else grid:
            programs *= size
        metadata = compiled.metadata
        code = _code(compiled.asm["cubin"], metadata.shared)
        launches.append(Launch(metadata.name, arguments, programs, metadata.num_warps, metadata.num_stages, code))
        return compiled

    driver.set_active(Driver(ARCHITECTURE))
    with mock.patch.object(JITFunction, "run", compile_only), _Operators(launches):
        yield launches


@lru_cache(None)
def _code(cubin: bytes, shared_bytes: int) -> Code:
    found = tuple(arms(printed("nvdisasm", "-c", cubin)))
    return Code(found, resources(cubin)["registers"], shared_bytes)


class _Operators(TorchDispatchMode):
    """Adds the operators of torch that compute something to a list of launches; our own launch, as on an H200."""

    def __init__(self, launches: list[Launch]):
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "clvp_fast":
            return dispatch.OPERATORS[func.overloadpacket.__name__]._registered(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        if name not in _FREE and not views and isinstance(result, torch.Tensor):
            self._launches.append(Launch(name, {**dict(enumerate(args)), "out": result}))
        return result


def step(
    candidates: int, prompt: int, new_tokens: int, deterministic: bool, num_layers: int | None = None
) -> list[Launch]:
    """Return the launches of a captured step in bfloat16, as `Runner.warm_up` captures it.

    Args:
        candidates: rows of the step.
        prompt, new_tokens: the most tokens of a prompt and of a candidate, which decide the sizes of page tables.
        deterministic: as for `Runner`.
        num_layers: of the decoder; by default CLVP's 30.
    """
    num_pages = candidates * -(-new_tokens // PAGE_SIZE) + -(-prompt // PAGE_SIZE)
    options = dict(max_prefix_len=prompt, deterministic=deterministic)
    with on_paper():
        runner = Runner(_decoder(num_layers), num_pages, PAGE_SIZE, candidates, new_tokens, **options)
        with torch.inference_mode():
            runner._bind(candidates, {"typical_mass": 1.0})  # memory that is kept is made now
            with recorded() as launches:
                for call in runner._bind(candidates, {"typical_mass": 1.0}):
                    call()
    return launches


def prefill(prompts: list[int], deterministic: bool, num_layers: int | None = None) -> list[Launch]:
    """Return the launches of a prefill of prompts of so many tokens, in bfloat16; other arguments are as for `step`."""
    pages = [-(-tokens // PAGE_SIZE) for tokens in prompts]
    options = dict(max_prefix_len=max(prompts), deterministic=deterministic)
    with on_paper():
        runner = Runner(_decoder(num_layers), sum(pages), PAGE_SIZE, len(prompts), 1, **options)
        width = runner.decoder.hidden_size
        planned = [Prefill(key, key, [0] * pages[key], tokens) for key, tokens in enumerate(prompts)]
        embeds = {key: torch.empty(tokens, width, device="meta") for key, tokens in enumerate(prompts)}
        with torch.inference_mode(), recorded() as launches:
            runner._prefill(planned, embeds)
    return launches


def _decoder(num_layers: int | None) -> ClvpForCausalLM:
    config = ClvpConfig().decoder_config
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    with torch.device("meta"):
        return ClvpForCausalLM(config).to(torch.bfloat16).eval()


@contextmanager
def on_paper() -> Iterator[None]:
    """Let the engine take parameters without storage, and operators choose on `meta` tensors as on an H200."""

    def packed(linears):
        return tuple(torch.cat([getattr(one, name) for one in linears]).detach() for name in ("weight", "bias"))

    with (
        mock.patch.object(dispatch, "missing_on_gpu", lambda device: None),
        mock.patch.object(weights, "changed_module", lambda *arguments: None),
        mock.patch.object(weights, "is_plain_embedding", lambda table: True),
        mock.patch.object(weights, "pack_linears", packed),
    ):
        yield


def missing() -> str | None:
    """Return why nothing can be compiled here, or None."""
    absent = [name for name in ("ptxas", "nvdisasm", "cuobjdump") if not (TOOLS / name).exists()]
    return f"triton has no {', '.join(absent)} here" if absent else None
