"""Attention within the windows of an image, shifted or not (Swin): one kernel, which writes only the result.

    scores = q k^T * scale + bias[head] (+ seam where the shift made strangers neighbours)      within a window
    out    = softmax(scores) v

q, k, v: `[images, height, width, heads, head_dim]` at any strides, mostly views of one projection; out: contiguous.
float16, bfloat16 or float32; scores, softmax and sums in float32; float32 products in three tf32 ones.

As separate steps, the image would be rolled and cut into windows, which reads and writes three tensors, the seam added
to a bias that is repeated for every window, and the result joined and rolled back. Here a window is arithmetic on
addresses: position (y, x) of the window at (top, left) lies at row top + shift + y, which wraps around the edge, and
two positions are strangers if only one of them wrapped. All scores of a window fit into registers, so there is no
online softmax.

Counted for the first stage of CLAP's audio tower and 256 clips (images of 64 x 64, 4 heads of 24, bfloat16): 805 MB
between memory and chip (q, k, v and out, once), 26 GFLOP of products (34 with head_dim padded to 32) and 0.27 G
exponentials: memory bounds it. A window and head is 12 KB, its bias 8 KB, or 16 KB in float32. A program keeps the bias
of one head in registers for up to 16 windows, so that each window reads 0.5 to 1 KB of it from the L2 cache. Programs
of all heads over the same windows are neighbours: the 48 bytes of a head end within a sector, whose other half is then
in the cache.
"""

import math

import torch
import triton
import triton.language as tl

from clvp_fast.kernels.target import multiprocessors

MAX_WINDOW = 8
MAX_HEAD_DIM = 32


@triton.jit
def _load(
    ptr,
    strides,
    row,
    column,
    inside,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Load the channels of the places of a window, [PLACES, DIM_PAD]; zeros outside."""
    channels = tl.arange(0, DIM_PAD)
    place = (row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]) * UNIT
    place = place[:, None] + channels[None, :] * tl.cast(strides[4], tl.int64)
    if WHOLE and HEAD_DIM == DIM_PAD:
        return tl.load(ptr + place)
    elif WHOLE:
        return tl.load(ptr + place, mask=(channels < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(ptr + place, mask=inside[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_windows", "group", "height", "width", "shift", "num_heads"])
def _window_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,  # [heads, WINDOW ** 2, WINDOW ** 2], contiguous
    out_ptr,  # contiguous
    q_strides,  # (image, row, column, head), in steps of UNIT elements, and channel
    k_strides,
    v_strides,
    num_windows,
    group,
    height,
    width,
    shift,
    num_heads,
    scale,
    seam,
    SHIFTED: tl.constexpr,
    WINDOW: tl.constexpr,
    PLACES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    UNIT: tl.constexpr,  # shows the compiler how addresses are aligned
    PRECISION: tl.constexpr,
):
    """Attend in one head of `group` windows, one after another."""
    WHOLE: tl.constexpr = WINDOW * WINDOW == PLACES
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first = tl.program_id(0) // num_heads * group
    place = tl.arange(0, PLACES)
    y, x, inside = place // WINDOW, place % WINDOW, place < WINDOW * WINDOW
    channels = tl.arange(0, DIM_PAD)

    bias_ptr += head * (WINDOW * WINDOW * WINDOW * WINDOW)
    pair = place[:, None] * (WINDOW * WINDOW) + place[None, :]
    if WHOLE:
        bias = tl.load(bias_ptr + pair).to(tl.float32)  # [PLACES, PLACES]
    else:
        bias = tl.load(bias_ptr + pair, mask=inside[:, None] & inside[None, :], other=0.0).to(tl.float32)
        bias = tl.where(inside[None, :], bias, float("-inf"))  # keys that do not exist

    across, down = width // WINDOW, height // WINDOW
    for window in tl.range(first, tl.minimum(first + group, num_windows)):
        image = (window // (across * down)).to(tl.int64)
        row = window // across % down * WINDOW + shift + y
        column = window % across * WINDOW + shift + x
        below, beyond = row >= height, column >= width
        row, column = tl.where(below, row - height, row), tl.where(beyond, column - width, column)

        q_place = (image * q_strides[0] + head * q_strides[3]) * UNIT
        k_place = (image * k_strides[0] + head * k_strides[3]) * UNIT
        v_place = (image * v_strides[0] + head * v_strides[3]) * UNIT
        q = _load(q_ptr + q_place, q_strides, row, column, inside, UNIT, WHOLE, HEAD_DIM, DIM_PAD)
        k = _load(k_ptr + k_place, k_strides, row, column, inside, UNIT, WHOLE, HEAD_DIM, DIM_PAD)
        v = _load(v_ptr + v_place, v_strides, row, column, inside, UNIT, WHOLE, HEAD_DIM, DIM_PAD)

        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale + bias
        if SHIFTED:
            side = below.to(tl.int32) * 2 + beyond.to(tl.int32)
            scores = tl.where(side[:, None] == side[None, :], scores, scores + seam)
        # exp, instead of exp2 of scores scaled before, where a bias that forbids would overflow.
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        share = (1 / tl.sum(weights, 1))[:, None]
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) * share  # [PLACES, DIM_PAD]

        target = ((image * height + row) * width + column) * num_heads + head
        target = target[:, None] * HEAD_DIM + channels[None, :]
        if WHOLE and HEAD_DIM == DIM_PAD:
            tl.store(out_ptr + target, result)
        elif WHOLE:
            tl.store(out_ptr + target, result, mask=(channels < HEAD_DIM)[None, :])
        else:
            tl.store(out_ptr + target, result, mask=inside[:, None] & (channels < HEAD_DIM)[None, :])


# Compiled without a spill for sm_80, sm_90 and sm_100 (2026-11). Float32 operands, split in parts, leave no registers
# for a second stage, nor on sm_80 for heads of 64.
_NUM_WARPS, _STAGES, _STAGES_FLOAT32 = 4, 3, 1
_MOST_WINDOWS = 16  # the most windows of one program
_PROGRAMS = 8  # programs of a multiprocessor, before a program takes several windows


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    window: int,
    shift: int,
    scale: float,
    seam: float,
    *,
    out: torch.Tensor,
) -> None:
    """Write the attention of each place to those of its window.

    Args:
        q, k, v: `[images, height, width, heads, head_dim]`, not empty, head_dim at most `MAX_HEAD_DIM`.
        bias: `[heads, window ** 2, window ** 2]`, contiguous, of any of the dtypes.
        window: rows and columns of a window, at most `MAX_WINDOW`; they divide height and width.
        shift: how much later the windows begin, from 0 to `window - 1`.
        scale, seam: the factor on the scores, and what is added to those across the seam.
        out: as q, contiguous.
    """
    images, height, width, num_heads, head_dim = q.shape
    num_windows = images * (height // window) * (width // window)
    # A window's bits do not depend on its group.
    group = max(1, min(_MOST_WINDOWS, num_windows * num_heads // (_PROGRAMS * multiprocessors())))
    unit = math.gcd(8, *(stride for x in (q, k, v) for stride in x.stride()[:4]))
    strides = ((*(stride // unit for stride in x.stride()[:4]), x.stride(4)) for x in (q, k, v))
    _window_attention[(num_heads * triton.cdiv(num_windows, group),)](
        q, k, v, bias, out, *strides,
        num_windows, group, height, width, shift, num_heads, scale, seam,
        SHIFTED=shift > 0,
        WINDOW=window,
        PLACES=max(16, triton.next_power_of_2(window**2)),
        HEAD_DIM=head_dim,
        DIM_PAD=max(16, triton.next_power_of_2(head_dim)),
        UNIT=unit,
        PRECISION="tf32x3",
        num_warps=_NUM_WARPS,
        num_stages=_STAGES_FLOAT32 if q.dtype == torch.float32 else _STAGES,
    )  # fmt: skip
