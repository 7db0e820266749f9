"""Residual addition and normalisation of rows, in one pass over memory.

    total = x + residual                                                rounded to the dtype of the residual
    rms:    out = weight * (total * rsqrt(mean(total^2) + eps))         the bracket rounded to the dtype of total
    layer:  out = (total - mean) * rsqrt(mean((total - mean)^2) + eps) * weight + bias
    double: first = layer(x), out = layer(first)                        first rounded to the dtype of x

x, residual, total, first, out: `[rows, width]`, a row's elements side by side, rows at any stride; weight, bias:
`[width]`; float32, float16 or bfloat16. A residual may be wider than x, and out of any of the three. Statistics and
arithmetic are float32.

Moved: x and residual once in, total and out once out; a separate addition would move five rows for the three or four of
here. A program holds its rows in registers, so the variance is computed from the centred values, in a second reduction
that reads no memory: nothing cancels, however large the mean. The norm is that of the rounded sum, which the next layer
sees too.

Few rows (a decode step) are a launch's latency and two reductions; many rows are bound by memory: 128 threads hold 16
bytes each of a row of 1024 half-precision elements, and up to 16 such programs lie on a multiprocessor.

Patch merging's norm reads a row as four neighbours of an image, where they lie: with a separate merge, the image would
be read and written twice instead of once.
"""

import torch
import triton
import triton.language as tl

MAX_WIDTH = 8192

# (BLOCK_C up to, elements of a program, num_warps), 2026-11: 8 elements a thread up to 1024 wide, 16 above. The tile
# depends only on the width, so that a row's bits do not depend on the number of rows.
_TILES = ((1024, 1024, 4), (2048, 2048, 4), (4096, 4096, 8), (8192, 8192, 16))
_MAX_ROWS = 16  # the most rows of one program, if rows are short


@triton.jit
def _layer_norm(x, inside, weight, bias, eps, width):
    """Norm the rows of a float32 tile whose columns outside are 0."""
    # Correctly rounded, unlike `/` on a GPU, so that the mean of a constant row is its number, and its norm the bias.
    count = tl.cast(width, tl.float32)
    mean = tl.div_rn(tl.sum(x, 1), count)
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.div_rn(tl.sum(centred * centred, 1), count) + eps)
    return centred * scale[:, None] * weight + bias


@triton.jit
def _affine(weight_ptr, bias_ptr, columns, width):
    """Load weight and bias (0 where there is none) as float32 [1, BLOCK_C]."""
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is None:
        bias = tl.zeros_like(weight)
    else:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return weight[None, :], bias[None, :]


@triton.jit(do_not_specialize=["rows"])
def _add_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, total_ptr, out_ptr,
    rows, width, x_stride, residual_stride, total_stride, out_stride, eps,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_C)
    inside = (row < rows) & (columns < width)[None, :]
    weight, bias = _affine(weight_ptr, bias_ptr, columns, width)

    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)  # [ROWS, BLOCK_C]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(total_ptr + row * total_stride + columns, x, mask=inside)
    dtype = x.dtype
    x = x.to(tl.float32)
    if RMS:
        normed = x * tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        normed = weight * normed.to(dtype).to(tl.float32)
    else:
        normed = _layer_norm(x, inside, weight, bias, eps, width)
    tl.store(out_ptr + row * out_stride + columns, normed, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _double_layer_norm_kernel(
    x_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, first_ptr, out_ptr,
    rows, width, x_stride, first_stride, out_stride, eps1, eps2,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_C)
    inside = (row < rows) & (columns < width)[None, :]

    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)  # [ROWS, BLOCK_C]
    weight, bias = _affine(weight1_ptr, bias1_ptr, columns, width)
    first = _layer_norm(x.to(tl.float32), inside, weight, bias, eps1, width).to(x.dtype)
    tl.store(first_ptr + row * first_stride + columns, first, mask=inside)
    weight, bias = _affine(weight2_ptr, bias2_ptr, columns, width)
    normed = _layer_norm(first.to(tl.float32), inside, weight, bias, eps2, width)
    tl.store(out_ptr + row * out_stride + columns, normed, mask=inside)


@triton.jit(do_not_specialize=["rows", "height", "image_width", "down", "across"])
def _merge_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    rows, height, image_width, down, across, x_strides, eps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK_C)
    inside = (row < rows) & (columns < 4 * CHANNELS)[None, :]
    corner, channel = columns // CHANNELS, columns % CHANNELS
    y = row // across % down * 2 + (corner % 2)[None, :]
    x = row % across * 2 + (corner // 2)[None, :]
    image = (row // (down * across)).to(tl.int64)
    place = image * x_strides[0] + y.to(tl.int64) * x_strides[1] + x.to(tl.int64) * x_strides[2] + channel[None, :]
    merged = tl.load(x_ptr + place, mask=inside & (y < height) & (x < image_width), other=0.0)  # [ROWS, BLOCK_C]
    weight, bias = _affine(weight_ptr, bias_ptr, columns, 4 * CHANNELS)
    normed = _layer_norm(merged.to(tl.float32), inside, weight, bias, eps, 4 * CHANNELS)
    tl.store(out_ptr + row.to(tl.int64) * (4 * CHANNELS) + columns, normed, mask=inside)


def _tile(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the constants of a launch."""
    block = triton.next_power_of_2(width)
    elements, num_warps = next((elements, warps) for limit, elements, warps in _TILES if block <= limit)
    rows_of_program = min(elements // block, _MAX_ROWS)
    return (triton.cdiv(rows, rows_of_program),), {"ROWS": rows_of_program, "BLOCK_C": block, "num_warps": num_warps}


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    *,
    total: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the sum and its norm.

    Args:
        x: `[rows, width]`, at least one row, 1 to `MAX_WIDTH` wide, columns at stride 1.
        residual, total: as `x`, of the dtype of the sum; None together.
        weight, bias: `[width]`, contiguous; no bias with `kind="rms"`.
        kind: `"rms"` or `"layer"`.
        out: as `x`; of any of the dtypes.
    """
    rows, width = x.shape
    grid, tile = _tile(rows, width)
    _add_norm_kernel[grid](
        x, residual, weight, bias, total, out,
        rows, width, x.stride(0), 0 if residual is None else residual.stride(0),
        0 if total is None else total.stride(0), out.stride(0), eps, RMS=kind == "rms", **tile,
    )  # fmt: skip


def double_layer_norm(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    eps1: float,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    eps2: float,
    *,
    first: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the layer norm of `x`, of its dtype, and the layer norm of that; arguments as those of `add_norm`."""
    rows, width = x.shape
    grid, tile = _tile(rows, width)
    _double_layer_norm_kernel[grid](
        x, weight1, bias1, weight2, bias2, first, out,
        rows, width, x.stride(0), first.stride(0), out.stride(0), eps1, eps2, **tile,
    )  # fmt: skip


def merge_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, *, out: torch.Tensor
) -> None:
    """Write the layer norm of each two by two neighbours of an image, some of which may lie past its end.

    Args:
        x: `[images, height, width, channels]`, not empty, channels at stride 1 and at most `MAX_WIDTH / 4`.
        weight, bias: `[4 * channels]`, contiguous, in the order of columns, then rows; bias may be None.
        out: `[images, ceil(height / 2), ceil(width / 2), 4 * channels]`, contiguous.
    """
    _, height, width, channels = x.shape
    images, down, across, _ = out.shape
    rows = images * down * across
    grid, tile = _tile(rows, 4 * channels)
    _merge_norm_kernel[grid](
        x, weight, bias, out, rows, height, width, down, across, x.stride()[:3], eps, CHANNELS=channels, **tile
    )
