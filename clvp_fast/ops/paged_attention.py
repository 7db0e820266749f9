"""Attention over keys and values in pages; the candidates of a request share the prompt's pages.

Pages are `[num_pages, page_size, num_heads, head_dim]`; token t of a sequence lies in slot `t % page_size` of page
`block_table[row, t // page_size]`. Both operators write the new keys and values into the pages, and are for inference.

    decode:  out[n] = softmax(scale * q[n] [K_prefix; K_own]^T) [V_prefix; V_own]
    prefill: causal attention within each sequence of a ragged batch

K_own ends with k_new[n], and V_own with v_new[n].

Pages of float8 (e4m3) have scales `[num_heads]`: a page keeps x / scale, clamped to the range of the type. On a
CPU both have kernels of their own, in the native library of `csrc/`. `CLVP_FAST_DEBUG=1`, read once at import,
makes the public functions check the values of tables and lengths too.
"""

import ctypes
import os
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from clvp_fast.ops.binding import BoundCall, Scratch, in_turn, writing
from clvp_fast.ops.checks import check_same, shape_error, unserved_by_triton, unserved_natively
from clvp_fast.ops.dispatch import Implementation, Operator, needs_grad
from clvp_fast.ops.paged_attention_torch import decode_reference, decode_torch, prefill_reference, prefill_torch

FLOAT8 = torch.float8_e4m3fn
HEAD_DIMS, PAGE_SIZES = (32, 64, 80, 96, 128), (16, 32)
_debug = os.environ.get("CLVP_FAST_DEBUG") == "1"


def _contiguous_last(*tensors: torch.Tensor | None) -> list[Any]:  # None for None, and a tensor for each other
    """Return the tensors; those whose last axis does not have stride 1 are copied."""
    return [x if x is None or x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _decode_native(q, *others):
    """Run csrc/cpu/paged_decode.cpp."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _native_call(out, q, *others)()
    return out


def _bind_native(out, scratch, q, k_new, v_new, k_pages, v_pages, *others):
    tensors = q, k_new, v_new, *others[:5]
    if not all(mine is x for mine, x in zip(_contiguous_last(*tensors), tensors, strict=True)):
        return None
    return _native_call(out, q, k_new, v_new, k_pages, v_pages, *others)


def _native_call(out, q, k_new, v_new, k_pages, v_pages, block_table, seq_lens, *others):
    """Bind the kernel to these tensors, or to copies made now if the last axis does not have stride 1."""
    from clvp_fast import native

    q, k_new, v_new, block_table, seq_lens = _contiguous_last(q, k_new, v_new, block_table, seq_lens)
    prefix, scale = _contiguous_last(*others[:3]), others[3]
    prefix_table = prefix[0]
    call = native.PagedDecodeCall(
        *(x.data_ptr() for x in (q, k_new, v_new, k_pages, v_pages, out, block_table, seq_lens)),
        *(None if x is None else x.data_ptr() for x in prefix),
        *((ctypes.c_int64 * 2)(*x.stride()[:2]) for x in (q, k_new, v_new)),
        (ctypes.c_int64 * 3)(*k_pages.stride()[:3]),
        block_table.stride(0),
        0 if prefix_table is None else prefix_table.stride(0),
        len(q),
        len(k_pages),
        0 if prefix_table is None else len(prefix_table),
        *q.shape[1:],
        k_pages.shape[1],
        block_table.shape[1],
        0 if prefix_table is None else prefix_table.shape[1],
        native.number_of(q.dtype),
        scale,
    )
    kept = out, q, k_new, v_new, k_pages, v_pages, block_table, seq_lens, *prefix
    return native.Bound("clvp_fast_paged_decode_cpu", call, torch.get_num_threads(), *kept)


def _prefill_native(q, k, v, cu_seqlens, k_pages, v_pages, block_table, scale, k_scale=None, v_scale=None):
    """Run csrc/cpu/paged_prefill.cpp."""
    from clvp_fast import native

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, k, v, cu_seqlens, block_table = _contiguous_last(q, k, v, cu_seqlens, block_table)
    call = native.PagedPrefillCall(
        *(x.data_ptr() for x in (q, k, v, k_pages, v_pages, out, cu_seqlens, block_table)),
        *((ctypes.c_int64 * 2)(*x.stride()[:2]) for x in (q, k, v)),
        (ctypes.c_int64 * 3)(*k_pages.stride()[:3]),
        block_table.stride(0),
        len(q),
        len(block_table),
        len(k_pages),
        *q.shape[1:],
        k_pages.shape[1],
        block_table.shape[1],
        native.number_of(q.dtype),
        scale,
    )
    native.check(native.library().clvp_fast_paged_prefill_cpu(ctypes.byref(call), torch.get_num_threads(), None))
    return out


def _decode_triton(
    q,
    k_new,
    v_new,
    k_pages,
    v_pages,
    block_table,
    seq_lens,
    prefix_table,
    prefix_lens,
    prefix_index,
    scale,
    k_scale=None,
    v_scale=None,
    arrivals=None,
    *,
    out=None,
):
    """Run kernels/paged_attention.py."""
    from clvp_fast.kernels import paged_attention as kernels

    num_candidates, num_heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if out.numel() == 0:
        return out
    own, prefix = (0 if table is None else table.shape[1] * k_pages.shape[1] for table in (block_table, prefix_table))
    parts = kernels.parts(own, prefix)
    partial_sums = num_candidates * num_heads * parts * (head_dim + 2) if parts > 1 else 0
    partial = torch.empty(partial_sums, dtype=torch.float32, device=q.device)
    if arrivals is None:
        # Counters are needed only if parts are merged; otherwise the launch that zeroes them is saved.
        make = torch.zeros if parts > 1 else torch.empty
        arrivals = make(num_candidates, num_heads, dtype=torch.int32, device=q.device)
    rows = _contiguous_last(q, k_new, v_new)
    tables = _contiguous_last(block_table, seq_lens, prefix_table, prefix_lens, prefix_index)
    scales = _contiguous_last(k_scale, v_scale)
    kernels.paged_attention_decode(
        *rows, k_pages, v_pages, *tables, scale, *scales, out=out, partial=partial, arrivals=arrivals
    )
    return out


def _prefill_triton(q, k, v, cu_seqlens, k_pages, v_pages, block_table, scale, k_scale=None, v_scale=None):
    """Run kernels/paged_prefill.py."""
    from clvp_fast.kernels.paged_prefill import paged_prefill

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    *rows, block_table, k_scale, v_scale = _contiguous_last(q, k, v, cu_seqlens, block_table, k_scale, v_scale)
    paged_prefill(*rows, k_pages, v_pages, block_table, scale, k_scale, v_scale, out=out)
    return out


def _why_not_type(device, dtype):
    return unserved_by_triton("q", dtype)


def _why_not(q, k_pages, v_pages):
    if reason := unserved_by_triton("q", q.dtype):
        return reason
    if k_pages.dtype not in (q.dtype, FLOAT8):
        return f"it serves pages of the dtype of q, {q.dtype}, or of {FLOAT8}, not of {k_pages.dtype}"
    if k_pages.dtype == FLOAT8 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 9):
        return f"pages of {FLOAT8} need compute capability 8.9 or newer"
    if q.shape[2] not in HEAD_DIMS:
        return f"it serves head_dim {', '.join(map(str, HEAD_DIMS))}, not {q.shape[2]}"
    if k_pages.shape[1] not in PAGE_SIZES:
        return f"it serves page_size {', '.join(map(str, PAGE_SIZES))}, not {k_pages.shape[1]}"
    if k_pages.stride(3) != 1 or v_pages.stride() != k_pages.stride():
        strides = f"{k_pages.stride()} and {v_pages.stride()}"
        return f"it serves k_pages and v_pages of the same strides, the last of them 1, not {strides}"
    return None


def _decode_why_not_triton(q, k_new, v_new, k_pages, v_pages, *others):
    return _why_not(q, k_pages, v_pages)


def _decode_why_not_cpu(q, k_new, v_new, k_pages, v_pages, block_table, *others):
    return _why_not_cpu(q, k_pages, v_pages, block_table)


def _prefill_why_not_cpu(q, k, v, cu_seqlens, k_pages, v_pages, block_table, *others):
    return _why_not_cpu(q, k_pages, v_pages, block_table)


def _why_not_cpu(q, k_pages, v_pages, block_table):
    if reason := unserved_natively(q.device, q.dtype):
        return reason
    if k_pages.dtype != q.dtype:
        return f"on a CPU it serves pages of the dtype of q, {q.dtype}, not of {k_pages.dtype}"
    if q.shape[2] % 16 or q.shape[2] > 128:
        return f"on a CPU it serves a head_dim that is a multiple of 16 up to 128, not {q.shape[2]}"
    if not 1 <= k_pages.shape[1] <= 1024 or 0 in (q.shape[1], block_table.shape[1]):
        sizes = f"{k_pages.shape[1]} tokens, {q.shape[1]} heads and {block_table.shape[1]} pages"
        return f"on a CPU it serves pages of up to 1024 tokens, and at least one head and page a row, not {sizes}"
    if k_pages.stride(3) != 1 or v_pages.stride() != k_pages.stride():
        return "it serves k_pages and v_pages of the same strides, the last of them 1"
    return None


_DECODE = Operator(
    "paged_attention_decode",
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, "
    "Tensor seq_lens, Tensor? prefix_table, Tensor? prefix_lens, Tensor? prefix_index, float scale, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor(c!)? arrivals=None) -> Tensor",
    reference=decode_reference,
    fake=lambda q, *others: torch.empty_like(q, memory_format=torch.contiguous_format),
    implementations=(
        Implementation("triton", _decode_triton, _decode_why_not_triton, _why_not_type, bind=writing(_decode_triton)),
        Implementation("cpu", _decode_native, _decode_why_not_cpu, unserved_natively, bind=_bind_native),
        Implementation("torch", decode_torch),
    ),
)
_PREFILL = Operator(
    "paged_prefill",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, "
    "float scale, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    reference=prefill_reference,
    fake=lambda q, *others: torch.empty_like(q, memory_format=torch.contiguous_format),
    implementations=(
        Implementation(
            "triton",
            _prefill_triton,
            lambda q, k, v, cu_seqlens, k_pages, v_pages, *others: _why_not(q, k_pages, v_pages),
            _why_not_type,
        ),
        Implementation("cpu", _prefill_native, _prefill_why_not_cpu, unserved_natively),
        Implementation("torch", prefill_torch),
    ),
)


def _check_index(name, tensor, q, *shape):
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, not {tensor.dtype}")
    check_same(name, tensor, "q", q, dtype=False)
    if tensor.ndim != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise shape_error(name, "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]", tensor)


def _check(q, k, v, names, k_pages, v_pages, k_scale, v_scale):
    if q.ndim != 3:
        raise shape_error("q", "[tokens, num_heads, head_dim]", q)
    for name, tensor in zip(names, (k, v), strict=True):
        if tensor.shape != q.shape:
            raise shape_error(name, f"that of q, {list(q.shape)}", tensor)
        check_same(name, tensor, "q", q)
    if k_pages.ndim != 4 or k_pages.shape[2:] != q.shape[1:]:
        raise shape_error("k_pages", f"[num_pages, page_size, {q.shape[1]}, {q.shape[2]}]", k_pages)
    if v_pages.shape != k_pages.shape:
        raise shape_error("v_pages", f"that of k_pages, {list(k_pages.shape)}", v_pages)
    check_same("k_pages", k_pages, "q", q, dtype=False)
    check_same("v_pages", v_pages, "k_pages", k_pages)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is None) == (k_pages.dtype == FLOAT8):
            given = "missing" if scale is None else "given"
            raise ValueError(f"{name} belongs to pages of {FLOAT8}: it is {given}, and k_pages are {k_pages.dtype}")
        if scale is None:
            continue
        if scale.shape != q.shape[1:2]:
            raise shape_error(name, f"[{q.shape[1]}]", scale)
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, not {scale.dtype}")
        check_same(name, scale, "q", q, dtype=False)
    if needs_grad(q, k, v, k_pages, v_pages):
        raise RuntimeError("paged attention writes its pages and has no gradient: call it under torch.no_grad()")


def _check_row(table_name, table, row, tokens, user, pages):
    """Check, in debug mode, that the `tokens` of `user` fit their row of a table and lie in pages that exist."""
    num_pages, page_size = pages.shape[:2]
    if tokens > table.shape[1] * page_size:
        raise IndexError(
            f"{user} takes {tokens} slots, and {table_name} has {table.shape[1]} pages of {page_size} a row"
        )
    for place, page in enumerate(table[row, : -(-tokens // page_size)].tolist()):
        if not 0 <= page < num_pages:
            raise IndexError(f"{table_name}[{row}, {place}] must be from 0 to {num_pages - 1}, not {page}")


def _check_decode_values(pages, block_table, seq_lens, prefix_table, prefix_lens, prefix_index):
    active = {row: place for row, place in enumerate(seq_lens.tolist()) if place >= 0}
    for row, place in active.items():
        _check_row("block_table", block_table, row, place + 1, f"seq_lens[{row}] = {place}", pages)
    if prefix_table is None:
        return
    index, lengths = prefix_index.tolist(), prefix_lens.tolist()
    for row in active:
        if not -1 <= index[row] < len(lengths):
            raise IndexError(f"prefix_index[{row}] must be from -1 to {len(lengths) - 1}, not {index[row]}")
    for request in sorted({index[row] for row in active} - {-1}):
        length = lengths[request]
        if length < 0:
            raise ValueError(f"prefix_lens[{request}] must be 0 or more, not {length}")
        _check_row("prefix_table", prefix_table, request, length, f"prefix_lens[{request}]", pages)


def _check_prefill_values(num_tokens, cu_seqlens, pages, block_table):
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens[0] must be 0, not {bounds[0]}")
    if bounds[-1] > num_tokens:
        raise ValueError(f"cu_seqlens[{len(bounds) - 1}] must be at most {num_tokens}, not {bounds[-1]}")
    for row, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens[{row + 1}] must be {start} or more, as the entry before it, not {end}")
        _check_row("block_table", block_table, row, end - start, f"sequence {row} of cu_seqlens", pages)


def _call(operator, args):
    # The torch paths read lengths on the host, so that the compiler has to keep them as one opaque call.
    if torch.compiler.is_compiling():
        return operator.registered(*args)
    return operator.choose(args)(*args)


def paged_attention_decode(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    prefix_table: torch.Tensor | None = None,
    prefix_lens: torch.Tensor | None = None,
    prefix_index: torch.Tensor | None = None,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Store a new key and value of each of N candidates, and attend to its prefix and its own tokens.

    Args:
        q, k_new, v_new: `[N, H, D]`, of one dtype.
        k_pages, v_pages: `[num_pages, page_size, H, D]`, of one dtype; the new key and value of candidate n are written
            at position `seq_lens[n]` of its own pages.
        block_table: `[N, max_pages]` int32, each candidate's own pages. Entries past the pages in use are not read.
        seq_lens: `[N]` int32, own tokens stored before this step; negative: the slot is inactive, nothing is read or
            written for it, and its output is 0. Position `seq_lens[n]` must lie within `max_pages`.
        prefix_table: `[R, P]` int32, the pages of each request's prompt, shared by its candidates.
        prefix_lens: `[R]` int32, the number of tokens in them.
        prefix_index: `[N]` int32, each candidate's request; -1: none. The three are given together or not at all.
        scale: of the scores; default `D ** -0.5`.
        k_scale, v_scale: `[H]` float32, for pages of float8 and only for them: a page keeps `x / scale`, clamped.
        arrivals: `[N, H]` int32 zeros, which are zeros again after the call: counters of the kernel, for one call at a
            time. By default it makes its own, which costs a second, tiny launch.

    Returns:
        `[N, H, D]`, the dtype of `q`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match. Values are not checked: the kernel skips pages
            that do not exist and positions past the tables, and touches no other memory.
        IndexError, ValueError: in debug mode (`CLVP_FAST_DEBUG=1`; it waits for the device), a page in use does not
            exist, a length passes its table, or a request is unknown.
        RuntimeError: an argument requires grad, or a forced backend cannot serve.
    """
    scale = q.shape[2] ** -0.5 if scale is None and q.ndim == 3 else scale
    tables = (block_table, seq_lens, prefix_table, prefix_lens, prefix_index)
    args = (q, k_new, v_new, k_pages, v_pages, *tables, scale, k_scale, v_scale, arrivals)
    _check_decode(*args)
    if _debug and not torch.compiler.is_compiling():
        _check_decode_values(k_pages, *tables)
    return _call(_DECODE, args)


def bind_paged_attention_decode(
    out: torch.Tensor,
    scratch: Scratch,
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    prefix_table: torch.Tensor | None = None,
    prefix_lens: torch.Tensor | None = None,
    prefix_index: torch.Tensor | None = None,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> BoundCall:
    """Bind `paged_attention_decode` of these arguments into `out`, contiguous, as `Operator.bind` does."""
    tables = (block_table, seq_lens, prefix_table, prefix_lens, prefix_index)
    args = (q, k_new, v_new, k_pages, v_pages, *tables, scale, k_scale, v_scale, arrivals)
    _check_decode(*args)
    call = _DECODE.bind(args, out, scratch)
    return in_turn(partial(_check_decode_values, k_pages, *tables), call) if _debug else call


def _check_decode(
    q, k_new, v_new, k_pages, v_pages, block_table, seq_lens, prefix_table, prefix_lens, prefix_index, scale, k_scale,
    v_scale, arrivals,
):  # fmt: skip
    _check(q, k_new, v_new, ("k_new", "v_new"), k_pages, v_pages, k_scale, v_scale)
    num_candidates = q.shape[0]
    _check_index("block_table", block_table, q, num_candidates, None)
    _check_index("seq_lens", seq_lens, q, num_candidates)
    if len({x is None for x in (prefix_table, prefix_lens, prefix_index)}) > 1:
        raise ValueError("prefix_table, prefix_lens and prefix_index must be given together, and some are missing")
    if prefix_table is not None:
        _check_index("prefix_table", prefix_table, q, None, None)
        _check_index("prefix_lens", prefix_lens, q, prefix_table.shape[0])
        _check_index("prefix_index", prefix_index, q, num_candidates)
    if arrivals is not None:
        _check_index("arrivals", arrivals, q, num_candidates, q.shape[1])
        if not arrivals.is_contiguous():
            raise ValueError(f"arrivals must be contiguous, not of strides {arrivals.stride()}")


def paged_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally within each sequence of a ragged batch, and store its keys and values from position 0 on.

    Args:
        q, k, v: `[T, H, D]`, of one dtype, the sequences one after another.
        cu_seqlens: `[S + 1]` int32: sequence s has the rows from `cu_seqlens[s]` to before `cu_seqlens[s + 1]`, perhaps
            none; rows from the last entry on belong to none, and their result is any. If entries descend, sequences
            overlap: a shared row has the result of any of them, or is not written, and no other memory is read or
            written. Debug mode refuses such entries.
        k_pages, v_pages: `[num_pages, page_size, H, D]`, of one dtype.
        block_table: `[S, max_pages]` int32, the pages of each sequence. A slot that several sequences share gets the
            key and value of any of them.
        scale: of the scores; default `D ** -0.5`.
        k_scale, v_scale: as for `paged_attention_decode`; the attention itself takes k and v as they are.

    Returns:
        `[T, H, D]`, the dtype of `q`.

    Raises:
        As `paged_attention_decode`; in debug mode also if `cu_seqlens` does not ascend from 0, to T at most.
    """
    _check(q, k, v, ("k", "v"), k_pages, v_pages, k_scale, v_scale)
    _check_index("block_table", block_table, q, None, None)
    _check_index("cu_seqlens", cu_seqlens, q, block_table.shape[0] + 1)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if _debug and not torch.compiler.is_compiling():
        _check_prefill_values(len(q), cu_seqlens, k_pages, block_table)
    return _call(_PREFILL, (q, k, v, cu_seqlens, k_pages, v_pages, block_table, scale, k_scale, v_scale))
