"""Paged attention in plain torch: the references that state its mathematics, and torch's implementations."""

from itertools import pairwise

import torch
import torch.nn.functional as F


def _quantised(x, dtype, scale):
    """Quantise x `[..., num_heads, head_dim]` for pages of `dtype`."""
    if scale is None:
        return x.to(dtype)
    limit = torch.finfo(dtype).max
    return (x.float() / scale[:, None]).clamp(-limit, limit).to(dtype)


def _dequantised(stored, dtype, scale):
    """Dequantise stored values to `dtype`; without a scale they stay as they are."""
    return stored if scale is None else (stored.float() * scale[:, None]).to(dtype)


def _tokens(pages, scale, table, length, dtype):
    """Return the first `length` tokens of one row of a table, `[length, num_heads, head_dim]`."""
    places = torch.arange(length, device=pages.device)
    page_size = pages.shape[1]
    return _dequantised(pages[table[places // page_size].long(), places % page_size], dtype, scale)


def _store(pages, scale, table, places, new):
    """Write `new[i]` at position `places[i]` of row i of `table`."""
    page_size = pages.shape[1]
    page = table.gather(1, (places // page_size)[:, None]).squeeze(1).long()
    pages[page, places % page_size] = _quantised(new, pages.dtype, scale)


def _attend_exactly(q, k, v, scale):
    """Attend from q `[queries, heads, dim]` to k, v `[keys, heads, dim]`, causal from the end, in float32 at least."""
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(compute) * scale, k.to(compute))
    ahead = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(compute)).to(q.dtype)


def decode_reference(
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
):
    """Decode one candidate after another."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    page_size = k_pages.shape[1]
    stores = (k_pages, k_scale), (v_pages, v_scale)
    for n, length in enumerate(seq_lens.tolist()):
        if length < 0:
            continue
        page, slot = int(block_table[n, length // page_size]), length % page_size
        for (pages, s), new in zip(stores, (k_new, v_new), strict=True):
            pages[page, slot] = _quantised(new[n], pages.dtype, s)
        k, v = (_tokens(*store, block_table[n], length + 1, torch.float32) for store in stores)
        request = -1 if prefix_index is None else int(prefix_index[n])
        if request >= 0:
            prefix = prefix_table[request], int(prefix_lens[request]), torch.float32
            k, v = (torch.cat((_tokens(*store, *prefix), own)) for store, own in zip(stores, (k, v), strict=True))
        out[n] = _attend_exactly(q[n : n + 1], k, v, scale)[0]
    return out


def decode_torch(
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
):
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    rows = (seq_lens >= 0).nonzero().squeeze(1)
    if rows.numel() == 0:
        return out
    lengths, table = seq_lens[rows].long(), block_table[rows]
    stores = (k_pages, k_scale), (v_pages, v_scale)
    for store, new in zip(stores, (k_new, v_new), strict=True):
        _store(*store, table, lengths, new[rows])

    # Each candidate's own tokens, padded to the longest. The padding is zeroed, because unused slots may hold NaN.
    page_size = k_pages.shape[1]
    num_pages = int(lengths.max()) // page_size + 1
    stored = torch.arange(num_pages * page_size, device=q.device) <= lengths[:, None]
    pages = table[:, :num_pages].where(stored[:, ::page_size], 0).long()
    unused = ~stored[:, :, None, None]
    own_k, own_v = (
        _dequantised(x[pages].flatten(1, 2), q.dtype, s).to(q.dtype).masked_fill_(unused, 0) for x, s in stores
    )
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
            prefix = prefix_table[request], length, q.dtype
            prefix_k, prefix_v = (_tokens(*store, *prefix).to(q.dtype) for store in stores)
            prefix_scores = torch.einsum("nhd,khd->nhk", q[members], prefix_k).to(wide)
            scores = torch.cat((prefix_scores, scores), dim=-1)
        weights = scores.softmax(-1).to(q.dtype)
        mixed = torch.einsum("nhk,nkhd->nhd", weights[..., length:], v)
        if length:
            mixed = mixed + torch.einsum("nhk,khd->nhd", weights[..., :length], prefix_v)
        out[rows[members]] = mixed
    return out


def prefill_reference(q, k, v, cu_seqlens, k_pages, v_pages, block_table, scale, k_scale=None, v_scale=None):
    """Prefill one sequence after another."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    page_size = k_pages.shape[1]
    bounds = cu_seqlens.tolist()
    for row, (start, end) in enumerate(pairwise(bounds)):
        for place in range(end - start):
            page, slot = int(block_table[row, place // page_size]), place % page_size
            k_pages[page, slot] = _quantised(k[start + place], k_pages.dtype, k_scale)
            v_pages[page, slot] = _quantised(v[start + place], v_pages.dtype, v_scale)
        out[start:end] = _attend_exactly(q[start:end], k[start:end], v[start:end], scale)
    return out


def prefill_torch(q, k, v, cu_seqlens, k_pages, v_pages, block_table, scale, k_scale=None, v_scale=None):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    bounds = cu_seqlens.tolist()
    for row, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        places = torch.arange(end - start, device=q.device)
        table = block_table[row].expand(len(places), -1)
        _store(k_pages, k_scale, table, places, k[start:end])
        _store(v_pages, v_scale, table, places, v[start:end])
        heads_first = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out[start:end] = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)[0].transpose(0, 1)
    return out
