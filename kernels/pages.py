"""Parts that the kernels over pages of keys and values share.

q, k, v `[rows, heads, head_dim]` of float32, float16 or bfloat16; pages `[num_pages, page_size, heads, head_dim]` of
that type, or float8 (e4m3) with a scale a head: value = stored * scale. Sums, softmax and partial results are float32.
"""

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
FLOAT8_MAX = tl.constexpr(448.0)


@triton.jit
def as_stored(x, scale, dtype: tl.constexpr, FLOAT8: tl.constexpr):
    """Convert x to the form that a page keeps."""
    if FLOAT8:
        x = tl.clamp(tl.div_rn(x.to(tl.float32), scale), -FLOAT8_MAX, FLOAT8_MAX)
    return x.to(dtype)


@triton.jit
def online_softmax(q, k, v, allowed, scale, top, total, mixed, PRECISION: tl.constexpr):
    """Do one step of the online softmax, in base 2: largest score, sum of weights, weighted values."""
    scores = tl.dot(q, k, input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_N]
    scores = tl.where(allowed, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet keeps weights of 0, which NaN would replace.
    origin = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(scores - origin[:, None])
    shrink = tl.exp2(top - origin)
    total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
    return new_top, total, mixed


def precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"
