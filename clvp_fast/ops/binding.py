"""Calls that are bound to their arguments: who computes, what is read and where it is written, said once for many."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

#: Computes what it is bound to, and returns nothing of use.
BoundCall = Callable[[], object]
#: Where an operator writes: one tensor, or one of each result, `None` for one that nobody wants.
Results = torch.Tensor | tuple[torch.Tensor | None, ...]


class Room:
    """Tensors that hold values within one step: whoever asks by the same name gets the same memory.

    Calls that share it run one after another.

    Args:
        rows: the most that a tensor has.
    """

    def __init__(self, rows: int, device: torch.types.Device):
        self._rows, self._device = rows, device
        self._blocks: dict[tuple, torch.Tensor] = {}

    @torch.inference_mode(False)  # else they could be written under inference mode alone
    def __call__(self, name: str, rows: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """`[rows, *shape]`, contiguous, with whatever was written there last."""
        key = (name, *shape, dtype)
        if key not in self._blocks:
            self._blocks[key] = torch.empty(self._rows, *shape, dtype=dtype, device=self._device)
        return self._blocks[key][:rows]


def copying(run: Callable[[], Any], out: Results) -> BoundCall:
    """A call that computes by `run`, and copies what comes of it into `out`."""
    if isinstance(out, torch.Tensor):
        return lambda: out.copy_(run())
    wanted = [(place, target) for place, target in enumerate(out) if target is not None]

    def call() -> None:
        results = run()
        for place, target in wanted:
            target.copy_(results[place])

    return call


def in_turn(*calls: BoundCall) -> BoundCall:
    """A call that makes all of these, one after another."""

    def call() -> None:
        for each in calls:
            each()

    return call


def writing(run: Callable) -> Callable[..., BoundCall]:
    """`Implementation.bind` for a `run` that takes `out`."""
    return lambda out, room, *args: partial(run, *args, out=out)


def side_by_side(*tensors: torch.Tensor | None) -> bool:
    """Whether the numbers of each tensor lie side by side: nothing has to be copied for who wants them so."""
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)
