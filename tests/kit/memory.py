"""Memory that betrays what was not written, and what was read or written past the end."""

import torch

POISON = float("nan")


class Guarded:
    """A tensor filled with NaN, between guard rows of NaN, for an operator to write.

    `tensor` is the view to write; `check()` asserts that all of it was written and nothing around it.
    """

    def __init__(self, *shape: int, dtype: torch.dtype, rows: int = 2, device: torch.types.Device = "cpu"):
        self._rows = rows
        self._buffer = torch.full((shape[0] + 2 * rows, *shape[1:]), POISON, dtype=dtype, device=device)
        self.tensor = self._buffer[rows : rows + shape[0]]

    def check(self, name: str = "output") -> None:
        guards = torch.cat((self._buffer[: self._rows], self._buffer[len(self._buffer) - self._rows :]))
        assert guards.isnan().all(), f"{name}: written outside its rows"
        stale = self.tensor.isnan()
        assert not stale.any(), f"{name}: not written (or NaN) at {stale.nonzero()[0].tolist()}"


def strided(x: torch.Tensor) -> torch.Tensor:
    """Return a non-contiguous view with an offset that equals `x`; NaN lies between its elements, or True for bool."""
    fill = POISON if x.is_floating_point() else True if x.dtype == torch.bool else 2**30
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + 5), fill, dtype=x.dtype, device=x.device)
    buffer = torch.stack((buffer, buffer))
    view = buffer[1, ..., 3 : 3 + x.shape[-1]]
    view.copy_(x)
    return view
