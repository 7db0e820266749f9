"""Attention over keys and values in pages, of which the candidates of a request share the prompt's.

Pages are `[num_pages, page_size, num_heads, head_dim]`; token t of a sequence lies in slot `t % page_size` of page
`block_table[row, t // page_size]`. Both operators write the new keys and values into the pages, and are for inference.

    decode:  out[n] = softmax(scale * q[n] [K_prefix; K_own]^T) [V_prefix; V_own]  K_own ends with k_new[n], V_own alike
    prefill: causal attention within each sequence of a ragged batch
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from clvp_fast.ops.dispatch import Operator, check_same, needs_grad, shape_error


def _tokens(pages, table, length):
    """The first `length` tokens of one row of a table, `[length, num_heads, head_dim]`."""
    places = torch.arange(length, device=pages.device)
    page_size = pages.shape[1]
    return pages[table[places // page_size].long(), places % page_size]


def _store(pages, table, places, new):
    """Write `new[i]` at place `places[i]` of row i of `table`."""
    page_size = pages.shape[1]
    page = table.gather(1, (places // page_size)[:, None]).squeeze(1).long()
    pages[page, places % page_size] = new.to(pages.dtype)


def _attend_exactly(q, k, v, scale):
    """q `[queries, heads, dim]` over k, v `[keys, heads, dim]`, causal from the end, in float32 at least."""
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(compute) * scale, k.to(compute))
    ahead = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(compute)).to(q.dtype)


def decode_reference(
    q, k_new, v_new, k_pages, v_pages, block_table, seq_lens, prefix_table, prefix_lens, prefix_index, scale
):
    """One candidate after another."""
    out = torch.zeros_like(q)
    page_size = k_pages.shape[1]
    for n, length in enumerate(seq_lens.tolist()):
        if length < 0:
            continue
        page, slot = int(block_table[n, length // page_size]), length % page_size
        k_pages[page, slot], v_pages[page, slot] = k_new[n].to(k_pages.dtype), v_new[n].to(v_pages.dtype)
        k, v = (_tokens(pages, block_table[n], length + 1) for pages in (k_pages, v_pages))
        request = -1 if prefix_index is None else int(prefix_index[n])
        if request >= 0:
            prefix = prefix_table[request], int(prefix_lens[request])
            k, v = (torch.cat((_tokens(pages, *prefix), own)) for pages, own in ((k_pages, k), (v_pages, v)))
        out[n] = _attend_exactly(q[n : n + 1], k, v, scale)[0]
    return out


def _decode_torch(
    q, k_new, v_new, k_pages, v_pages, block_table, seq_lens, prefix_table, prefix_lens, prefix_index, scale
):
    out = torch.zeros_like(q)
    rows = (seq_lens >= 0).nonzero().squeeze(1)
    if rows.numel() == 0:
        return out
    lengths, table = seq_lens[rows].long(), block_table[rows]
    _store(k_pages, table, lengths, k_new[rows])
    _store(v_pages, table, lengths, v_new[rows])

    # Each candidate's own tokens, padded to the longest. What pads is zeroed: unused slots may hold anything, NaN too.
    page_size = k_pages.shape[1]
    num_pages = int(lengths.max()) // page_size + 1
    stored = torch.arange(num_pages * page_size, device=q.device) <= lengths[:, None]
    pages = table[:, :num_pages].where(stored[:, ::page_size], 0).long()
    unused = ~stored[:, :, None, None]
    own_k, own_v = (x[pages].flatten(1, 2).to(q.dtype).masked_fill_(unused, 0) for x in (k_pages, v_pages))
    q = q[rows] * scale
    wide = torch.promote_types(q.dtype, torch.float32)
    own_scores = torch.einsum("nhd,nkhd->nhk", q, own_k).to(wide).masked_fill_(~stored[:, None], -torch.inf)

    # A prefix is read once for all its candidates.
    requests = torch.full_like(rows, -1) if prefix_index is None else prefix_index[rows].long()
    for request in requests.unique().tolist():
        members = (requests == request).nonzero().squeeze(1)
        scores, v = own_scores[members], own_v[members]
        length = 0 if request < 0 else int(prefix_lens[request])
        if length:
            prefix_k, prefix_v = (_tokens(x, prefix_table[request], length).to(q.dtype) for x in (k_pages, v_pages))
            prefix_scores = torch.einsum("nhd,khd->nhk", q[members], prefix_k).to(wide)
            scores = torch.cat((prefix_scores, scores), dim=-1)
        weights = scores.softmax(-1).to(q.dtype)
        mixed = torch.einsum("nhk,nkhd->nhd", weights[..., length:], v)
        if length:
            mixed = mixed + torch.einsum("nhk,khd->nhd", weights[..., :length], prefix_v)
        out[rows[members]] = mixed
    return out


def prefill_reference(q, k, v, cu_seqlens, k_pages, v_pages, block_table, scale):
    """One sequence after another."""
    out = torch.empty_like(q)
    page_size = k_pages.shape[1]
    bounds = cu_seqlens.tolist()
    for row, (start, end) in enumerate(pairwise(bounds)):
        for place in range(end - start):
            page, slot = int(block_table[row, place // page_size]), place % page_size
            k_pages[page, slot] = k[start + place].to(k_pages.dtype)
            v_pages[page, slot] = v[start + place].to(v_pages.dtype)
        out[start:end] = _attend_exactly(q[start:end], k[start:end], v[start:end], scale)
    return out


def _prefill_torch(q, k, v, cu_seqlens, k_pages, v_pages, block_table, scale):
    out = torch.empty_like(q)
    bounds = cu_seqlens.tolist()
    for row, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        places = torch.arange(end - start, device=q.device)
        table = block_table[row].expand(len(places), -1)
        _store(k_pages, table, places, k[start:end])
        _store(v_pages, table, places, v[start:end])
        heads_first = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out[start:end] = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)[0].transpose(0, 1)
    return out


_DECODE = Operator(
    "paged_attention_decode",
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, "
    "Tensor seq_lens, Tensor? prefix_table, Tensor? prefix_lens, Tensor? prefix_index, float scale) -> Tensor",
    reference=decode_reference,
    torch_path=_decode_torch,
    fake=lambda q, *others: torch.empty_like(q),
)
_PREFILL = Operator(
    "paged_prefill",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, "
    "float scale) -> Tensor",
    reference=prefill_reference,
    torch_path=_prefill_torch,
    fake=lambda q, *others: torch.empty_like(q),
)


def _check_index(name, tensor, q, *shape):
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, not {tensor.dtype}")
    check_same(name, tensor, "q", q, dtype=False)
    if tensor.ndim != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise shape_error(name, "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]", tensor)


def _check(q, k, v, names, k_pages, v_pages):
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
    if needs_grad(q, k, v, k_pages, v_pages):
        raise RuntimeError("paged attention writes its pages and has no gradient: call it under torch.no_grad()")


def _call(operator, args):
    # The torch paths read lengths on the host: the compiler keeps them as one opaque call.
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
) -> torch.Tensor:
    """One decode step of N candidates: store each one's new key and value, and attend to its prefix and its own tokens.

    Args:
        q, k_new, v_new: `[N, H, D]`, of one dtype.
        k_pages, v_pages: `[num_pages, page_size, H, D]`, of one dtype; the new key and value of candidate n are written
            at place `seq_lens[n]` of its own pages.
        block_table: `[N, max_pages]` int32, each candidate's own pages. What lies past the pages in use is not read.
        seq_lens: `[N]` int32, own tokens stored before this step; negative: the slot is inactive, nothing of it is read
            or written, and its output is 0. Place `seq_lens[n]` must lie within `max_pages`.
        prefix_table: `[R, P]` int32, the pages of each request's prompt, shared by its candidates.
        prefix_lens: `[R]` int32, tokens in them.
        prefix_index: `[N]` int32, each candidate's request; -1: none. The three are given together or not at all.
        scale: of the scores; default `D ** -0.5`.

    Returns:
        `[N, H, D]`, the dtype of `q`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match (values are not looked at).
        RuntimeError: an argument requires grad, or a forced backend cannot serve.
    """
    _check(q, k_new, v_new, ("k_new", "v_new"), k_pages, v_pages)
    num_candidates = q.shape[0]
    _check_index("block_table", block_table, q, num_candidates, None)
    _check_index("seq_lens", seq_lens, q, num_candidates)
    if len({x is None for x in (prefix_table, prefix_lens, prefix_index)}) > 1:
        raise ValueError("prefix_table, prefix_lens and prefix_index must be given together, and some are missing")
    if prefix_table is not None:
        _check_index("prefix_table", prefix_table, q, None, None)
        _check_index("prefix_lens", prefix_lens, q, prefix_table.shape[0])
        _check_index("prefix_index", prefix_index, q, num_candidates)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    tables = (block_table, seq_lens, prefix_table, prefix_lens, prefix_index)
    return _call(_DECODE, (q, k_new, v_new, k_pages, v_pages, *tables, scale))


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
) -> torch.Tensor:
    """Causal attention within each sequence of a ragged batch; their keys and values are stored from place 0 on.

    Args:
        q, k, v: `[T, H, D]`, of one dtype, the sequences one after another.
        cu_seqlens: `[S + 1]` int32: sequence s has rows `cu_seqlens[s]` to `cu_seqlens[s + 1]`, none perhaps; the last
            entry is T.
        k_pages, v_pages: `[num_pages, page_size, H, D]`, of one dtype.
        block_table: `[S, max_pages]` int32, the pages of each sequence.
        scale: of the scores; default `D ** -0.5`.

    Returns:
        `[T, H, D]`, the dtype of `q`.

    Raises:
        As `paged_attention_decode`.
    """
    _check(q, k, v, ("k", "v"), k_pages, v_pages)
    _check_index("block_table", block_table, q, None, None)
    _check_index("cu_seqlens", cu_seqlens, q, block_table.shape[0] + 1)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return _call(_PREFILL, (q, k, v, cu_seqlens, k_pages, v_pages, block_table, scale))
