"""The two feed-forward blocks, as two launches of one kernel: a linear layer with its epilogue.

    gelu:  hidden = act(x W_in^T + b_in)
    geglu: hidden = value * act(gate),  [value, gate] = x W_in^T + b_in
    out    = hidden W_out^T + b_out + residual

x `[rows, width]`, W_in `[inner or 2 inner, width]`, W_out `[outer, inner]`, float32, float16 or bfloat16; products and
epilogues in float32, `hidden` rounded once to the type of x. residual and out have one type, that of x or float32. The
wide product never reaches memory: bias, activation and gate are applied to the accumulators, and of a gated block half
of it is written.

A program computes a tile `W x^T`: the weights' rows are those of the matrix instruction, the rows of x its columns. So
one kernel serves both regimes: an instruction takes as few as 8 columns but wants 64 rows (`wgmma`), and of a decoding
step's rows there are few, of weights always many. The rows of a gated tile are eight values, then their eight gates,
and so on: the accumulators of a value and its gate lie in one thread.

Moved at least (counted, s bytes an element): the weights once, `s * (2 + gated) * inner * width` for outer = width;
x, residual and out once; `hidden` once out and once in. Few rows are bound by the weights: 16.8 MB for 1024 -> 4096 ->
1024 in 2-byte types. Many rows are bound by the products: consecutive programs share a tile of x, and all weights
(7 MB in the encoders) stay in the L2 cache.

The second product of few rows has few tiles and a long sum, so the sum is split over programs. Each leaves its part in
float32, and the last one to arrive adds all parts in their order: no launch more, and the same bits every time. The
counters of arrivals are set to 0 by the first launch. The number of parts depends on the shape of W_out alone.

A row's bits do not depend on the other rows as long as their number stays within one regime: up to 64, 256, 1024, 4096
rows, and more. float32 products are made of three TF32 products each (`tf32x3`), which leaves an error of about 2^-21
of a product, near float32's own; Triton's default, one TF32 product, would leave 2^-11.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from clvp_fast.kernels.target import architecture

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "linear")


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_new" or ACTIVATION == "gelu_pytorch_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu" or ACTIVATION == "swish":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def _sum_of_parts(acc, partial_ptr, arrivals_ptr, tile, part, PARTS: tl.constexpr):
    """The tile summed over its parts, and whether this program is the one to go on with it."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_R: tl.constexpr = acc.shape[1]
    at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    first_ptr = partial_ptr + tile.to(tl.int64) * PARTS * BLOCK_N * BLOCK_R
    tl.store(first_ptr + part * BLOCK_N * BLOCK_R + at, acc)
    # All threads' stores come before the counter's release, and its acquire before all threads' loads.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == PARTS - 1
    tl.debug_barrier()
    if last:
        acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for other in range(PARTS):
            # From the L2 cache: the L1 cache of this multiprocessor may be older.
            acc += tl.load(first_ptr + other * BLOCK_N * BLOCK_R + at, cache_modifier=".cg")
    return acc, last


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr,
    rows, columns, depth, x_stride, weight_stride_n, weight_stride_k, residual_stride, out_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN_DEPTH: tl.constexpr, PARTS: tl.constexpr, ZEROS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: `columns` of `out` from one tile of weights, for BLOCK_R rows; or a part of the sum over `depth`."""
    TILE: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    tiles = tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles % PARTS
    row_tile = tl.program_id(0) // tiles // PARTS
    if ZEROS > 0 and tl.program_id(0) == 0:
        tl.store(arrivals_ptr + tl.arange(0, ZEROS), tl.zeros([ZEROS], tl.int32))

    lane = tl.arange(0, BLOCK_N)
    if GATED:
        column = tile * TILE + lane // 16 * 8 + lane % 8
        weight_row = column + lane % 16 // 8 * columns
    else:
        column = tile * TILE + lane
        weight_row = column
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    per_part = tl.cdiv(tl.cdiv(depth, PARTS), BLOCK_K) * BLOCK_K
    begin = part * per_part
    end = tl.minimum(depth, begin + per_part)
    k = begin + tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + weight_row.to(tl.int64)[:, None] * weight_stride_n + k[None, :] * weight_stride_k
    x_ptrs = x_ptr + row.to(tl.int64)[None, :] * x_stride + k[:, None]
    in_weight = (column < columns)[:, None]
    in_x = (row < rows)[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_K):
        if EVEN_DEPTH:
            weight = tl.load(weight_ptrs, mask=in_weight, other=0.0)  # [BLOCK_N, BLOCK_K]
            x = tl.load(x_ptrs, mask=in_x, other=0.0)  # [BLOCK_K, BLOCK_R]
        else:
            inside = start + tl.arange(0, BLOCK_K) < end
            weight = tl.load(weight_ptrs, mask=in_weight & inside[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=in_x & inside[:, None], other=0.0)
        acc = tl.dot(weight, x, acc, input_precision=PRECISION)
        weight_ptrs += BLOCK_K * weight_stride_k
        x_ptrs += BLOCK_K

    if PARTS > 1:
        acc, last = _sum_of_parts(acc, partial_ptr, arrivals_ptr, row_tile * tiles + tile, part, PARTS)
        if not last:
            return
    acc += tl.load(bias_ptr + weight_row, mask=column < columns, other=0.0).to(tl.float32)[:, None]
    if GATED:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_R)), (0, 2, 3, 1))
        value, gate = tl.split(pairs)
        acc = tl.reshape(value * _activate(gate, ACTIVATION), (TILE, BLOCK_R))
        column = tile * TILE + tl.arange(0, TILE)
    else:
        acc = _activate(acc, ACTIVATION)
    stored = (column < columns)[:, None] & in_x
    row = row.to(tl.int64)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + row * residual_stride + column[:, None], mask=stored, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column[:, None], acc.to(out_ptr.dtype.element_ty), mask=stored)


class Tiles(NamedTuple):
    """What a launch is made of: weight rows, rows of x and depth of a tile, warps, stages of the pipeline."""

    BLOCK_N: int
    BLOCK_R: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# By bytes of an element and number of rows (up to), 2026-11, compiled without spills for sm_80, sm_90 and sm_100
# (docs/kernels.md). Up to 64 rows, 32 weight rows a program make 128 programs of a 4096 x 1024 matrix, in each of which
# 24 to 56 KB of weights are on their way: at 4.3 TB/s and 1 us of latency, 132 multiprocessors want 33 KB each. 64
# weight rows and more make `wgmma`.
_FEW, _BATCH, _SOME, _MOST = 64, 1024, 4096, None
_REGIMES = {
    2: {
        _FEW: (32, 64, 128, 4, 4),
        _BATCH: (64, 128, 64, 4, 4),
        _SOME: (128, 128, 64, 8, 3),
        _MOST: (128, 256, 64, 8, 4),
    },
    4: {_FEW: (32, 64, 64, 4, 4), _BATCH: (64, 64, 32, 4, 3), _SOME: (64, 128, 32, 8, 3), _MOST: (64, 128, 32, 8, 3)},
}
# Sizes that are no multiples of a tile or of 16 take registers for their masks and addresses.
_ODD = {2: Tiles(64, 128, 32, 8, 4), 4: Tiles(64, 64, 32, 8, 3)}
_SPLIT_ROWS = 256  # up to which the second product is split; parts of more rows would be much to write and read
_FEWEST_COLUMNS = 16  # of a matrix instruction, in Triton
_PROGRAMS = 128  # what the parts of a split sum should come to; most GPUs of the kind have 108 to 148 multiprocessors
_SHORTEST_PART = 256


def _tiles(rows: int, columns: int, depth: int, parts: int, element_size: int, out_size: int | None = None) -> Tiles:
    """For `columns` results a row, each of the two a gated column needs counted as one, from sums over `depth`.

    element_size, out_size: bytes of an element of the operands and, where they differ, of the result.
    """
    regimes = _REGIMES[element_size]
    regime = next((limit for limit in (_FEW, _BATCH, _SOME) if rows <= limit), _MOST)
    if regime == _FEW:
        tiles = Tiles(*regimes[_FEW])
        block_r = max(triton.next_power_of_2(rows), _FEWEST_COLUMNS)
        return tiles._replace(BLOCK_R=block_r, num_stages=8 if block_r <= 32 else tiles.num_stages)
    if columns % 16 or depth % (64 * parts):
        return _ODD[element_size]
    if regime == _MOST and element_size == 2 and (architecture() < 90 or out_size == 4):
        regime = _SOME  # the larger tile spills registers, and on sm_80 needs more shared memory than there is
    return Tiles(*regimes[regime])


def _parts(rows: int, outer: int, inner: int) -> int:
    """Programs that share the sum of one tile of the second product."""
    if rows > _SPLIT_ROWS:
        return 1
    most = min(_PROGRAMS // triton.cdiv(outer, 32), inner // _SHORTEST_PART)
    return 1 << max(most, 1).bit_length() - 1


class Workspace(NamedTuple):
    """Elements that `mlp` needs of scratch memory: float32, and int32. Both may be 0."""

    partial: int
    arrivals: int


def workspace(rows: int, outer: int, inner: int, element_size: int) -> Workspace:
    """Of the second product, `[rows, inner]` to `[rows, outer]`."""
    parts = _parts(rows, outer, inner)
    if parts == 1:
        return Workspace(0, 0)
    tiles = _tiles(rows, outer, inner, parts, element_size)
    count = triton.cdiv(outer, tiles.BLOCK_N) * triton.cdiv(rows, tiles.BLOCK_R)
    return Workspace(count * parts * tiles.BLOCK_N * tiles.BLOCK_R, triton.next_power_of_2(count))


def _launch(x, weight, bias, residual, out, partial, arrivals, activation, gated, parts, zeros):
    (rows, columns), depth = out.shape, x.shape[1]
    tiles = _tiles(rows, columns, depth, parts, x.element_size(), out.element_size())
    programs = triton.cdiv(columns, tiles.BLOCK_N // 2 if gated else tiles.BLOCK_N) * triton.cdiv(rows, tiles.BLOCK_R)
    _linear_kernel[(programs * parts,)](
        x, weight, bias, residual, out, partial, arrivals,
        rows, columns, depth, x.stride(0), *weight.stride(), 0 if residual is None else residual.stride(0),
        out.stride(0), ACTIVATION=activation, GATED=gated, EVEN_DEPTH=depth % (tiles.BLOCK_K * parts) == 0,
        PARTS=parts, ZEROS=zeros, PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", **tiles._asdict(),
    )  # fmt: skip


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
    """
    rows, inner = hidden.shape
    outer = out.shape[1]
    parts = _parts(rows, outer, inner)
    zeros = workspace(rows, outer, inner, x.element_size()).arrivals
    _launch(x, w_in, b_in, None, hidden, None, arrivals, activation, gated, 1, zeros)
    _launch(hidden, w_out, b_out, residual, out, partial, arrivals, "linear", False, parts, 0)
