"""A decode step's attention over keys and values in pages, with its append; [pages.py](pages.py) describes pages.

    out[n] = softmax(scale * q[n] [K_prefix; K_own]^T) [V_prefix; V_own]  K_own ends with k_new[n], V_own alike

**It is one launch.** A program for own keys has one candidate and head, and at most `SPLIT` of its own keys; the last
one takes the new key and value directly, and stores them, so no program reads their position. Prefix programs have 16
consecutive candidates and walk through their requests, so that grouped candidates share each key that is read; any
other order is also correct. The last program to finish a candidate's head, known by an arrival counter that it resets
to 0, adds the parts in the order of their keys. Tiles and splits do not depend on the batch: a candidate's bits are the
same alone and in any batch.

Own keys are multiplied without the matrix unit, which has 16 rows, while there is only one query. Each of the 32 keys
of a tile has its own online softmax, so that no thread waits for another until the end. On an H200, 256 candidates of
250 own tokens and a prompt of 60, bfloat16, take 81 us where tiles of the matrix unit took 87 and the bytes at the rate
of a copy are 62; float32 144 for 222, float8 66 for 110 (with 128 registers). Slower: 64 keys a tile (88), 128 keys a
part (87), pages with a head's tokens side by side (1 % better). A last own part that waits for the others and adds them
takes 76, but a launch would rely on the order in which programs start.

Heads are the fastest index of the grid: neighbouring programs fetch the rows of a token, which are contiguous over
heads, at the same time. The page numbers of a part are read once, at its start, and stay in registers.

Bytes that must move (counted, 2-byte types, H heads of D): own keys and values once, 4*H*D a token; q, k_new, v_new,
out and the stored token, 12*H*D a candidate; a prefix once from memory, and from the L2 cache once per 16 candidates.
Partial results add 8*H*(D + 2) a part of 256 keys, 0.8 %, half of it read back from the L2 cache. For 256 candidates of
350 own tokens in the mean, 16 heads of 64, and one prefix of 410: 367 MB of own keys and values, 3 MB of rows, 1.7 MB
of prefix (27 MB from the L2 cache).
"""

import torch
import triton
import triton.language as tl

from clvp_fast.kernels.pages import LOG2E, as_stored, online_softmax, precision
from clvp_fast.kernels.target import architecture

NONE = tl.constexpr(2**31 - 1)
# One compiled kernel serves any value of these sizes.
_DECODE_SIZES = [
    "num_candidates",
    "num_requests",
    "num_pages",
    "own_capacity",
    "prefix_capacity",
    "own_splits",
    "prefix_splits",
]


@triton.jit
def _merged(top, total, mixed, other_top, other_total, other_mixed):
    """Merge the softmax over two sets of keys."""
    new_top = tl.maximum(top, other_top)
    origin = tl.where(new_top == -float("inf"), 0.0, new_top)
    shrink = tl.exp2(top - origin)
    other_shrink = tl.exp2(other_top - origin)
    total = total * shrink + other_total * other_shrink
    mixed = mixed * shrink[:, None] + other_mixed * other_shrink[:, None]
    return new_top, total, mixed


@triton.jit
def _prefix(rows, real, places, prefix_index_ptr, prefix_lens_ptr, num_requests, capacity):
    """Return the request of one candidate or of a tile, and the tokens of its prefix: 0 if idle or without one."""
    request = tl.load(prefix_index_ptr + rows, mask=real, other=-1)
    known = (places >= 0) & (request >= 0) & (request < num_requests)
    length = tl.load(prefix_lens_ptr + request, mask=known, other=0)
    return request, tl.minimum(tl.maximum(length, 0), capacity)


@triton.jit
def _listed(table_ptr, begin, end, num_pages, PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """Return the pages of a part, and the end of its keys: `end`, or the first page that does not exist."""
    entries = begin // PAGE_SIZE + tl.arange(0, SPLIT // PAGE_SIZE)
    listed = tl.load(table_ptr + entries, mask=entries * PAGE_SIZE < end, other=0)
    broken = (listed < 0) | (listed >= num_pages)
    return listed, tl.minimum(end, tl.min(tl.where(broken, entries * PAGE_SIZE, NONE)))


@triton.jit
def _sum_of_products(x, y):
    """Sum products over the first axis, the same in every thread that holds the sum.

    If a thread held only one product, the compiler would fuse it into the sum with a neighbour's, which would then
    round differently from the neighbour's own sum.
    """
    return tl.sum(tl.fma(x, y + tl.zeros_like(x), tl.zeros_like(x)), 0)


@triton.jit
def _own_keys(
    q, k_pages_ptr, v_pages_ptr, table_ptr, begin, end, num_pages, scale, page_stride, token_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attend from one query `[BLOCK_D]` to the keys from `begin` on.

    The result is the largest score and sum of weights `[1]`, and weighted values `[1, BLOCK_D]`. Every BLOCK_N-th key
    has its own online softmax, so that lanes are combined only once, at the end.
    """
    dims, tile = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    listed, end = _listed(table_ptr, begin, end, num_pages, PAGE_SIZE, SPLIT)
    # Tiles are whole pages: a key's slot is the same in each of them.
    in_page = (tile % PAGE_SIZE * token_stride)[:, None] + dims[None, :]
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        there = tile < end - start
        page = tl.gather(listed, (start - begin + tile) // PAGE_SIZE, 0)
        at = (page.to(tl.int64) * page_stride)[:, None] + in_page
        there_mask = there[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_pages_ptr + at, mask=there_mask, other=0.0).to(tl.float32)
        v = tl.load(v_pages_ptr + at, mask=there_mask, other=0.0).to(tl.float32)
        scores = tl.where(there, tl.sum(k * q[None, :], 1) * scale, -float("inf"))
        new_top = tl.maximum(top, scores)
        # A lane that has seen no key yet keeps weights of 0, which NaN would replace.
        origin = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights, shrink = tl.exp2(scores - origin), tl.exp2(top - origin)
        total = total * shrink + weights
        mixed = mixed * shrink[:, None] + weights[:, None] * v
        top = new_top
    whole_top = tl.max(top, 0)
    share = tl.exp2(top - tl.where(whole_top == -float("inf"), 0.0, whole_top))
    one = tl.zeros([1], tl.float32)
    return one + whole_top, one + _sum_of_products(total, share), _sum_of_products(mixed, share[:, None])[None, :]


@triton.jit
def _part(
    other, last, own_parts, prefix_parts, own_splits, num_parts, top_ptr, total_ptr, partial_ptr, part_at, dims,
    in_head, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Load one partial result of some rows, which is empty for a row without such a part."""
    filled = last & (other < num_parts)
    filled &= tl.where(other < own_splits, other < own_parts, other - own_splits < prefix_parts)
    mixed_ptr = partial_ptr + other * HEAD_DIM + part_at[:, None] * HEAD_DIM + dims[None, :]
    # From the L2 cache, as the L1 cache of this multiprocessor may be older.
    top = tl.load(top_ptr + other + part_at, mask=filled, other=-float("inf"), cache_modifier=".cg")
    total = tl.load(total_ptr + other + part_at, mask=filled, other=0.0, cache_modifier=".cg")
    mixed = tl.load(mixed_ptr, mask=filled[:, None] & in_head[None, :], other=0.0, cache_modifier=".cg")
    return top, total, mixed


@triton.jit
def _merge_parts(
    last, own_parts, prefix_parts, own_splits, num_parts, top_ptr, total_ptr, partial_ptr, out_ptr, part_at, out_at,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the results of the rows whose `last` part is done, with their parts added in a fixed order."""
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    whole = (
        tl.full([ROWS], -float("inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, BLOCK_D], tl.float32),
    )
    for other in tl.range(0, num_parts, 2, num_stages=1, loop_unroll_factor=1):
        # Two at once, because one load waits for the cache as long as several.
        first = _part(
            other, last, own_parts, prefix_parts, own_splits, num_parts, top_ptr, total_ptr, partial_ptr, part_at, dims,
            in_head, HEAD_DIM,
        )  # fmt: skip
        second = _part(
            other + 1, last, own_parts, prefix_parts, own_splits, num_parts, top_ptr, total_ptr, partial_ptr, part_at,
            dims, in_head, HEAD_DIM,
        )  # fmt: skip
        whole = _merged(*whole, *first)
        whole = _merged(*whole, *second)
    result = whole[2] / tl.where(last, whole[1], 1.0)[:, None]
    tl.store(out_ptr + out_at[:, None] + dims[None, :], result, mask=last[:, None] & in_head[None, :])


@triton.jit
def _own_part(
    row, part, head, q_ptr, k_new_ptr, v_new_ptr, k_pages_ptr, v_pages_ptr, block_table_ptr, seq_lens_ptr,
    prefix_lens_ptr, prefix_index_ptr, k_scale, v_scale, out_ptr, partial_ptr, top_ptr, total_ptr, arrivals_ptr,
    num_requests, num_pages, own_capacity, prefix_capacity, own_splits, num_parts, scale, k_row, k_head, v_row, v_head,
    page_stride, token_stride, own_row,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    ONE_PART: tl.constexpr, FLOAT8: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to one candidate's own keys, or a part of them; the last part takes the new token, and stores it."""
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    place = tl.load(seq_lens_ptr + row)
    own_parts = tl.minimum(tl.minimum(place, own_capacity) // SPLIT + 1, own_splits)
    if (place < 0) & (part == 0):
        tl.store(out_ptr + dims, tl.zeros([BLOCK_D], out_ptr.dtype.element_ty), mask=in_head)
    if (place >= 0) & (part < own_parts):
        q = tl.load(q_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
        table_ptr = block_table_ptr + row.to(tl.int64) * own_row
        begin = part * SPLIT
        end = tl.minimum(tl.minimum(place, own_capacity), begin + SPLIT)
        top, total, mixed = _own_keys(
            q, k_pages_ptr, v_pages_ptr, table_ptr, begin, end, num_pages, scale, page_stride, token_stride,
            HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_N, SPLIT, STAGES,
        )  # fmt: skip
        if part == own_parts - 1:
            # The new token is the last key; no program reads the position where it is stored.
            wide_row = row.to(tl.int64)
            k_new = tl.load(k_new_ptr + wide_row * k_row + head * k_head + dims, mask=in_head, other=0.0)
            v_new = tl.load(v_new_ptr + wide_row * v_row + head * v_head + dims, mask=in_head, other=0.0)
            k_new = as_stored(k_new, k_scale, k_pages_ptr.dtype.element_ty, FLOAT8)
            v_new = as_stored(v_new, v_scale, v_pages_ptr.dtype.element_ty, FLOAT8)
            new_page = tl.load(table_ptr + place // PAGE_SIZE, mask=place < own_capacity, other=-1)
            if (new_page >= 0) & (new_page < num_pages):
                new_at = new_page.to(tl.int64) * page_stride + place % PAGE_SIZE * token_stride
                tl.store(k_pages_ptr + new_at + dims, k_new, mask=in_head)
                tl.store(v_pages_ptr + new_at + dims, v_new, mask=in_head)
            new_score = tl.zeros([1], tl.float32) + _sum_of_products(q, k_new.to(tl.float32)) * scale
            top, total, mixed = _merged(top, total, mixed, new_score, 1.0, v_new.to(tl.float32)[None, :])
        mixed *= v_scale
        if ONE_PART:
            tl.store(out_ptr + dims[None, :], mixed / total[:, None], mask=in_head[None, :])
        else:
            nothing = tl.arange(0, 1)
            tl.store(partial_ptr + part * HEAD_DIM + dims[None, :], mixed, mask=in_head[None, :])
            tl.store(top_ptr + part + nothing, top)
            tl.store(total_ptr + part + nothing, total)
            _request, prefix_length = _prefix(
                row, True, place, prefix_index_ptr, prefix_lens_ptr, num_requests, prefix_capacity
            )
            prefix_parts = tl.cdiv(prefix_length, SPLIT)
            # All threads store before the counter's release, and load after its acquire.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
            tl.debug_barrier()
            if arrived == own_parts + prefix_parts - 1:
                tl.store(arrivals_ptr, 0)
                _merge_parts(
                    nothing == 0, own_parts, prefix_parts, own_splits, num_parts, top_ptr, total_ptr, partial_ptr,
                    out_ptr, nothing, nothing, 1, HEAD_DIM, BLOCK_D,
                )  # fmt: skip


@triton.jit
def _prefix_part(
    first_row, part, begin, q_ptr, k_pages_ptr, v_pages_ptr, seq_lens_ptr, prefix_table_ptr, prefix_lens_ptr,
    prefix_index_ptr, v_scale, out_ptr, partial_ptr, top_ptr, total_ptr, arrivals_ptr, num_candidates, num_requests,
    num_pages, own_capacity, prefix_capacity, own_splits, num_parts, scale, q_row, page_stride, token_stride,
    prefix_row,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from a tile of candidates to the keys from `begin` on of their requests, one after another."""
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    lanes, tile = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    candidates = first_row + lanes
    real = candidates < num_candidates
    places = tl.load(seq_lens_ptr + candidates, mask=real, other=-1)
    own_parts = tl.minimum(tl.minimum(places, own_capacity) // SPLIT + 1, own_splits)
    request, prefix_lengths = _prefix(
        candidates, real, places, prefix_index_ptr, prefix_lens_ptr, num_requests, prefix_capacity
    )
    prefix_parts = tl.cdiv(prefix_lengths, SPLIT)
    # Row i of the tile attends to the keys of this part of request `lists[i]`, or to nothing.
    lists = tl.where(begin < prefix_lengths, request, NONE)
    q_at = (lanes * q_row)[:, None] + dims[None, :]
    part_at = lanes * (NUM_HEADS * num_parts)
    in_page = (tile % PAGE_SIZE * token_stride)[:, None] + dims[None, :]
    current = tl.min(lists)
    while current < NONE:
        chosen = lists == current
        chosen_mask = chosen[:, None] & in_head[None, :]
        end = tl.minimum(tl.minimum(tl.load(prefix_lens_ptr + current), prefix_capacity), begin + SPLIT)
        table_ptr = prefix_table_ptr + current.to(tl.int64) * prefix_row
        listed, end = _listed(table_ptr, begin, end, num_pages, PAGE_SIZE, SPLIT)
        q = tl.load(q_ptr + q_at, mask=chosen_mask, other=0.0)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            there = tile < end - start
            page = tl.gather(listed, (start - begin + tile) // PAGE_SIZE, 0)
            at = (page.to(tl.int64) * page_stride)[:, None] + in_page
            there_mask = there[:, None] & in_head[None, :]
            k = tl.load(k_pages_ptr + at, mask=there_mask, other=0.0).to(q.dtype)
            v = tl.load(v_pages_ptr + at, mask=there_mask, other=0.0).to(q.dtype)
            top, total, mixed = online_softmax(q, tl.trans(k), v, there[None, :], scale, top, total, mixed, PRECISION)
        mixed_at = part_at[:, None] * HEAD_DIM + dims[None, :]
        tl.store(partial_ptr + part * HEAD_DIM + mixed_at, mixed * v_scale, mask=chosen_mask)
        tl.store(top_ptr + part + part_at, top, mask=chosen)
        tl.store(total_ptr + part + part_at, total, mask=chosen)
        current = tl.min(tl.where(lists > current, lists, NONE))
    works = lists != NONE
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + lanes * NUM_HEADS, 1, mask=works, sem="acq_rel")
    last = works & (arrived == own_parts + prefix_parts - 1)
    if tl.max(last.to(tl.int32)) > 0:
        tl.debug_barrier()
        tl.store(arrivals_ptr + lanes * NUM_HEADS, 0, mask=last)
        _merge_parts(
            last, own_parts, prefix_parts, own_splits, num_parts, top_ptr, total_ptr, partial_ptr, out_ptr,
            part_at, lanes * (NUM_HEADS * HEAD_DIM), BLOCK_M, HEAD_DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=_DECODE_SIZES)
def paged_attention_decode_kernel(
    q_ptr, k_new_ptr, v_new_ptr, k_pages_ptr, v_pages_ptr, block_table_ptr, seq_lens_ptr, prefix_table_ptr,
    prefix_lens_ptr, prefix_index_ptr, k_scale_ptr, v_scale_ptr, out_ptr, partial_ptr, arrivals_ptr, num_candidates,
    # Capacities are tokens that a row of a table has room for.
    num_requests, num_pages, own_capacity, prefix_capacity, own_splits, prefix_splits, scale, q_row, q_head, k_row,
    k_head, v_row, v_head, page_stride, token_stride, head_stride, own_row, prefix_row,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, ONE_PART: tl.constexpr, FLOAT8: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    num_parts = own_splits + prefix_splits
    head = tl.program_id(0) % NUM_HEADS
    work = tl.program_id(0) // NUM_HEADS
    k_scale, v_scale = 1.0, 1.0
    if FLOAT8:
        k_scale, v_scale = tl.load(k_scale_ptr + head), tl.load(v_scale_ptr + head)
        scale *= k_scale
    k_pages_ptr += head * head_stride
    v_pages_ptr += head * head_stride
    prefix_works = tl.cdiv(num_candidates, BLOCK_M) * prefix_splits
    own = work >= prefix_works
    prefix_splits = tl.maximum(prefix_splits, 1)  # a divisor
    first_row = tl.where(own, (work - prefix_works) // own_splits, work // prefix_splits * BLOCK_M)
    # The first row takes 64 bits, the offsets of a tile's rows from it 32.
    counter = first_row.to(tl.int64) * NUM_HEADS + head
    q_ptr += first_row.to(tl.int64) * q_row + head * q_head
    out_ptr += counter * HEAD_DIM
    arrivals_ptr += counter
    # [num_candidates, heads, num_parts] rows of head_dim values, then their largest scores, then their sums.
    all_parts = num_candidates.to(tl.int64) * NUM_HEADS * num_parts
    top_ptr = partial_ptr + all_parts * HEAD_DIM + counter * num_parts
    total_ptr = top_ptr + all_parts
    partial_ptr += counter * num_parts * HEAD_DIM

    if own:
        _own_part(
            first_row, (work - prefix_works) % own_splits, head, q_ptr, k_new_ptr, v_new_ptr, k_pages_ptr, v_pages_ptr,
            block_table_ptr, seq_lens_ptr, prefix_lens_ptr, prefix_index_ptr, k_scale, v_scale, out_ptr, partial_ptr,
            top_ptr, total_ptr, arrivals_ptr, num_requests, num_pages, own_capacity, prefix_capacity, own_splits,
            num_parts, scale, k_row, k_head, v_row, v_head, page_stride, token_stride, own_row,
            HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_N, SPLIT, ONE_PART, FLOAT8, STAGES,
        )  # fmt: skip
    else:
        split = work % prefix_splits
        _prefix_part(
            first_row, own_splits + split, split * SPLIT, q_ptr, k_pages_ptr, v_pages_ptr, seq_lens_ptr,
            prefix_table_ptr, prefix_lens_ptr, prefix_index_ptr, v_scale, out_ptr, partial_ptr, top_ptr, total_ptr,
            arrivals_ptr, num_candidates, num_requests, num_pages, own_capacity, prefix_capacity, own_splits, num_parts,
            scale, q_row, page_stride, token_stride, prefix_row,
            NUM_HEADS, HEAD_DIM, BLOCK_D, PAGE_SIZE, BLOCK_M, BLOCK_N, SPLIT, PRECISION,
        )  # fmt: skip


# The most keys of one program of a decode step: a part of the numerics, and so one for all types and devices.
SPLIT = 256
# Measured on an H200 for 64 channels. With triton 3.7.1 no register is spilled on sm_80, sm_90 and sm_100; with 3.6.0
# two are, of 16-bit types on sm_90 (as it was measured) and of bfloat16 on sm_80.
# (bytes of an element of q, channels of a tile): keys of a tile, warps, stages, registers of a thread at most on sm_90.
# With fewer registers more programs fit on a multiprocessor, and hide one another's waits.
_DECODE = {
    (2, 32): (32, 1, 3, None),
    (2, 64): (32, 2, 3, 128),
    (2, 128): (32, 4, 3, None),
    (4, 32): (32, 1, 3, None),
    (4, 64): (32, 2, 3, None),
    (4, 128): (32, 4, 3, None),
}
_MORE_REGISTERS = 144  # the registers that float8 and pages of 32 need


def splits(tokens: int) -> int:
    """Return the number of programs that share the keys of a page table of `tokens` slots."""
    return triton.cdiv(tokens, SPLIT)


def parts(own_tokens: int, prefix_tokens: int) -> int:
    """Return the most partial results of a candidate's head, for tables of so many slots (no prefix: 0)."""
    return max(splits(own_tokens), 1) + splits(prefix_tokens)


def paged_attention_decode(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    prefix_table: torch.Tensor | None,
    prefix_lens: torch.Tensor | None,
    prefix_index: torch.Tensor | None,
    scale: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    *,
    out: torch.Tensor,
    partial: torch.Tensor,
    arrivals: torch.Tensor,
) -> None:
    """Append and attend, as `clvp_fast.ops.paged_attention_decode`; the last dimension of everything is contiguous.

    `out` `[N, H, D]` contiguous. Where `parts(...)` of the two tables is above 1, `partial` has at least
    `N * H * parts * (D + 2)` float32, and `arrivals` `[N, H]` int32 zeros, which are zeros again afterwards.
    """
    num_candidates, num_heads, head_dim = q.shape
    num_pages, page_size = k_pages.shape[:2]
    block_d = triton.next_power_of_2(head_dim)
    block_n, num_warps, num_stages, registers = _DECODE[q.element_size(), block_d]
    if architecture() // 10 != 9:
        registers = None
    elif registers is not None and (k_scale is not None or page_size > 16):
        registers = _MORE_REGISTERS
    own_capacity = block_table.shape[1] * page_size
    prefix_capacity, num_requests, prefix_row = 0, 0, 0
    if prefix_table is not None:
        num_requests, prefix_row = prefix_table.shape[0], prefix_table.stride(0)
        prefix_capacity = prefix_table.shape[1] * page_size
    own_splits, prefix_splits = max(splits(own_capacity), 1), splits(prefix_capacity)
    rows = 16
    works = num_candidates * own_splits + triton.cdiv(num_candidates, rows) * prefix_splits
    paged_attention_decode_kernel[(works * num_heads,)](
        q, k_new, v_new, k_pages, v_pages, block_table, seq_lens,
        # Without requests no prefix is looked up, so any other tables can be passed here.
        block_table if prefix_table is None else prefix_table, seq_lens if prefix_lens is None else prefix_lens,
        seq_lens if prefix_index is None else prefix_index, k_scale, v_scale, out, partial, arrivals,
        num_candidates, num_requests, num_pages, own_capacity, prefix_capacity, own_splits, prefix_splits,
        scale * LOG2E, *q.stride()[:2], *k_new.stride()[:2], *v_new.stride()[:2], *k_pages.stride()[:3],
        block_table.stride(0), prefix_row,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, PAGE_SIZE=page_size, BLOCK_M=rows, BLOCK_N=block_n,
        SPLIT=SPLIT, ONE_PART=own_splits + prefix_splits == 1, FLOAT8=k_scale is not None,
        PRECISION=precision(q.dtype), STAGES=num_stages, num_warps=num_warps, num_stages=num_stages,
        maxnreg=registers,
    )  # fmt: skip
