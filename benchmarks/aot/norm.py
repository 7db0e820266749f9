"""The norms of CLVP, and one call of each entry of the table."""

import torch

from clvp_fast.kernels import norm

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def calls():
    for kind, width, residual in (("rms", 768, True), ("layer", 1024, True), ("layer", 1024, False)):
        for dtype in _NAMES:
            yield _add_norm(kind, width, dtype, residual)
    for width in (32, 2048, 4096, 8192):
        yield _add_norm("layer", width, torch.float32, True)
    for dtype in _NAMES:
        yield f"double_layer_norm {_NAMES[dtype]} 1024", lambda dtype=dtype: _double(1024, dtype)
    yield "double_layer_norm fp32 8192", lambda: _double(8192, torch.float32)


def _empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def _add_norm(kind, width, dtype, residual):
    def launch():
        x, weight = _empty(256, width, dtype=dtype), _empty(width, dtype=dtype)
        bias, other = (weight if kind == "layer" else None), (x if residual else None)
        norm.add_norm(x, other, weight, bias, 1e-5, kind, total=other, out=x)

    return f"add_norm {kind} {_NAMES[dtype]} {width}{' residual' if residual else ''}", launch


def _double(width, dtype):
    x, weight = _empty(256, width, dtype=dtype), _empty(width, dtype=dtype)
    norm.double_layer_norm(x, weight, weight, 1e-5, weight, weight, 1e-5, first=x, out=x)
