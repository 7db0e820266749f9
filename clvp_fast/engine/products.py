"""The linear layers of a decoder as the engine computes them: over the model's own weights, or copies in 8 bits, which
may be packed besides.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from clvp_fast import ops
from clvp_fast.ops import panels as packing
from clvp_fast.ops.binding import BoundCall, Room
from clvp_fast.ops.linear import bind_linear

# How many rows of weights are turned into 8 bits at once.
_ROWS = 256


@dataclass(frozen=True)
class Product:
    """A linear layer: `weight` `[out, in]`, `bias` `[out]` or None; with int8 weights `scale` `[out]` float32.

    panels: the weights packed, a copy; None: they are read as they lie.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None = None
    panels: torch.Tensor | None = None

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, activation: str | None = None
    ) -> torch.Tensor:
        """`[..., in]` to `[..., out]`; a residual is added behind the activation, and the result has its dtype."""
        return ops.linear(x, self.weight, self.bias, **self._settings(residual, activation))

    def bind(
        self,
        out: torch.Tensor,
        room: Room,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> BoundCall:
        """The same into `out`, as `bind_linear` tells."""
        return bind_linear(out, room, x, self.weight, self.bias, **self._settings(residual, activation))

    def _settings(self, residual: torch.Tensor | None, activation: str | None) -> dict[str, Any]:
        return dict(scale=self.scale, activation=activation, residual=residual, panels=self.panels)

    def packed(self, dtype: torch.dtype) -> "Product":
        """The product with panels of its weights, made now, beside x of `dtype`; itself where no kernel reads them."""
        if packing.unserved(dtype, self.weight) is not None:
            return self
        return replace(self, panels=packing.pack(self.weight))

    def repack(self) -> None:
        """Write the panels again, of the weights as they are now."""
        if self.panels is not None:
            packing.pack(self.weight, into=self.panels)


@torch.no_grad()
def in_int8(product: Product) -> Product:
    """The product over a copy of its weights in 8 bits, symmetric, with a scale for each row; the bias is shared."""
    weight = product.weight
    # Rows side by side, as all kernels read them best, also where `weight` is a view that has columns so.
    copied = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    # Some rows at a time, as copies of whole weights in float32 would leave holes in the heap.
    for rows, copies, scales in zip(*(x.split(_ROWS) for x in (weight, copied, scale)), strict=True):
        wide = rows.float()
        # A row of zeros has any scale; the smallest normal number keeps it from 0 / 0.
        scales.copy_(wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127)
        copies.copy_((wide / scales[:, None]).round())
    return Product(copied, product.bias, scale)
