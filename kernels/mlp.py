"""The two feed-forward blocks, as two launches of one kernel: a linear layer with its epilogue (`kernels/linear.py`).

    gelu:  hidden = act(x W_in^T + b_in)
    geglu: hidden = value * act(gate),  [value, gate] = x W_in^T + b_in
    out    = hidden W_out^T + b_out + residual

x `[rows, width]`, W_in `[inner or 2 inner, width]`, W_out `[outer, inner]`, float32, float16 or bfloat16; products and
epilogues in float32, `hidden` rounded once to the type of x. residual and out have one type, that of x or float32. The
wide product never reaches memory: bias, activation and gate are applied to the accumulators, and a gated block writes
half of it. Weights may be int8, with a float32 scale for each row.

Moved at least (counted, s bytes an element): the weights once, `s * (2 + gated) * inner * width` for outer = width;
x, residual and out once; `hidden` once out and once in. Few rows are bound by the weights: 16.8 MB for 1024 -> 4096 ->
1024 in 2-byte types, 8.4 MB in int8. Many rows are bound by the products: consecutive programs share a tile of x, and
all weights (7 MB in the encoders) stay in the L2 cache.

The second product of few rows has few tiles and a long sum, so the sum is split over programs. Each leaves its part in
float32, and the last one to arrive adds all parts in order: this needs no extra launch, and gives the same bits every
time. The first launch sets the counters of arrivals to 0. The number of parts depends only on the shape of W_out.

A row's bits do not depend on the other rows as long as their number stays within one range: up to 256 rows, for which
the second product is split, or more; over int8 weights up to 512 rows, or more. float32 products are made of three TF32
products each (`tf32x3`), which leaves an error of about 2^-21 of a product, and each tile's are added up outside of the
matrix unit, which cuts its sums off (docs/kernels.md); Triton's default, one TF32 product, would leave 2^-11.
"""

from typing import NamedTuple

import torch
import triton

from clvp_fast.kernels.linear import ACTIVATIONS as ACTIVATIONS, launch, tiles_for

# The most rows for which the second product is split, because parts of more rows cost too much; and over int8 weights.
_SPLIT_ROWS, _INT8_SPLIT_ROWS = 256, 512
_PROGRAMS = 128  # the number of programs that split sums should make; most such GPUs have 108 to 148 multiprocessors
_SHORTEST_PART = 256


def _parts(rows: int, outer: int, inner: int, int8: bool) -> int:
    """Return the number of programs that share the sum of one tile of the second product."""
    if rows > (_INT8_SPLIT_ROWS if int8 else _SPLIT_ROWS):
        return 1
    most = min(_PROGRAMS // triton.cdiv(outer, 32), inner // _SHORTEST_PART)
    return 1 << max(most, 1).bit_length() - 1


class Workspace(NamedTuple):
    """The elements of scratch memory that `mlp` needs: float32, and int32. Both may be 0."""

    partial: int
    arrivals: int


def workspace(rows: int, outer: int, inner: int, element_size: int, int8: bool = False) -> Workspace:
    """Return the scratch memory of the second product, `[rows, inner]` to `[rows, outer]`."""
    parts = _parts(rows, outer, inner, int8)
    if parts == 1:
        return Workspace(0, 0)
    tiles = tiles_for(rows, outer, inner, parts, element_size, int8)
    count = triton.cdiv(outer, tiles.BLOCK_N) * triton.cdiv(rows, tiles.BLOCK_R)
    return Workspace(count * parts * tiles.BLOCK_N * tiles.BLOCK_R, triton.next_power_of_2(count))


def _launch(x, weight, scale, bias, residual, out, partial, arrivals, activation, gated, parts, zeros):
    tiles = tiles_for(*out.shape, x.shape[1], parts, x.element_size(), scale is not None)
    launch(x, weight, scale, bias, residual, out, partial, arrivals, activation, gated, tiles, parts, zeros)


def mlp(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    residual: torch.Tensor | None,
    activation: str,
    gated: bool,
    *,
    hidden: torch.Tensor,
    out: torch.Tensor,
    partial: torch.Tensor | None,
    arrivals: torch.Tensor | None,
    scale_in: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
) -> None:
    """Write both products of a feed-forward block, in two launches.

    Args:
        x: `[rows, width]`, at least one row; residual: `[rows, outer]`, of the dtype of `out`, or None. Columns at
            stride 1, in results too.
        w_in, b_in: `[inner, width]`, or `[2 inner, width]` with `gated`, values first; w_out, b_out: `[outer, inner]`.
            Weights at any strides (one of them 1 for speed), biases contiguous.
        activation: one of `ACTIVATIONS`.
        hidden, out: `[rows, inner]` of the dtype of `x`, and `[rows, outer]`; written.
        partial, arrivals: scratch of at least `workspace(...)` elements; None where that is 0.
        scale_in, scale_out: float32, contiguous, one for each row of `w_in` and `w_out` if those are int8.
    """
    rows, inner = hidden.shape
    outer = out.shape[1]
    int8 = scale_in is not None
    parts = _parts(rows, outer, inner, int8)
    zeros = workspace(rows, outer, inner, x.element_size(), int8).arrivals
    _launch(x, w_in, scale_in, b_in, None, hidden, None, arrivals, activation, gated, 1, zeros)
    _launch(hidden, w_out, scale_out, b_out, residual, out, partial, arrivals, "linear", False, parts, 0)
