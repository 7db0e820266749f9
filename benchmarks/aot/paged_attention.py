"""Launches of kernels/paged_attention.py and paged_prefill.py: every entry of their tables, page types, branches."""

import torch

from clvp_fast.kernels.paged_attention import paged_attention_decode
from clvp_fast.kernels.paged_prefill import paged_prefill
from clvp_fast.kernels.target import architecture

CANDIDATES, REQUESTS, HEADS, OWN_PAGES, PREFIX_PAGES, PAGES = 256, 4, 16, 38, 26, 4096
FLOAT8 = torch.float8_e4m3fn
# (type, head_dim, page type)
KINDS = [
    (torch.bfloat16, 64, None),
    (torch.bfloat16, 32, None),
    (torch.bfloat16, 80, None),
    (torch.bfloat16, 128, None),
    (torch.bfloat16, 64, FLOAT8),
    (torch.float16, 64, None),
    (torch.float32, 32, None),
    (torch.float32, 64, None),
    (torch.float32, 128, None),
]


def empty(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _pages(dtype, head_dim, page_dtype, page_size):
    pages = [empty(PAGES, page_size, HEADS, head_dim, dtype=page_dtype or dtype) for _ in range(2)]
    scales = [empty(HEADS, dtype=torch.float32) if page_dtype else None for _ in range(2)]
    return pages, scales


def decode(dtype, head_dim, page_dtype, page_size=16, own_pages=OWN_PAGES, prefix_pages=PREFIX_PAGES):
    pages, scales = _pages(dtype, head_dim, page_dtype, page_size)
    rows = [empty(CANDIDATES, HEADS, head_dim, dtype=dtype) for _ in range(4)]
    prefix = [None] * 3
    if prefix_pages:
        prefix = [empty(REQUESTS, prefix_pages), empty(REQUESTS), empty(CANDIDATES)]
    paged_attention_decode(
        *rows[:3],
        *pages,
        empty(CANDIDATES, own_pages),
        empty(CANDIDATES),
        *prefix,
        head_dim**-0.5,
        *scales,
        out=rows[3],
        partial=empty(1, dtype=torch.float32),
        arrivals=empty(CANDIDATES, HEADS),
    )


def prefill(dtype, head_dim, page_dtype, page_size=16):
    pages, scales = _pages(dtype, head_dim, page_dtype, page_size)
    rows = [empty(4096, HEADS, head_dim, dtype=dtype) for _ in range(4)]
    paged_prefill(*rows[:3], empty(17), *pages, empty(16, PREFIX_PAGES), head_dim**-0.5, *scales, out=rows[3])


def calls():
    for kind in KINDS:
        dtype, head_dim, page_dtype = kind
        if page_dtype is not None and architecture() < 89:
            continue
        name = f"{HEADS} × {head_dim}, {str(dtype)[6:]}" + (", float8 pages" if page_dtype else "")
        yield f"decode, {name}", lambda kind=kind: decode(*kind)
        yield f"prefill, {name}", lambda kind=kind: prefill(*kind)
    hot = KINDS[0]
    yield "decode, 16 × 64, bfloat16, pages of 32", lambda: decode(*hot, page_size=32)
    yield "decode, 16 × 64, bfloat16, no prefix, one part", lambda: decode(*hot, own_pages=16, prefix_pages=0)
