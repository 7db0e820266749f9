"""Attention that rotates queries, keys and values while it loads them: one kernel, which writes only the result.

    x' = [x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2, x_rest]      for x in q, k, v, by channels
    out = softmax(scale * q' k'^T + mask) v'

x_1 and x_2 are the two halves of the rotary channels, x_rest the others. float16, bfloat16 or float32 in and out; the
rotation, the softmax and all sums in float32; float32 products in three tf32 ones.

A separate rotation would read and write q, k and v once more. Here it happens between shared memory and the products:
the asynchronous copies of a pipelined loop bring tiles of k, v and the angles, only the rotary channels pass through
registers, and the others go from the copy straight into the product. Rotated and other channels are separate operands,
whose products are added: nothing is gathered.

Counted for 256 sequences of 500, 12 heads of 64 with 32 turning, bfloat16: 197 GFLOP of products, 0.77 G exponentials,
786 MB between memory and chip (q, k, v and out, once). A program has 128 queries and meets all keys of its head: 128 KB
of k and v from the L2 cache, and 128 KB of angles, or 64 KB if both halves share them; 3.1 or 2.4 GB in all. Each key
and value is rotated four times, once for every 128 queries: 0.6 % of the products' operations, on other units.
"""

import torch
import triton
import triton.language as tl

from clvp_fast.kernels.target import architecture

LOG2E = tl.constexpr(1.4426950408889634)
# The score of a key that a query may not attend to. It is finite, so that a query that may attend to no key weighs all
# keys equally. The score of a key that does not exist is -inf.
FORBIDDEN = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _load(ptr, strides, rows, num_rows, BOUNDED: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr):
    """Load COUNT channels from `ptr` on of some rows, [rows, PAD]; zeros outside."""
    channels = tl.arange(0, PAD)
    place = rows.to(tl.int64)[:, None] * strides[0] + channels[None, :] * tl.cast(strides[1], tl.int64)
    if BOUNDED and COUNT < PAD:
        return tl.load(ptr + place, mask=(rows < num_rows)[:, None] & (channels < COUNT)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(ptr + place, mask=(rows < num_rows)[:, None], other=0.0)
    elif COUNT < PAD:
        return tl.load(ptr + place, mask=(channels < COUNT)[None, :], other=0.0)
    else:
        return tl.load(ptr + place)


@triton.jit
def _angles(
    ptr, strides, rows, num_rows, BOUNDED: tl.constexpr, TABLES: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr
):
    """Load cosines, or sines, of both halves of the rotary channels, each [rows, PAD]."""
    first = _load(ptr, strides, rows, num_rows, BOUNDED, HALF, PAD).to(tl.float32)
    if TABLES == 1:
        return first, first
    else:
        second = _load(ptr + HALF * strides[1], strides, rows, num_rows, BOUNDED, HALF, PAD).to(tl.float32)
        return first, second


@triton.jit
def _turned(ptr, strides, rows, num_rows, cos, sin, BOUNDED: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr):
    """Rotate the rotary channels in float32 and round them: [rows, 2 * PAD], of each half HALF and then zeros."""
    first = _load(ptr, strides, rows, num_rows, BOUNDED, HALF, PAD)
    second = _load(ptr + HALF * strides[1], strides, rows, num_rows, BOUNDED, HALF, PAD)
    x, y = first.to(tl.float32), second.to(tl.float32)
    turned = tl.join((x * cos[0] - y * sin[0]).to(first.dtype), (y * cos[1] + x * sin[1]).to(first.dtype))
    turned = tl.reshape(tl.permute(turned, (0, 2, 1)), (rows.shape[0], 2 * PAD, 1))
    # A sum of one term stops the compiler from loading and rotating in the layout of a product's operand, in which
    # every warp would do the work of all.
    return tl.sum(turned, 2)


@triton.jit
def _attend(
    state,
    start,
    queries,
    rows,
    inputs,
    strides,
    lengths,
    scale,
    ADDITIVE: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TABLES: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Do one step of the online softmax, over the keys from `start` on; EDGE: the end or the diagonal may cut them."""
    acc_turned, acc_rest, total, highest = state
    k_ptr, v_ptr, cos_ptr, sin_ptr, mask_ptr = inputs
    q_len, k_len, query_offset = lengths
    keys = tl.arange(0, BLOCK_N)
    left = k_len - start
    begin = tl.cast(start, tl.int64)
    k_ptr += begin * strides[0][0]
    v_ptr += begin * strides[1][0]
    if HALF > 0:
        cos = _angles(cos_ptr + begin * strides[2][0], strides[2], keys, left, EDGE, TABLES, HALF, HALF_PAD)
        sin = _angles(sin_ptr + begin * strides[3][0], strides[3], keys, left, EDGE, TABLES, HALF, HALF_PAD)
        k_turned = _turned(k_ptr, strides[0], keys, left, cos, sin, EDGE, HALF, HALF_PAD)
        scores = tl.dot(queries[0], k_turned.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if REST > 0:
        k_rest = _load(k_ptr + 2 * HALF * strides[0][1], strides[0], keys, left, EDGE, REST, REST_PAD)
        if HALF > 0:
            scores = tl.dot(queries[1], k_rest.T, scores, input_precision=PRECISION)
        else:
            scores = tl.dot(queries[1], k_rest.T, input_precision=PRECISION)

    allowed = (keys < left)[None, :]
    seen = allowed
    if EDGE and CAUSAL:
        seen = allowed & (start + keys[None, :] <= query_offset + rows[:, None])
    if mask_ptr is None:
        if EDGE:
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new[:, None])
        decay = tl.exp2(highest - new)
    else:
        mask_ptr += begin * strides[4][1]
        place = keys[None, :] * tl.cast(strides[4][1], tl.int64)
        inside = allowed
        if MASK_ROWS:
            place += rows.to(tl.int64)[:, None] * strides[4][0]
            inside = allowed & (rows < q_len)[:, None]
        if ADDITIVE:
            bias = tl.load(mask_ptr + place, mask=inside, other=0.0).to(tl.float32)
        else:
            bias = tl.where(tl.load(mask_ptr + place, mask=inside, other=1), 0.0, FORBIDDEN)
        scores = scores * scale + bias
        if EDGE:
            scores = tl.where(seen, scores, tl.where(allowed, FORBIDDEN, float("-inf")))
        new = tl.maximum(highest, tl.max(scores, 1))
        if ADDITIVE:
            weights = tl.exp(scores - new[:, None])
            decay = tl.exp(highest - new)
        else:
            weights = tl.exp2(scores - new[:, None])
            decay = tl.exp2(highest - new)
    total = total * decay + tl.sum(weights, 1)

    # The product that waits for its operand's rotation comes last, because products in flight end with it.
    weights = weights.to(v_ptr.dtype.element_ty)
    if REST > 0:
        v_rest = _load(v_ptr + 2 * HALF * strides[1][1], strides[1], keys, left, EDGE, REST, REST_PAD)
        acc_rest = tl.dot(weights, v_rest, acc_rest * decay[:, None], input_precision=PRECISION)
    if HALF > 0:
        v_turned = _turned(v_ptr, strides[1], keys, left, cos, sin, EDGE, HALF, HALF_PAD)
        acc_turned = tl.dot(weights, v_turned, acc_turned * decay[:, None], input_precision=PRECISION)
    return acc_turned, acc_rest, total, new


@triton.jit(do_not_specialize=["q_len", "k_len", "query_offset", "num_tiles", "num_heads"])
def _rotary_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,  # None: no rotation
    sin_ptr,
    mask_ptr,  # None: all keys are allowed
    cu_seqlens_ptr,  # None: sequences of one length
    out_ptr,  # contiguous
    q_strides,  # (sequence, row, head, channel), as those of k and v
    k_strides,
    v_strides,
    cos_strides,  # (sequence, key, channel)
    sin_strides,
    mask_strides,  # (sequence, query, key)
    q_len,
    k_len,
    query_offset,
    scale,
    num_tiles,
    num_heads,
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TABLES: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,  # float32 queries into two tf32 parts at every step: at once they do not fit into registers
):
    """Attend from BLOCK_M queries of one head of one sequence. Programs with most keys go first."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    head = (tl.program_id(0) // num_tiles % num_heads).to(tl.int64)
    sequence = (tl.program_id(0) // num_tiles // num_heads).to(tl.int64)
    if cu_seqlens_ptr is None:
        out_ptr += sequence * q_len * num_heads * HEAD_DIM
    else:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        q_len = (tl.load(cu_seqlens_ptr + sequence + 1) - first).to(tl.int32)
        k_len = q_len
        if tile * BLOCK_M >= q_len:
            return
        q_ptr += first * q_strides[1]
        k_ptr += first * k_strides[1]
        v_ptr += first * v_strides[1]
        out_ptr += first * num_heads * HEAD_DIM
    q_ptr += sequence * q_strides[0] + head * q_strides[2]
    k_ptr += sequence * k_strides[0] + head * k_strides[2]
    v_ptr += sequence * v_strides[0] + head * v_strides[2]
    out_ptr += head * HEAD_DIM
    if HALF > 0:
        cos_ptr += sequence * cos_strides[0]
        sin_ptr += sequence * sin_strides[0]
    if mask_ptr is not None:
        mask_ptr += sequence * mask_strides[0]
    inputs = (k_ptr, v_ptr, cos_ptr, sin_ptr, mask_ptr)
    strides = (
        (k_strides[1], k_strides[3]),
        (v_strides[1], v_strides[3]),
        (cos_strides[1], cos_strides[2]),
        (sin_strides[1], sin_strides[2]),
        (mask_strides[1], mask_strides[2]),
    )
    lengths = (q_len, k_len, query_offset)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # If all channels rotate, or none does, the other part is a dummy that nothing reads.
    q_turned, acc_turned = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    q_rest, acc_rest = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    row_strides = (q_strides[1], q_strides[3])
    if HALF > 0:
        places = query_offset + rows
        cos = _angles(cos_ptr, strides[2], places, k_len, True, TABLES, HALF, HALF_PAD)
        sin = _angles(sin_ptr, strides[3], places, k_len, True, TABLES, HALF, HALF_PAD)
        q_turned = _turned(q_ptr, row_strides, rows, q_len, cos, sin, True, HALF, HALF_PAD)
        acc_turned = tl.zeros([BLOCK_M, 2 * HALF_PAD], tl.float32)
    if REST > 0:
        q_rest = _load(q_ptr + 2 * HALF * q_strides[3], row_strides, rows, q_len, True, REST, REST_PAD)
        acc_rest = tl.zeros([BLOCK_M, REST_PAD], tl.float32)
    queries = (q_turned, q_rest)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], FORBIDDEN, tl.float32)
    state = (acc_turned, acc_rest, total, highest)
    if not ADDITIVE:  # an additive mask would overflow
        scale *= LOG2E

    # First the keys that the end or the diagonal cuts, then whole tiles. (In this order, and with the first loop not
    # pipelined, ptxas can leave products in flight; in the other order it waits for each one.)
    whole, end = k_len // BLOCK_N * BLOCK_N, k_len
    if CAUSAL:
        whole = tl.minimum(whole, (query_offset + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N)
        end = tl.minimum(k_len, query_offset + tile * BLOCK_M + BLOCK_M)
    for start in tl.range(whole, end, BLOCK_N, num_stages=1, disable_licm=SPLIT):
        state = _attend(
            state, start, queries, rows, inputs, strides, lengths, scale,
            ADDITIVE, MASK_ROWS, True, CAUSAL, TABLES, HALF, HALF_PAD, REST, REST_PAD, BLOCK_N, PRECISION,
        )  # fmt: skip
    for start in tl.range(0, whole, BLOCK_N, disable_licm=SPLIT):
        state = _attend(
            state, start, queries, rows, inputs, strides, lengths, scale,
            ADDITIVE, MASK_ROWS, False, CAUSAL, TABLES, HALF, HALF_PAD, REST, REST_PAD, BLOCK_N, PRECISION,
        )  # fmt: skip
    if CAUSAL and mask_ptr is not None:
        # A query without keys weighs the keys after it too.
        later = tl.cdiv(end, BLOCK_N) * BLOCK_N
        for start in tl.range(
            later, tl.where(tl.min(state[3], 0) > FORBIDDEN, later, k_len), BLOCK_N, num_stages=1, disable_licm=SPLIT
        ):
            state = _attend(
                state, start, queries, rows, inputs, strides, lengths, scale,
                ADDITIVE, MASK_ROWS, True, CAUSAL, TABLES, HALF, HALF_PAD, REST, REST_PAD, BLOCK_N, PRECISION,
            )  # fmt: skip

    acc_turned, acc_rest, total, highest = state
    share = (1 / total)[:, None]
    out_ptr += rows.to(tl.int64)[:, None] * (num_heads * HEAD_DIM)
    if HALF > 0:
        half, channel = tl.arange(0, 2 * HALF_PAD) // HALF_PAD, tl.arange(0, 2 * HALF_PAD) % HALF_PAD
        inside = (rows < q_len)[:, None] & (channel < HALF)[None, :]
        tl.store(out_ptr + (half * HALF + channel)[None, :], acc_turned * share, mask=inside)
    if REST > 0:
        channel = tl.arange(0, REST_PAD)
        inside = (rows < q_len)[:, None] & (channel < REST)[None, :]
        tl.store(out_ptr + 2 * HALF + channel[None, :], acc_rest * share, mask=inside)


# The most queries that share the tile of a decoding step, and the most that fill one tile of half the size.
_FEW, _SHORT = 16, 64


def _configuration(dtype, queries, width, half_pad, tables, masked, mask_rows):
    """Return (BLOCK_M, BLOCK_N, num_warps, num_stages), without a spill for sm_80, sm_90 and sm_100 (2026-11)."""
    arch, few = architecture(), queries <= _FEW
    if dtype == torch.float32:
        if width > 64 or mask_rows:
            return 16, 32, 8, 2
        if few:
            return 16, 32, 4, 2
        return (64, 16, 4, 2) if arch < 90 else (64, 32, 8, 1) if arch >= 100 else (64, 32, 8 if masked else 4, 2)
    if few:
        return (16, 64, 4, 2) if width <= 64 else (16, 32, 4, 2)
    rest_pad = width - 2 * half_pad
    if 90 <= arch < 100 and half_pad and rest_pad < 64 and rest_pad not in (0, 2 * half_pad):
        # ptxas 12.8 can leave addresses of wgmma's operands unwritten where their rows are of two lengths
        # (benchmarks/aot/uniform_registers.py). 32 queries are too few for wgmma, and mma takes registers.
        return 32, 16, 4, 2
    if mask_rows:
        return 64, 32, 8, 2
    if arch < 90:
        return (128, 64, 8, 2) if width <= 64 else (64, 32 if width <= 128 else 16, 8, 2)
    if width > 64:
        return (128, 32, 8, 2) if half_pad else (64, 64, 4, 2)
    if queries <= _SHORT and half_pad <= 16 and not masked:
        return 64, 32, 4, 3
    if half_pad == 0 or (tables == 1 and half_pad <= 16):
        return 128, 64, 4, 3
    return (128, 64, 8, 3) if masked or half_pad > 16 else (128, 64, 4, 2)


def rotary_attention(q, k, v, cos, sin, mask, causal, query_offset, scale, *, out):
    """Attend from q `[B, Tq, H, D]` to k and v `[B, Tk, H, D]`, D at most 128; out as q, contiguous; scale above 0.

    The other arguments are as in `clvp_fast.ops.rotary_attention`. No length may be 0.
    """
    sizes = q.shape[0], q.shape[1], k.shape[1]
    strides = q.stride(), k.stride(), v.stride()
    _launch(q, k, v, cos, sin, mask, None, out, sizes, strides, causal, query_offset, scale, q.shape[1])


def rotary_attention_ragged(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, scale, *, out):
    """Attend as `rotary_attention` in each of the sequences of q, k, v and out `[tokens, H, D]`, out contiguous."""
    sizes = cu_seqlens.shape[0] - 1, max_seqlen, max_seqlen
    strides = ((0, *x.stride()) for x in (q, k, v))
    # The tile may not depend on the longest sequence.
    _launch(q, k, v, cos, sin, None, cu_seqlens, out, sizes, strides, causal, 0, scale, queries=_SHORT + 1)


def _launch(q, k, v, cos, sin, mask, cu_seqlens, out, sizes, strides, causal, query_offset, scale, queries):
    batch, q_len, k_len = sizes
    num_heads, head_dim = q.shape[-2:]
    tables = 1 if cos is not None and cos.ndim == 4 else 2
    half = 0 if cos is None else cos.shape[-1] * (3 - tables) // 2
    rest = head_dim - 2 * half
    half_pad = max(8, triton.next_power_of_2(half)) if half else 0
    rest_pad = max(16, triton.next_power_of_2(rest)) if rest else 0
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 2 else mask[:, 0]
    mask_rows = mask is not None and mask.shape[1] > 1
    width = 2 * half_pad + rest_pad
    block_m, block_n, num_warps, num_stages = _configuration(
        q.dtype, queries, width, half_pad, tables, mask is not None, mask_rows
    )
    num_tiles = triton.cdiv(q_len, block_m)
    _rotary_attention[(num_tiles * num_heads * batch,)](
        q, k, v, cos, sin, mask, cu_seqlens, out, *strides, _strides(cos), _strides(sin), _strides(mask),
        q_len, k_len, query_offset, scale, num_tiles, num_heads,
        CAUSAL=causal,
        ADDITIVE=mask is not None and mask.dtype != torch.bool,
        MASK_ROWS=mask_rows,
        HEAD_DIM=head_dim,
        TABLES=tables,
        HALF=half,
        HALF_PAD=half_pad,
        REST_PAD=rest_pad,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION="tf32x3",
        SPLIT=q.dtype == torch.float32,
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


def _strides(x):
    """Return an input's strides along three axes, 0 where all share one entry."""
    if x is None:
        return (0, 0, 0)
    return tuple(0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 1, -1))
