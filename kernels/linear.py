"""A linear layer as one launch: product, scale, bias, activation, gate and residual.

    out = activation((x W^T) * scale + b) + residual

x `[rows, depth]`, float32, float16 or bfloat16; W `[columns, depth]` of the same type, or int8 with a float32 scale a
row; sums and epilogue in float32, `out` rounded once. `kernels/mlp.py` makes the feed-forward blocks of two such
launches; here is one launch by itself, `linear`.

A program computes a tile `W x^T`: the weights' rows are the rows of the matrix instruction, and the rows of x its
columns. So one kernel serves both regimes: an instruction takes as few as 8 columns but needs 64 rows (`wgmma`); a
decoding step has few rows, but weights always have many. The rows of a gated tile are eight values, then their eight
gates, and so on, so that the accumulators of a value and its gate lie in one thread.

int8 weights are loaded once, as they lie, and widened in registers on their way into the instruction: every int8 is a
number of each of the three types, so nothing is rounded, and no wider copy is ever stored. Moved at least (counted):
`columns * depth` bytes of weights and `4 * columns` of scales; x and out once. The decoder's four matrices are 12.6 MB
a layer, against 25.2 MB in 2-byte types. A float32 x is rounded to TF32, and the rest is multiplied separately: as
the weights are exact, the error of these two TF32 products is at most 2^-23 of a product, and mostly zero. The matrix
unit truncates sums where float32 rounds, so that long ones shrink: each tile's begins at zero, and is added outside.

A row's bits depend neither on the other rows nor on their number, as long as sums are split into the same parts. Every
tile over weights of one type sums the depth in one order, in one kind of instruction: `mma.sync`, or on Hopper `wgmma`
and on Blackwell `tcgen05`, which take 64 rows of weights and the same depth whatever the number of columns, in which
tiles differ. Over int8 weights a tile has 32 rows of weights at most, so that the instruction is always `mma.sync`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

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
def _widen(weight, dtype: tl.constexpr):
    """Convert int8 to `dtype`, exactly."""
    if dtype == tl.float16:
        # The byte counted from -128 becomes the last digits of 1024: a conversion takes four times a plain instruction
        # on sm_80, and Triton avoids it for bfloat16 alone.
        bits = (weight.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400
        return bits.to(tl.float16, bitcast=True) - 1152
    return weight.to(dtype)


@triton.jit
def _sum_of_parts(acc, partial_ptr, arrivals_ptr, tile, part, PARTS: tl.constexpr):
    """Sum a tile over its parts, and return it with whether this program has to finish it."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_R: tl.constexpr = acc.shape[1]
    at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    first_ptr = partial_ptr + tile.to(tl.int64) * PARTS * BLOCK_N * BLOCK_R
    tl.store(first_ptr + part * BLOCK_N * BLOCK_R + at, acc)
    # All threads store before the counter's release, and load after its acquire.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == PARTS - 1
    tl.debug_barrier()
    if last:
        acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for other in range(PARTS):
            # From the L2 cache, as the L1 cache of this multiprocessor may be older.
            acc += tl.load(first_ptr + other * BLOCK_N * BLOCK_R + at, cache_modifier=".cg")
    return acc, last


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr,
    rows, columns, depth, x_stride, weight_stride_n, weight_stride_k, residual_stride, out_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN_DEPTH: tl.constexpr, PARTS: tl.constexpr, ZEROS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute `columns` of `out` from one tile of weights, for BLOCK_R rows; or a part of the sum over `depth`."""
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
            weight = tl.load(weight_ptrs, mask=in_weight, other=0)  # [BLOCK_N, BLOCK_K]
            x = tl.load(x_ptrs, mask=in_x, other=0.0)  # [BLOCK_K, BLOCK_R]
        else:
            inside = start + tl.arange(0, BLOCK_K) < end
            weight = tl.load(weight_ptrs, mask=in_weight & inside[None, :], other=0)
            x = tl.load(x_ptrs, mask=in_x & inside[:, None], other=0.0)
        if scale_ptr is not None:
            weight = _widen(weight, x.dtype)
        if scale_ptr is not None and x.dtype == tl.float32:
            # to the 11 digits of TF32; the remainder has at most 12
            high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            rest = tl.dot(weight, x - high, input_precision=PRECISION)
            acc += tl.dot(weight, high, rest, input_precision=PRECISION)
        else:
            acc = tl.dot(weight, x, acc, input_precision=PRECISION)
        weight_ptrs += BLOCK_K * weight_stride_k
        x_ptrs += BLOCK_K

    if PARTS > 1:
        acc, last = _sum_of_parts(acc, partial_ptr, arrivals_ptr, row_tile * tiles + tile, part, PARTS)
        if not last:
            return
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + weight_row, mask=column < columns, other=0.0)[:, None]
    if bias_ptr is not None:
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
    """The shape of a launch: weight rows, rows of x and depth of a tile, warps, stages of the pipeline."""

    BLOCK_N: int
    BLOCK_R: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


_FEWEST_COLUMNS = 16  # columns of a matrix instruction, in Triton
# Over int8 weights by bytes of an element of x: up to 64 rows of x, and more. Compiled without spills for sm_80,
# sm_90 and sm_100 (docs/kernels.md), 2026-11. Up to 32 rows, 28 KB of weights are on their way in a program: seven of
# the eight steps of 1024 columns. A type has one BLOCK_K, by which float32's two products alternate.
_INT8_FEW = {2: Tiles(32, 64, 128, 4, 4), 4: Tiles(32, 64, 64, 4, 4)}
_INT8_MANY = {2: Tiles(32, 128, 128, 4, 3), 4: Tiles(32, 128, 64, 4, 3)}
# Sizes that are not multiples of a tile or of 16 take registers for their masks and addresses.
_INT8_ODD = {2: Tiles(32, 32, 64, 4, 4), 4: Tiles(16, 32, 32, 4, 4)}
_FEW_PROGRAMS = 64  # GPUs have more multiprocessors than this: half the tile then makes twice as many programs
# Over weights of the type of x, by bytes of an element and number of rows (up to), 2026-11, compiled without spills for
# sm_80, sm_90 and sm_100 (docs/kernels.md); 2-byte types of many rows measured on an H200. 64 weight rows and more make
# `wgmma`, and a type has one BLOCK_K, so that a row's bits do not depend on the number of rows. Up to 32 rows, 48 KB of
# weights are on their way in each of the 64 programs of a 4096 x 1024 matrix.
_FEW, _BATCH, _MANY = 64, 1024, None
_REGIMES = {
    2: {_FEW: Tiles(64, 64, 64, 8, 6), _BATCH: Tiles(64, 128, 64, 4, 4), _MANY: Tiles(128, 128, 64, 8, 3)},
    4: {_FEW: Tiles(64, 64, 32, 4, 6), _BATCH: Tiles(64, 64, 32, 4, 3), _MANY: Tiles(64, 128, 32, 8, 3)},
}
# Depths that are not multiples of a tile take registers for their masks and addresses.
_ODD = {2: Tiles(64, 64, 64, 8, 4), 4: Tiles(64, 64, 32, 8, 3)}


def _few_rows(tiles: Tiles, rows: int, stages: int) -> Tiles:
    """Return `tiles` with only as many columns as the few rows of x need, and up to 32 with this number of stages."""
    columns = max(triton.next_power_of_2(rows), _FEWEST_COLUMNS)
    return tiles._replace(BLOCK_R=columns, num_stages=stages if columns <= 32 else tiles.num_stages)


def tiles_for(rows: int, columns: int, depth: int, parts: int, element_size: int, int8: bool) -> Tiles:
    """Choose tiles for `columns` results a row from sums over `depth`; a gated result counts as one column.

    element_size: bytes of an element of x.
    """
    if int8:
        return _int8_tiles(rows, columns, depth, parts, element_size)
    regime = next((limit for limit in (_FEW, _BATCH) if rows <= limit), _MANY)
    tiles = _REGIMES[element_size][regime]
    if regime == _FEW:
        return _few_rows(tiles, rows, 7 if element_size == 2 else 6)
    return _ODD[element_size] if depth % (64 * parts) else tiles


def _int8_tiles(rows: int, columns: int, depth: int, parts: int, element_size: int) -> Tiles:
    """Choose tiles over int8 weights, never with 64 rows of weights, which would be `wgmma`."""
    few = _INT8_FEW[element_size]
    if columns % 16 or depth % (few.BLOCK_K * parts):
        return _INT8_ODD[element_size]
    if rows > few.BLOCK_R:
        return _INT8_MANY[element_size]
    tiles = _few_rows(few, rows, 8)
    # More than 32 rows of float32, whose two products begin sums of their own, spill registers at twice the tile.
    crowded = element_size == 4 and tiles.BLOCK_R > 32
    few_programs = triton.cdiv(columns, tiles.BLOCK_N) * parts < _FEW_PROGRAMS
    return tiles._replace(BLOCK_N=16) if crowded or few_programs else tiles


def launch(x, weight, scale, bias, residual, out, partial, arrivals, activation, gated, tiles, parts, zeros):
    """Launch the kernel; `kernels/mlp.py` explains the arguments."""
    (rows, columns), depth = out.shape, x.shape[1]
    programs = triton.cdiv(columns, tiles.BLOCK_N // 2 if gated else tiles.BLOCK_N) * triton.cdiv(rows, tiles.BLOCK_R)
    exact = x.dtype == torch.float32 and scale is None
    _linear_kernel[(programs * parts,)](
        x, weight, scale, bias, residual, out, partial, arrivals,
        rows, columns, depth, x.stride(0), *weight.stride(), 0 if residual is None else residual.stride(0),
        out.stride(0), ACTIVATION=activation, GATED=gated, EVEN_DEPTH=depth % (tiles.BLOCK_K * parts) == 0,
        PARTS=parts, ZEROS=zeros, PRECISION="tf32x3" if exact else "tf32", **tiles._asdict(),
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    *,
    out: torch.Tensor,
) -> None:
    """Write a linear layer, in one launch.

    Args:
        x: `[rows, depth]`, at least one row. Columns at stride 1, in `out` too.
        weight: `[columns, depth]`, of the dtype of `x` or int8, at any strides; fastest with rows contiguous and 16 n
            bytes apart.
        scale: `[columns]` float32, contiguous, only with int8 weights; bias: `[columns]`, contiguous, or None.
        activation: one of `ACTIVATIONS`, `"linear"` for none.
        out: `[rows, columns]` of the dtype of `x`; written.
    """
    tiles = tiles_for(*out.shape, x.shape[1], 1, x.element_size(), weight.dtype == torch.int8)
    launch(x, weight, scale, bias, None, out, None, None, activation, False, tiles, 1, 0)
