"""The type in which a training multiplies matrices: bfloat16 if this CPU has such products, else float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from clvp_fast.native.build import cpu_isas

# A CPU without such products converts at every step, and is slower than in float32.
PRODUCTS = torch.bfloat16 if "avx512bf16" in cpu_isas() else torch.float32


@contextmanager
def products() -> Iterator[None]:
    """Multiply in `PRODUCTS` within the context; parameters, sums and losses stay float32."""
    if PRODUCTS is torch.float32:
        yield
        return
    # In bfloat16 the backward pass of torch's fused attention is slower than that of its parts.
    with torch.autocast("cpu", PRODUCTS), sdpa_kernel(SDPBackend.MATH):
        yield
