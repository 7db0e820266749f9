"""Window attention of CLAP's stages and of neighbours in size: each type, shifted or not, and what is padded."""

import torch

from clvp_fast.kernels import window_attention as kernels

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def calls():
    for dtype in _NAMES:
        for shift in (4, 0):
            yield _call(dtype, 24, 8, shift)  # HTSAT
        yield _call(dtype, 32, 8, 4)  # Swin
        yield _call(dtype, 32, 7, 3)
        yield _call(dtype, 16, 4, 2)
    yield _call(torch.bfloat16, 24, 8, 4, bias=torch.float32)
    yield _call(torch.bfloat16, 20, 8, 4)  # rows of 40 bytes


def _call(dtype, head_dim, window, shift, bias=None):
    def launch():
        def empty(*shape, dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        packed = empty(32, 8 * window, 8 * window, 3, 4, head_dim, dtype=dtype)
        q, k, v = packed.unbind(3)
        out = empty(*q.shape, dtype=dtype)
        added = empty(4, window**2, window**2, dtype=bias or dtype)
        kernels.window_attention(q, k, v, added, window, shift, head_dim**-0.5, -100.0, out=out)

    parts = [_NAMES[dtype], f"{head_dim}, {window} × {window}"] + ["shifted"] * bool(shift)
    parts += [f"{_NAMES[bias]} bias"] if bias else []
    return ", ".join(parts), launch
