"""Weights of linear layers packed once, in the order in which a CPU kernel (csrc/cpu/panels.h) reads them."""

from collections.abc import Iterable

import torch

from clvp_fast.ops import large_pages, many_rows
from clvp_fast.ops.checks import check_same, shape_error
from clvp_fast.ops.dispatch import missing_natively

#: The number of rows of weights in a panel.
PANEL = 48
#: The most columns of weights that are multiplied in 8 bits: their sums fit into 32 bits.
MOST_INT8_COLUMNS = 1 << 16


def unserved(x_dtype: torch.dtype, weight: torch.Tensor, int8_x: bool = False) -> str | None:
    """Return why no kernel reads panels of `weight` `[out, in]` for x of `x_dtype`, or None.

    Args:
        int8_x: rows of x are rounded to 8 bits, as for `linear`.
    """
    device, int8 = weight.device, weight.dtype == torch.int8
    if reason := missing_natively(device) or many_rows.unserved_type(device, x_dtype, int8):
        return reason
    if int8_x and (not int8 or weight.shape[1] > MOST_INT8_COLUMNS):
        shown = f"{list(weight.shape)}, {weight.dtype}"
        return f"products of 8 bits are over int8 weights of up to {MOST_INT8_COLUMNS} columns, not {shown}"
    if weight.dtype not in (x_dtype, torch.int8):
        return f"panels are of the dtype of x, {x_dtype}, or int8, not {weight.dtype}"
    if weight.shape[1] % many_rows.COLUMNS or weight.numel() == 0:
        return f"panels have rows of {many_rows.COLUMNS} n columns, not {list(weight.shape)}"
    return None


def shape_of(weight: torch.Tensor, int8_x: bool = False) -> tuple[int, int, int, int]:
    """Return the shape of the panels of `weight` `[out, in]`."""
    outs, columns = weight.shape
    together = 4 if int8_x else 1 if weight.dtype == torch.float32 else 2
    return padded(outs) // PANEL, columns // together, PANEL, together


def dtype_of(weight: torch.Tensor, int8_x: bool = False) -> torch.dtype:
    """Return the dtype of the panels of `weight`."""
    return torch.uint8 if int8_x else weight.dtype


def padded(outs: int) -> int:
    """Return the number of rows in the panels of `outs` rows of weights, with padding."""
    return -(-outs // PANEL) * PANEL


def room(weights: Iterable[torch.Tensor], int8_x: bool = False) -> large_pages.Room:
    """Allocate memory for the panels of all these weights."""
    weights = list(weights)
    sizes = (large_pages.Room.bytes_of(*shape_of(x, int8_x), dtype=dtype_of(x, int8_x)) for x in weights)
    return large_pages.Room(sum(sizes), weights[0].device)


@torch.no_grad()
def pack(
    weight: torch.Tensor,
    into: torch.Tensor | None = None,
    int8_x: bool = False,
    within: large_pages.Room | None = None,
) -> torch.Tensor:
    """Pack `weight` `[out, in]`, of any strides, into panels `[ceil(out / 48), in / u, 48, u]`.

    u columns of a row of weights lie side by side: 1 for float32, 2 for narrower types. Unused rows of the last panel
    are zeros.

    Args:
        into: existing panels of such a weight, which are overwritten.
        int8_x: for products with rows of x in 8 bits: u is 4, and 128 is added to each weight, so that panels are
            uint8. CPUs multiply bytes without a sign by bytes with one.
        within: memory for new panels; None: memory of their own.
    """
    _, units, _, together = shape = shape_of(weight, int8_x)
    if into is None:
        within = room([weight], int8_x) if within is None else within
        into = within.empty(*shape, dtype=dtype_of(weight, int8_x)).zero_()
    # One panel at a time, which fits into the caches.
    for group, rows in zip(into, weight.split(PANEL), strict=True):
        rows = rows.bitwise_xor(-128).view(torch.uint8) if int8_x else rows
        group[:, : len(rows)].copy_(rows.unflatten(1, (units, together)).transpose(0, 1))
    return into


def check(panels: torch.Tensor, weight: torch.Tensor, int8_x: bool = False) -> None:
    """Raise unless `panels` have the shape, dtype and device of those of `weight`, and are contiguous."""
    shape, dtype = shape_of(weight, int8_x), dtype_of(weight, int8_x)
    if panels.shape != shape:
        raise shape_error("panels", f"{list(shape)}, as pack() makes them of the weight", panels)
    check_same("panels", panels, "weight", weight, dtype=False)
    if panels.dtype != dtype:
        raise TypeError(f"panels must be {dtype}, as pack() makes them of the weight, not {panels.dtype}")
    if not panels.is_contiguous():
        raise ValueError("panels must be contiguous, as pack() makes them")
