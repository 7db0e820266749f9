"""FlashInfer's attention of a decode step over pages, with and without a shared prefix, at half types on a GPU.

Written to its documentation (docs.flashinfer.ai: decode, cascade, page). The plan of its wrappers on the host, once a
step for all layers, is not timed; writing the new keys and values is, as of ours. Arguments are those of the workload
`paged_attention`.
"""

from collections.abc import Callable
from functools import cache

import torch

WORKSPACE_BYTES = 128 * 2**20


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    """Scratch of a call, which all may share: one runs after the other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _ends(counts: torch.Tensor) -> torch.Tensor:
    """Return `[n + 1]` int32: where each of n runs of so many entries begins, and the last one ends."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def _listed(table: torch.Tensor, lengths: torch.Tensor, page_size: int) -> tuple[torch.Tensor, ...]:
    """Page tables as FlashInfer takes them: `indptr`, `indices`, `last_page_len`, all int32.

    table: `[rows, width]`. lengths: `[rows]`, tokens of each row, 1 at least.
    """
    pages = -(-lengths.long() // page_size)
    used = torch.arange(table.shape[1], device=table.device) < pages[:, None]
    return _ends(pages), table[used].int(), ((lengths - 1) % page_size + 1).int()


def _places(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and place of each row's new token, int32."""
    return torch.arange(len(lengths), device=lengths.device).int(), lengths.int()


def paged(q, k, v, k_pages, v_pages, own, lengths, prefix, prompts, index, arrivals) -> Callable[[], torch.Tensor]:
    """Plan decoding over one list of pages a candidate, into which the prompt has been copied for each.

    Its own tokens follow the prompt's on the same page, which shared pages have no place for.
    """
    import flashinfer

    _, page_size, heads, head_dim = k_pages.shape
    before = prompts[index.long()] + lengths
    width = int(before.max()) // page_size + 1
    table = torch.arange(len(q) * width, device=q.device).int().view(len(q), width)
    cache = tuple(
        _joined(pages, own, lengths, prefix, prompts, index, width).to(q.dtype) for pages in (k_pages, v_pages)
    )
    indptr, indices, last = _listed(table, before + 1, page_size)
    rows, places = _places(before)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "NHD")
    wrapper.plan(
        indptr, indices, last, heads, heads, head_dim, page_size, q_data_type=q.dtype, kv_data_type=k_pages.dtype
    )

    def call():
        flashinfer.append_paged_kv_cache(k, v, rows, places, cache, indices, indptr, last, kv_layout="NHD")
        return wrapper.run(q, cache)

    return call


def _joined(pages, own, lengths, prefix, prompts, index, width: int) -> torch.Tensor:
    """Return each candidate's prompt and tokens in its pages, `[candidates * width, page_size, heads, head_dim]`."""
    page_size = pages.shape[1]
    joined = pages.new_zeros(len(own), width * page_size, *pages.shape[2:])
    for row, request in enumerate(index.tolist()):
        prompt, length = int(prompts[request]), int(lengths[row])
        joined[row, :prompt] = pages[prefix[request].long()].flatten(0, 1)[:prompt]
        joined[row, prompt : prompt + length] = pages[own[row].long()].flatten(0, 1)[:length]
    return joined.view(-1, *pages.shape[1:])


def cascade(q, k, v, k_pages, v_pages, own, lengths, prefix, prompts, index, arrivals) -> Callable[[], torch.Tensor]:
    """Plan decoding in two levels over our own pages: a request's prompt once for all candidates, then their own."""
    import flashinfer

    _, page_size, heads, head_dim = k_pages.shape
    upper, lower = _listed(prefix, prompts, page_size), _listed(own, lengths + 1, page_size)
    queries = _ends(torch.bincount(index.long(), minlength=len(prompts)))
    each = torch.arange(len(q) + 1, device=q.device).int()
    rows, places = _places(lengths)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(q.device), "NHD")
    levels = [list(level) for level in zip(upper, lower, strict=True)]
    wrapper.plan(
        [queries, each], *levels, heads, heads, head_dim, page_size, q_data_type=q.dtype, kv_data_type=k_pages.dtype
    )
    indptr, indices, last = lower

    def call():
        pages = k_pages, v_pages
        flashinfer.append_paged_kv_cache(k, v, rows, places, pages, indices, indptr, last, kv_layout="NHD")
        return wrapper.run(q, pages)

    return call
