"""Calls bound to their arguments: implementation, inputs and results are fixed once, and the call runs many times."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

#: Compute with the bound arguments; the return value is not used.
BoundCall = Callable[[], object]
#: The results of an operator: one tensor, or one for each result, with `None` for one that is not wanted.
Results = torch.Tensor | tuple[torch.Tensor | None, ...]


class Room:
    """Tensors that hold values within one step: the same name always gives the same memory.

    Calls that share it run one after another.

    Args:
        rows: the most that a tensor has.
    """

    def __init__(self, rows: int, device: torch.types.Device):
        self._rows, self._device = rows, device
        self._blocks: dict[tuple, torch.Tensor] = {}

    @torch.inference_mode(False)  # a tensor made under inference mode can be written there only
    def __call__(self, name: str, rows: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return `[rows, *shape]`, contiguous, with the values that were written there last."""
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
    """Return a call that makes all these calls, one after another."""

    def call() -> None:
        for each in calls:
            each()

    return call


def writing(run: Callable) -> Callable[..., BoundCall]:
    """Return an `Implementation.bind` for a `run` that takes `out`."""
    return lambda out, room, *args: partial(run, *args, out=out)


def side_by_side(*tensors: torch.Tensor | None) -> bool:
    """Tell whether each tensor is contiguous, so that no copy is needed."""
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)
