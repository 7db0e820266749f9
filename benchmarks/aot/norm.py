"""The norms of CLVP, and one call of each entry of the table."""

import torch

from clvp_fast.kernels import norm

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def calls():
    for kind, width, residual in (("rms", 768, True), ("layer", 1024, True), ("layer", 1024, False)):
        for dtype in _NAMES:
            yield _add_norm(kind, width, dtype, residual)
    # The engine's steps in half types: the residual is float32, weights and results of the norms are not.
    for dtype in (torch.bfloat16, torch.float16):
        yield _add_norm("layer", 1024, dtype, True, stream=torch.float32)
        yield _add_norm("layer", 1024, dtype, False, stream=torch.float32)
    yield _add_norm("rms", 768, torch.bfloat16, True, stream=torch.float32)
    for width in (32, 2048, 4096, 8192):
        yield _add_norm("layer", width, torch.float32, True)
    for dtype in _NAMES:
        yield f"double_layer_norm {_NAMES[dtype]} 1024", lambda dtype=dtype: _double(1024, dtype, dtype)
    yield "double_layer_norm fp32 8192", lambda: _double(8192, torch.float32, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        yield f"double_layer_norm fp32 1024 to {_NAMES[dtype]}", lambda dtype=dtype: _double(1024, torch.float32, dtype)
    for dtype in _NAMES:
        for channels in (96, 192, 384):  # HTSAT
            yield f"merge_norm {_NAMES[dtype]} 4 × {channels}", lambda c=channels, dtype=dtype: _merge(c, dtype)


def _empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def _add_norm(kind, width, dtype, residual, stream=None):
    """Make a call; `stream` is the type of the residual (of x without one), by default that of all else."""
    stream = stream or dtype

    def launch():
        out, weight = _empty(256, width, dtype=dtype), _empty(width, dtype=dtype)
        total, bias = _empty(256, width, dtype=stream), (weight if kind == "layer" else None)
        x, other = (out, total) if residual else (total, None)
        norm.add_norm(x, other, weight, bias, 1e-5, kind, total=other, out=out)

    wide = "" if stream == dtype else f" {_NAMES[stream]}{'' if residual else ' x'}"
    return f"add_norm {kind} {_NAMES[dtype]} {width}{wide}{' residual' if residual else ''}", launch


def _double(width, stream, dtype):
    x, out, weight = _empty(256, width, dtype=stream), _empty(256, width, dtype=dtype), _empty(width, dtype=dtype)
    norm.double_layer_norm(x, weight, weight, 1e-5, weight, weight, 1e-5, first=x, out=out)


def _merge(channels, dtype):
    x, weight = _empty(8, 16, 16, channels, dtype=dtype), _empty(4 * channels, dtype=dtype)
    norm.merge_norm(x, weight, weight, 1e-5, out=_empty(8, 8, 8, 4 * channels, dtype=dtype))
