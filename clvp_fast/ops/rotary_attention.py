"""Attention with partial rotary positions on queries, keys and values.

x' = [x_r * cos + rotate_half(x_r) * sin, x_pass]      for x in q, k, v; x_r = the first R channels
out = softmax(scale * q' k'^T + mask) v'
"""

import ctypes
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from clvp_fast.ops import many_rows
from clvp_fast.ops.checks import check_same, shape_error, unserved_by_triton
from clvp_fast.ops.dispatch import Implementation, Operator, gradient, needs_grad
from clvp_fast.ops.wide import multiplies_slowly


def _rotate(x, cos, sin):
    """Rotate the first R channels of x [B, T, H, D] by their positions; cos, sin [B or 1, T, R]."""
    rotary_dim = cos.shape[-1]
    half = rotary_dim // 2
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = x[..., :half], x[..., half:rotary_dim]
    if needs_grad(x, cos, sin):
        rotated = x[..., :rotary_dim] * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((rotated.to(x.dtype), x[..., rotary_dim:]), dim=-1)
    # On one copy in the promoted dtype, in place: converting whole rows is fast, converting slices of 32 channels is
    # not.
    rotated = x.to(torch.promote_types(x.dtype, cos.dtype), copy=True, memory_format=torch.contiguous_format)
    rotated[..., :rotary_dim].mul_(cos)
    rotated[..., :half].addcmul_(second, sin[..., :half], value=-1)
    rotated[..., half:rotary_dim].addcmul_(first, sin[..., half:])
    return rotated.to(x.dtype)


def _both_halves(angles):
    """Return angles as [B or 1, T, R], also from [B or 1, T, 1, R / 2] that both halves of the channels share."""
    return angles if angles.ndim == 3 else angles.expand(-1, -1, 2, -1).flatten(2)


def _rotate_all(q, k, v, cos, sin, query_offset):
    if cos is None:
        return q, k, v
    cos, sin = _both_halves(cos), _both_halves(sin)
    rows = slice(query_offset, query_offset + q.shape[1])
    return _rotate(q, cos[:, rows], sin[:, rows]), _rotate(k, cos, sin), _rotate(v, cos, sin)


def _allowed(mask: torch.Tensor | None, causal, q_len, k_len, query_offset, device) -> Any:
    """Return the allowed pairs of query and key, bool, broadcastable to [B, H, Tq, Tk]; None: all pairs."""
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    if not causal or query_offset >= k_len - 1:
        return mask
    positions = torch.arange(k_len, device=device)
    triangle = positions <= positions[query_offset : query_offset + q_len, None]
    return triangle if mask is None else mask & triangle


def _additive(allowed, dtype):
    # The smallest number, not -inf: a query without a key then weighs all keys equally.
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def _added(mask, causal, q_len, k_len, query_offset, device, dtype) -> torch.Tensor:
    """Return an additive mask in `dtype`, with its smallest number at pairs that causality forbids."""
    triangle = _allowed(None, causal, q_len, k_len, query_offset, device)
    lowest = torch.finfo(dtype).min
    if torch.finfo(mask.dtype).min < lowest:  # the number would become -inf
        mask = mask.clamp(min=lowest)
    mask = mask.to(dtype)
    return mask if triangle is None else mask.masked_fill(~triangle, lowest)


def _bias(mask, causal, q_len, k_len, query_offset, device, dtype):
    """Return the term that is added to the scores, broadcastable to [B, H, Tq, Tk]; None: none."""
    geometry = (mask, causal, q_len, k_len, query_offset, device)
    if mask is not None and mask.dtype != torch.bool:
        return _added(*geometry, dtype)
    allowed = _allowed(*geometry)
    return None if allowed is None else _additive(allowed, dtype)


def _weights(q, k, bias):
    """Compute attention weights [B, H, Tq, Tk] in the dtype of q, in the order of transformers' eager attention."""
    if q.shape[1] == 1:  # a decoding step: with keys on the left torch need not copy their transpose in half types
        scores = torch.matmul(k.transpose(1, 2), q.permute(0, 2, 3, 1)).transpose(2, 3)
    else:
        scores = torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1))
    return F.softmax(scores if bias is None else scores + bias, dim=-1)


def _mix(weights, v, dropout_p):
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return torch.matmul(weights, v.transpose(1, 2)).transpose(1, 2).contiguous()


def reference(q, k, v, cos, sin, mask, causal, query_offset, scale, dropout_p=0.0):
    """Compute the formula, step by step, in float32 at least."""
    dtype = v.dtype
    if cos is not None:

        def rotate(x, cos, sin):
            cos, sin = cos[:, :, None], sin[:, :, None]
            x, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
            first, second = x.chunk(2, dim=-1)
            return torch.cat(((x * cos + torch.cat((-second, first), dim=-1) * sin).to(dtype), rest), dim=-1)

        cos, sin = _both_halves(cos), _both_halves(sin)
        rows = slice(query_offset, query_offset + q.shape[1])
        q, k, v = rotate(q, cos[:, rows], sin[:, rows]), rotate(k, cos, sin), rotate(v, cos, sin)
    compute = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    geometry = (mask, causal, q.shape[1], k.shape[1], query_offset, q.device)
    weights = _weights(q * scale, k, _bias(*geometry, compute))
    if mask is not None and mask.dtype == torch.bool:
        empty = ~_allowed(*geometry).any(-1, keepdim=True)
        weights = weights.masked_fill(empty, 1 / k.shape[1])  # the same value without a gradient
    return _mix(weights, v, dropout_p).to(dtype)


# The largest number of attention weights that may be stored on a CPU (128 MB in bfloat16).
_MAX_WEIGHTS = 2**26


def _prefers_matmul(q, k, square):
    """Tell whether two matrix products beat SDPA, which happens only on a CPU.

    There SDPA's fused kernel is 3 to 14 times slower for one query in half precision, and gains nothing for one query
    in float32 over keys stored head by head. (float16 matrix products are slower still.)
    """
    if q.device.type != "cpu" or square:
        return False
    batch, q_len, num_heads, head_dim = q.shape
    if q.dtype == torch.bfloat16:
        return batch * num_heads * q_len * k.shape[1] <= _MAX_WEIGHTS
    return q_len == 1 and (q.dtype == torch.float16 or k.stride(1) == head_dim)


def _weighs_alike(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether SDPA weighs a query's keys equally if all scores are the dtype's smallest number.

    A GPU's fused kernels multiply scores by log2(e) first: they overflow to -inf, and the result is 0. In float16 the
    smallest number is too small in magnitude to swallow a score.
    """
    return device.type == "cpu" and dtype != torch.float16


# Added to a score, this number swallows it.
_SWALLOWS = -1e30


def _seeing(q, mask, causal, k_len, query_offset):
    """Return q, mask and causal that give a query without keys equal scores and every key."""
    geometry = (causal, q.shape[1], k_len, query_offset, q.device)
    if mask.dtype == torch.bool:
        allowed = _allowed(mask, *geometry)
        empty = ~allowed.any(-1, keepdim=True)
        mask = allowed | empty
    else:
        added = _added(mask, *geometry, torch.promote_types(q.dtype, torch.float32))
        empty = (added < _SWALLOWS).all(-1, keepdim=True)
        mask = added.masked_fill(empty, 0)
    return q.masked_fill(empty.transpose(1, 2), 0), mask, False


def _torch(q, k, v, cos, sin, mask, causal, query_offset, scale, dropout_p=0.0):
    q, k, v = _rotate_all(q, k, v, cos, sin, query_offset)
    if multiplies_slowly(q):
        wide = _torch(q.float(), k.float(), v.float(), None, None, mask, causal, query_offset, scale, dropout_p)
        return wide.to(q.dtype)
    q_len, k_len = q.shape[1], k.shape[1]
    # `True if` makes a bool of a symbolic comparison, which SDPA refuses.
    square = True if causal and mask is None and query_offset == 0 and q_len == k_len else False  # noqa: SIM210
    additive = mask is not None and mask.dtype != torch.bool
    grad = needs_grad(q, k, v)
    weighed = additive and grad  # by two products, as eager attention does
    if mask is not None and not weighed and (grad or not _weighs_alike(q.device, q.dtype)):
        # SDPA's backward also takes each weight of a query without keys as 1.
        q, mask, causal = _seeing(q, mask, causal, k_len, query_offset)
    bias = None if square else _bias(mask, causal, q_len, k_len, query_offset, q.device, q.dtype)
    if _prefers_matmul(q, k, square) or weighed:
        return _mix(_weights(q * scale, k, bias), v, dropout_p)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=bias,
        dropout_p=dropout_p,
        is_causal=square,
        scale=scale,
    )
    return out.transpose(1, 2).contiguous()


def _fake(q, k, v, *others):
    return v.new_empty(q.shape)


def _triton(q, k, v, cos, sin, mask, causal, query_offset, scale):
    from clvp_fast.kernels import rotary_attention as kernels

    out = v.new_empty(q.shape)
    if not out.numel() or not k.shape[1]:
        return out.zero_()
    kernels.rotary_attention(q, k, v, cos, sin, mask, causal, query_offset, scale, out=out)
    return out


# The queries of an item of work on a CPU, unless there are items enough without: it lays out the keys for itself.
_ITEM_QUERIES = 128
# Fewer queries leave lanes of the kernel's vectors idle, and the keys are laid out for nothing.
_FEW_QUERIES = 8


def _native(q, k, v, cos, sin, mask, causal, query_offset, scale):
    """Run csrc/cpu/rotary_attention.cpp."""
    out = v.new_empty(q.shape)
    if not out.numel() or not k.shape[1]:
        return out.zero_()
    _run_natively(out, q, k, v, cos, sin, mask, None, causal, query_offset, scale, k.shape[1])
    return out


def _ragged_native(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, scale):
    """Run csrc/cpu/rotary_attention.cpp."""
    out = v.new_empty(q.shape)
    if out.numel() and max_seqlen:
        batch = q[None], k[None], v[None]
        _run_natively(out, *batch, cos, sin, None, cu_seqlens, causal, 0, scale, max_seqlen)
    return out


def _run_natively(out, q, k, v, cos, sin, mask, cu_seqlens, causal, query_offset, scale, k_len):
    from clvp_fast import native

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = (None if x is None else _both_halves(x).float().contiguous() for x in (cos, sin))
    mask, cu_seqlens = (None if x is None else x.contiguous() for x in (mask, cu_seqlens))
    batch, q_len, num_heads, head_dim = q.shape
    batch, threads = batch if cu_seqlens is None else len(cu_seqlens) - 1, torch.get_num_threads()
    call = native.RotaryAttentionCall(
        *(None if x is None else x.data_ptr() for x in (q, k, v, out, cos, sin, mask, cu_seqlens)),
        *((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v)),
        0 if cos is None or len(cos) == 1 else cos.stride(0),
        batch,
        q_len,
        k_len,
        query_offset,
        _ITEM_QUERIES if batch * num_heads < 4 * threads else max(_ITEM_QUERIES, q_len),
        num_heads,
        head_dim,
        0 if cos is None else cos.shape[-1],
        causal,
        native.number_of(q.dtype),
        scale,
    )
    native.check(native.library().clvp_fast_rotary_attention_cpu(ctypes.byref(call), threads, None))


def _why_not_cpu(q, mask):
    if reason := many_rows.unserved_type(q.device, q.dtype):
        return reason
    if q.shape[-1] > 128:
        return f"head_dim must be at most 128, not {q.shape[-1]}"
    if mask is not None and mask.ndim != 2:
        return f"on a CPU it serves masks [batch, key_len], not {list(mask.shape)}"
    return None


def _pays_on_cpu(q, *others):
    # A compiler fuses torch's own; it would fix the size that is compared, and cannot trace what `_why_not_cpu` asks.
    return not torch.compiler.is_compiling() and (q.ndim == 3 or q.shape[1] >= _FEW_QUERIES)


def _why_not_type(device, dtype):
    return unserved_by_triton("q", dtype)


def _why_not(q, *others):
    scale = others[-1]
    if reason := unserved_by_triton("q", q.dtype):
        return reason
    if q.shape[-1] > 128:
        return f"head_dim must be at most 128, not {q.shape[-1]}"
    if not scale > 0:
        return f"scale must be positive, not {scale}"
    return None


_OPERATOR = Operator(
    "rotary_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? mask, bool causal, SymInt query_offset, "
    "float scale) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations=(
        Implementation("triton", _triton, _why_not, _why_not_type),
        Implementation(
            "cpu",
            _native,
            lambda q, k, v, cos, sin, mask, *others: _why_not_cpu(q, mask),
            many_rows.unserved_type,
            _pays_on_cpu,
            f"at least {_FEW_QUERIES} queries, and no mask or [batch, key_len]",
            warns=False,
        ),
        Implementation("torch", _torch),
    ),
)


def _one_by_one(attend):
    """Apply `attend` to ragged sequences, one after another."""

    def ragged(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, scale):
        parts = [v.new_empty(0, *q.shape[1:])]
        for start, end in pairwise(cu_seqlens.tolist()):
            sequence = (x[None, start:end] for x in (q, k, v))
            angles = (None if x is None else x[:, : end - start] for x in (cos, sin))
            parts.append(attend(*sequence, *angles, None, causal, 0, scale)[0])
        return torch.cat(parts)

    return ragged


def _ragged_triton(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, scale):
    from clvp_fast.kernels import rotary_attention as kernels

    out = v.new_empty(q.shape)
    if out.numel() and max_seqlen:
        kernels.rotary_attention_ragged(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, scale, out=out)
    return out


_RAGGED = Operator(
    "rotary_attention_ragged",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, Tensor? cos, Tensor? sin, bool causal, "
    "float scale) -> Tensor",
    reference=_one_by_one(reference),
    fake=_fake,
    implementations=(
        Implementation("triton", _ragged_triton, _why_not, _why_not_type),
        Implementation(
            "cpu",
            _ragged_native,
            lambda q, *others: _why_not_cpu(q, None),
            many_rows.unserved_type,
            _pays_on_cpu,
            warns=False,
        ),
        Implementation("torch", _one_by_one(_torch)),
    ),
)


def _check_angles(cos, sin, q, batches, k_len):
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together, and one of them is missing")
    if cos is None:
        return
    head_dim, shape = q.shape[-1], cos.shape
    if len(shape) == 4 and shape[2] == 1:
        fits = 2 * shape[3] <= head_dim
    else:
        fits = len(shape) == 3 and shape[2] <= head_dim and shape[2] % 2 == 0
    if not fits or shape[0] not in batches or shape[1] != k_len:
        rows = f"{' or '.join(map(str, batches))}, {k_len}"
        raise shape_error("cos", f"[{rows}, an even number of at most {head_dim}] or [{rows}, 1, half of it]", cos)
    if sin.shape != cos.shape:
        raise shape_error("sin", f"that of cos, {list(cos.shape)}", sin)
    check_same("cos", cos, "q", q, dtype=False)
    check_same("sin", sin, "cos", cos)


def _prepare(q, k, v, cos, sin, mask, causal, query_offset, scale) -> tuple[int, float]:
    """Check the arguments and fill in the defaults: (query_offset, scale)."""
    if q.ndim != 4:
        raise shape_error("q", "[batch, query_len, num_heads, head_dim]", q)
    batch, q_len, num_heads, head_dim = q.shape
    k_shape = k.shape
    if len(k_shape) != 4 or k_shape[0] != batch or k_shape[2] != num_heads or k_shape[3] != head_dim:
        raise shape_error("k", f"[{batch}, key_len, {num_heads}, {head_dim}]", k)
    if v.shape != k_shape:
        raise shape_error("v", f"that of k, {list(k_shape)}", v)
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    k_len = k_shape[1]
    if query_offset is None:
        query_offset = k_len - q_len if causal else 0
    if (cos is not None or causal) and (query_offset < 0 or query_offset + q_len > k_len):
        raise ValueError(
            f"queries at rows {query_offset} to {query_offset + q_len} must lie within the {k_len} keys; "
            "check query_offset and the lengths"
        )
    _check_angles(cos, sin, q, (1, batch), k_len)
    if mask is not None:
        if mask.dtype != torch.bool and not (mask.is_floating_point() and mask.ndim == 4):
            raise TypeError(
                f"mask must be bool with True = attend (or of four axes and additive), not {mask.dtype}; "
                "use mask.bool() on ones and zeros"
            )
        check_same("mask", mask, "q", q, dtype=False)
        shape = mask.shape
        if not (
            (len(shape) == 2 and shape[0] == batch and shape[1] == k_len)
            or (
                len(shape) == 4
                and shape[0] in (1, batch)
                and shape[1] == 1
                and shape[2] in (1, q_len)
                and shape[3] == k_len
            )
        ):
            raise shape_error("mask", f"[{batch}, {k_len}] or [1 or {batch}, 1, 1 or {q_len}, {k_len}]", mask)
    return query_offset, head_dim**-0.5 if scale is None else scale


def _ragged(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, scale):
    """Check the arguments of ragged sequences, and attend."""
    if q.ndim != 3:
        raise shape_error("q", "[tokens, num_heads, head_dim] (with cu_seqlens)", q)
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise shape_error(name, f"that of q, {list(q.shape)}", x)
        check_same(name, x, "q", q)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, not {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        raise shape_error("cu_seqlens", "[sequences + 1]", cu_seqlens)
    check_same("cu_seqlens", cu_seqlens, "q", q, dtype=False)
    if max_seqlen is None or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be the length of the longest sequence of cu_seqlens, not {max_seqlen}")
    _check_angles(cos, sin, q, (1,), max_seqlen)
    args = (q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, q.shape[2] ** -0.5 if scale is None else scale)
    training = gradient(q, k, v, cos, sin)
    if training is None and torch.compiler.is_compiling():  # torch's path reads lengths on the host: one opaque call
        return _RAGGED.registered(*args)
    return _RAGGED.choose(args, training)(*args)


def rotary_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    query_offset: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Attend with rotary positions on the first channels of queries, keys and values.

    Args:
        q: `[B, Tq, H, D]`, any strides; float16, bfloat16, float32 or float64.
        k, v: `[B, Tk, H, D]`, any strides, the dtype of `q`.
        cos, sin: `[B or 1, Tk, R]`, R even and at most D, or `[B or 1, Tk, 1, R / 2]` if both halves of the channels
            have the same angles (so that only half a table is read); None: no rotary positions. The rotation is
            computed in the promoted dtype of `q` and `cos`; float32 angles for bfloat16 inputs keep distant positions
            apart.
        mask: bool, True = attend; `[B, Tk]` for padded keys, or `[B or 1, 1, Tq or 1, Tk]`, which may also be floating
            point and is then added to the scores.
        causal: query i attends to keys 0 .. query_offset + i; together with `mask` if both are given.
        query_offset: the row of the sequence at which the queries start. Default: `Tk - Tq` if causal, else 0.
        scale: of the scores; default `D ** -0.5`.
        dropout_p: probability of dropping an attention weight (training).
        cu_seqlens: `[S + 1]` int32, the start of each of S sequences and the end of the last one; q, k and v are then
            `[tokens, H, D]`, and attention stays within each sequence; mask, query_offset and dropout_p are not
            supported.
        max_seqlen: the length of the longest sequence, with `cu_seqlens`; cos and sin are `[1, max_seqlen, R]`, by
            positions in a sequence. (Values of `cu_seqlens` are not checked.)

    Returns:
        A contiguous tensor of the shape of `q` and the dtype of `v`. A query that may attend to no key gets the mean of
        all values.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match.
        RuntimeError: a forced backend cannot serve.
    """
    if cu_seqlens is not None:
        if mask is not None or query_offset is not None or dropout_p > 0:
            raise ValueError("mask, query_offset and dropout_p must not be given together with cu_seqlens")
        return _ragged(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, scale)
    query_offset, scale = _prepare(q, k, v, cos, sin, mask, causal, query_offset, scale)
    args = (q, k, v, cos, sin, mask, causal, query_offset, scale)
    if dropout_p > 0:
        return _OPERATOR.choose(args, "dropout is for training")(*args, dropout_p)
    return _OPERATOR.choose(args, gradient(q, k, v, cos, sin))(*args)


def rotary_attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    query_offset: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `rotary_attention` and also return the attention weights; in plain torch for every backend.

    Returns:
        The output `[B, Tq, H, D]` and the weights `[B, H, Tq, Tk]` before dropout, both in the dtype of `q`.
    """
    query_offset, scale = _prepare(q, k, v, cos, sin, mask, causal, query_offset, scale)
    q, k, v = _rotate_all(q * scale, k, v, cos, sin, query_offset)
    weights = _weights(q, k, _bias(mask, causal, q.shape[1], k.shape[1], query_offset, q.device, q.dtype))
    return _mix(weights, v, dropout_p), weights
