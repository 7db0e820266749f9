"""Prefill of pages: causal attention within each sequence of a ragged batch, whose keys and values are stored from
position 0 on; [pages.py](pages.py) describes pages.

It is one launch. A program is a tile of 64 queries of one head (wgmma on sm_90; 32 in float32 from 64 channels
on). It attends to the keys of its sequence up to the diagonal, straight from q, k and v, and stores the keys and values
of its own rows. Sequence s has the tiles from number `cu_seqlens[s] // 64 + s`, which a program finds on the device: at
most one program per sequence and head has no work, and the host need not know any length. The longest tiles of a
sequence start first.
"""

import torch
import triton
import triton.language as tl

from clvp_fast.kernels.pages import LOG2E, as_stored, online_softmax, precision

# One compiled kernel serves any value of these sizes.
_SIZES = ["num_tokens", "num_sequences", "num_slots", "num_pages", "capacity"]


@triton.jit(do_not_specialize=_SIZES)
def paged_prefill_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, k_pages_ptr, v_pages_ptr, block_table_ptr, k_scale_ptr, v_scale_ptr,
    out_ptr, num_tokens, num_sequences, num_slots, num_pages, capacity, scale, q_row, q_head, k_row, k_head, v_row,
    v_head, page_stride, token_stride, head_stride, table_row,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLOAT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % NUM_HEADS
    slot = num_slots - 1 - tl.program_id(0) // NUM_HEADS
    found = 0
    for first in range(0, num_sequences, 128):
        sequences = first + tl.arange(0, 128)
        starts = tl.load(cu_seqlens_ptr + sequences, mask=sequences < num_sequences, other=0)
        found += tl.sum(((sequences < num_sequences) & (starts // BLOCK_M + sequences <= slot)).to(tl.int32))
    if found == 0:
        return
    sequence = found - 1
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), num_tokens) - start
    first = (slot - start // BLOCK_M - sequence) * BLOCK_M
    if (first < 0) | (first >= length) | (start < 0):
        return

    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    places = first + tl.arange(0, BLOCK_M)
    rows = (start + places).to(tl.int64)
    row_mask = (places < length)[:, None] & in_head[None, :]
    q = tl.load(q_ptr + rows[:, None] * q_row + head * q_head + dims[None, :], mask=row_mask, other=0.0)
    k_ptr += start.to(tl.int64) * k_row + head * k_head
    v_ptr += start.to(tl.int64) * v_row + head * v_head

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in range(0, tl.minimum(first + BLOCK_M, length), BLOCK_N):
        keys = key + tl.arange(0, BLOCK_N)
        in_sequence = keys < length
        k_at = keys.to(tl.int64) * k_row
        v_at = keys.to(tl.int64) * v_row
        k = tl.load(k_ptr + k_at[None, :] + dims[:, None], mask=in_sequence[None, :] & in_head[:, None], other=0.0)
        v = tl.load(v_ptr + v_at[:, None] + dims[None, :], mask=in_sequence[:, None] & in_head[None, :], other=0.0)
        # Rows past the end of the sequence see its last key: their results are not stored, but must be finite.
        allowed = (keys[None, :] <= places[:, None]) & in_sequence[None, :]
        top, total, mixed = online_softmax(q, k, v, allowed, scale, top, total, mixed, PRECISION)
    out_at = (rows * NUM_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_at, mixed / total[:, None], mask=row_mask)

    if FLOAT8:
        k_scale = tl.load(k_scale_ptr + head)
        v_scale = tl.load(v_scale_ptr + head)
    else:
        k_scale = 1.0
        v_scale = 1.0
    stored = (places < length) & (places < capacity)
    table_ptr = block_table_ptr + sequence.to(tl.int64) * table_row
    page = tl.load(table_ptr + places // PAGE_SIZE, mask=stored, other=-1)
    page_mask = ((page >= 0) & (page < num_pages))[:, None] & in_head[None, :]
    k = tl.load(k_ptr + places.to(tl.int64)[:, None] * k_row + dims[None, :], mask=page_mask, other=0.0)
    v = tl.load(v_ptr + places.to(tl.int64)[:, None] * v_row + dims[None, :], mask=page_mask, other=0.0)
    at = (page.to(tl.int64) * page_stride + places % PAGE_SIZE * token_stride + head * head_stride)[:, None] + dims[
        None, :
    ]
    k = as_stored(k, k_scale, k_pages_ptr.dtype.element_ty, FLOAT8)
    v = as_stored(v, v_scale, v_pages_ptr.dtype.element_ty, FLOAT8)
    tl.store(k_pages_ptr + at, k, mask=page_mask)
    tl.store(v_pages_ptr + at, v, mask=page_mask)


# Chosen by compiling without spilled registers for sm_80, sm_90 and sm_100, with triton 3.6.0 and 3.7.1, not by timing.
# Queries of a tile (64 rows are one wgmma), keys of a tile, warps, stages:
_TILES = {
    (2, 32): (64, 64, 4, 3),
    (2, 64): (64, 64, 4, 3),
    (2, 128): (64, 64, 8, 3),
    (4, 32): (64, 32, 4, 2),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (16, 32, 4, 2),
}


def paged_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    *,
    out: torch.Tensor,
) -> None:
    """Attend causally and store, as `clvp_fast.ops.paged_prefill`; the last dimension of everything is contiguous.

    `out` `[T, H, D]` contiguous.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size = k_pages.shape[:2]
    num_sequences = block_table.shape[0]
    block_d = triton.next_power_of_2(head_dim)
    block_m, block_n, num_warps, num_stages = _TILES[q.element_size(), block_d]
    num_slots = num_tokens // block_m + num_sequences
    paged_prefill_kernel[(num_slots * num_heads,)](
        q, k, v, cu_seqlens, k_pages, v_pages, block_table, k_scale, v_scale, out, num_tokens, num_sequences,
        num_slots, num_pages, block_table.shape[1] * page_size, scale * LOG2E, *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2], *k_pages.stride()[:3], block_table.stride(0),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE_SIZE=page_size, BLOCK_M=block_m,
        BLOCK_N=block_n, FLOAT8=k_scale is not None,
        PRECISION=precision(q.dtype), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
