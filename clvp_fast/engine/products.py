"""The linear layers of a decoder, over the model's own weights or over copies in 8 bits; either may be packed.

Products over packed copies in 8 bits may also round what they multiply to 8 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from clvp_fast import ops
from clvp_fast.ops import panels as packing
from clvp_fast.ops.binding import BoundCall, Scratch, in_turn
from clvp_fast.ops.large_pages import Room
from clvp_fast.ops.linear import bind_linear

# The number of rows of weights that are quantised at a time.
_ROWS = 256


@dataclass(frozen=True)
class Product:
    """A linear layer: `weight` `[out, in]`, `bias` `[out]` or None; with int8 weights `scale` `[out]` float32.

    panels: a packed copy of the weights; None: the weights are read as they lie.
    int8_x: rows of x are rounded to 8 bits, for which the panels are packed.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None = None
    panels: torch.Tensor | None = None
    int8_x: bool = False

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: str | None = None,
        always: bool = False,
    ) -> torch.Tensor:
        """Map `[..., in]` to `[..., out]`. A residual is added after the activation, and the result has its dtype."""
        return ops.linear(x, self.weight, self.bias, **self._settings(residual, activation), always=always)

    def bind(
        self,
        out: torch.Tensor,
        scratch: Scratch,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: str | None = None,
        always: bool = False,
    ) -> BoundCall:
        """Return the same call with its result in `out`, as `bind_linear` does."""
        settings = self._settings(residual, activation)
        return bind_linear(out, scratch, x, self.weight, self.bias, **settings, always=always)

    def _settings(self, residual: torch.Tensor | None, activation: str | None) -> dict[str, Any]:
        settings = dict(scale=self.scale, panels=self.panels, int8_x=self.int8_x)
        return settings | dict(activation=activation, residual=residual)

    def packed(self, dtype: torch.dtype, within: Room | None = None) -> "Product":
        """Return the product with new panels of its weights, for x of `dtype`; or itself if no kernel reads panels."""
        if packing.unserved(dtype, self.weight) is not None:
            return self
        return replace(self, panels=packing.pack(self.weight, within=within))

    def in_8_bits(self, dtype: torch.dtype, within: Room | None = None) -> "Product":
        """Return the product of rows of x rounded to 8 bits, with new panels of its int8 weights, for x of `dtype`.

        Raises `ValueError` with the reason if no kernel computes it.
        """
        if (reason := packing.unserved(dtype, self.weight, int8_x=True)) is not None:
            raise ValueError(f"activation_dtype=torch.int8 has no kernel here ({reason}): leave it out")
        return replace(self, panels=packing.pack(self.weight, int8_x=True, within=within), int8_x=True)

    def repack(self) -> None:
        """Write the panels again from the weights as they are now."""
        if self.panels is not None:
            packing.pack(self.weight, into=self.panels, int8_x=self.int8_x)


@dataclass(frozen=True)
class Blocks:
    """The rows of a step, and how many of them a product has at most.

    With a `size`, each call is our own kernel's, which sums a row in one order for all numbers of rows up to there: so
    a row's bits depend neither on how many rows a step has nor on its place among them. A step of more makes several
    calls.

    Args:
        rows: of the step.
        size: the most rows of a call; None: one call has all rows, and takes the product that is fastest for them.
    """

    rows: int
    size: int | None = None

    def product(
        self, product: Product, out: torch.Tensor, scratch: Scratch, x: torch.Tensor, **settings: Any
    ) -> BoundCall:
        """Bind a product of all rows; `settings` are those of `Product.bind`."""
        return self.bind(partial(product.bind, always=self.size is not None), out, scratch, x, **settings)

    def bind(
        self,
        bind: Callable[..., BoundCall],
        out: torch.Tensor,
        scratch: Scratch,
        x: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        **settings: Any,
    ) -> BoundCall:
        """Bind calls that together have all rows: `x`, `residual` and `out` `[rows, ...]`."""
        if self.size is None or self.rows <= self.size:
            return bind(out, scratch, x, residual=residual, **settings)
        calls = []
        for first in range(0, self.rows, self.size):
            some = slice(first, first + self.size)
            added = None if residual is None else residual[some]
            calls.append(bind(out[some], scratch, x[some], residual=added, **settings))
        return in_turn(*calls)


@torch.no_grad()
def in_int8(product: Product) -> Product:
    """Return the product over a symmetric copy of its weights in 8 bits, with a scale for each row."""
    weight = product.weight
    # All kernels read contiguous rows best, so that a view whose columns are contiguous is copied into rows.
    copied = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    # A few rows at a time, because whole float32 copies of the weights would leave holes in the heap.
    for rows, copies, scales in zip(*(x.split(_ROWS) for x in (weight, copied, scale)), strict=True):
        wide = rows.float()
        # A row of zeros may have any scale; the smallest normal number avoids 0 / 0.
        scales.copy_(wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127)
        copies.copy_((wide / scales[:, None]).round())
    return Product(copied, product.bias, scale)
