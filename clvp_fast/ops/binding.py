"""Calls bound to their arguments: implementation, inputs and results are fixed once, for any number of runs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

#: Computes with the bound arguments; the return value is not used.
BoundCall = Callable[[], object]
#: The results of an operator: one tensor, or one for each result, with `None` for one that is not wanted.
Results = torch.Tensor | tuple[torch.Tensor | None, ...]


class Scratch:
    """Memory for intermediate values within one step: the same name always gives the same tensor.

    Calls that share it run one after another.

    Args:
        rows: the most rows that a tensor has.
    """

    def __init__(self, rows: int, device: torch.types.Device):
        self._rows, self._device = rows, device
        self._blocks: dict[tuple, torch.Tensor] = {}

    @torch.inference_mode(False)  # a tensor made under inference mode can only be written under it
    def __call__(self, name: str, rows: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a contiguous tensor `[rows, *shape]` with the values that were last written to it."""
        key = (name, *shape, dtype)
        if key not in self._blocks:
            self._blocks[key] = torch.empty(self._rows, *shape, dtype=dtype, device=self._device)
        return self._blocks[key][:rows]


def copying(run: Callable[[], Any], out: Results) -> BoundCall:
    """Return a call that computes `run()` and copies its result into `out`."""
    if isinstance(out, torch.Tensor):
        return lambda: out.copy_(run())
    wanted = [(place, target) for place, target in enumerate(out) if target is not None]

    def call() -> None:
        results = run()
        for place, target in wanted:
            target.copy_(results[place])

    return call


def in_turn(*calls: BoundCall) -> BoundCall:
    """Return a call that runs all these calls, one after another."""

    def call() -> None:
        for each in calls:
            each()

    return call


def writing(run: Callable) -> Callable[..., BoundCall]:
    """Return an `Implementation.bind` for a `run` that takes `out`."""
    return lambda out, scratch, *args: partial(run, *args, out=out)


def side_by_side(*tensors: torch.Tensor | None) -> bool:
    """Tell whether each tensor is contiguous, so that no copy is needed."""
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)
