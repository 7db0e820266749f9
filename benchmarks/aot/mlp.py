"""Every configuration of the feed-forward kernels: regimes by rows, types, gated or not, layouts of the weights."""

import torch

from clvp_fast.kernels import mlp

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ENCODER = dict(width=768, inner=1536, outer=768, activation="gelu", gated=True)
DECODER = dict(width=1024, inner=4096, outer=1024, activation="gelu_new", gated=False)


def _call(rows, dtype, width, inner, outer, activation, gated, conv=False, residual=True, stream=None, int8=False):
    """Make a call; `stream` is the type of residual and result (by default that of x), `int8` that of the weights."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(out, depth):
        if int8:
            return empty(out, depth, dtype=torch.int8)
        return empty(depth, out).t() if conv else empty(out, depth)

    def scale(out):
        return empty(out, dtype=FP32) if int8 else None

    def thunk():
        needed = mlp.workspace(rows, outer, inner, dtype.itemsize, int8)
        out = empty(rows, outer, dtype=stream or dtype)
        mlp.mlp(
            empty(rows, width), weight(inner * (1 + gated), width), empty(inner * (1 + gated)), weight(outer, inner),
            empty(outer), out if residual else None, activation, gated,
            hidden=empty(rows, inner), out=out, partial=empty(needed.partial, dtype=FP32),
            arrivals=empty(needed.arrivals, dtype=torch.int32), scale_in=scale(inner), scale_out=scale(outer),
        )  # fmt: skip

    return thunk


def calls():
    for name, model in (("gelu_mlp", DECODER), ("geglu_mlp", ENCODER)):
        yield f"{name} bfloat16, many rows", _call(128_000, BF16, **model)
        yield f"{name} float16, many rows", _call(128_000, FP16, **model)
        yield f"{name} float32, many rows", _call(128_000, FP32, **model)
        yield f"{name} bfloat16, 3200 rows", _call(3200, BF16, **model)
    for rows in (1, 32, 64, 256, 1000):
        yield f"gelu_mlp bfloat16, {rows} rows", _call(rows, BF16, **DECODER)
    # The engine's steps and prefills in half types.
    for dtype, name in ((BF16, "bfloat16"), (FP16, "float16")):
        for rows in (16, 64, 256, 3200, 8192):
            yield f"gelu_mlp {name}, {rows} rows, float32 residual", _call(rows, dtype, **DECODER, stream=FP32)
    for rows in (16, 256, 3200):
        yield f"gelu_mlp float32, {rows} rows", _call(rows, FP32, **DECODER)
    yield "gelu_mlp bfloat16, 16 rows, weights [in, out]", _call(16, BF16, **DECODER, conv=True)
    yield "geglu_mlp bfloat16, 16 rows", _call(16, BF16, **ENCODER)
    for rows in (16, 256, 128_000):
        yield f"gelu_mlp bfloat16, {rows} rows, odd sizes", _call(rows, BF16, 100, 300, 72, "silu", False)
        yield f"geglu_mlp float32, {rows} rows, odd sizes", _call(rows, FP32, 100, 300, 72, "gelu", True)
    yield "geglu_mlp bfloat16, 128000 rows, odd sizes", _call(128_000, BF16, 100, 300, 72, "gelu", True, residual=False)
    yield "geglu_mlp bfloat16, 128000 rows, a tail", _call(128_000, BF16, 784, 304, 80, "gelu", True)
    for rows in (1, 64, 256, 1000):
        yield f"gelu_mlp bfloat16, {rows} rows, int8 weights", _call(rows, BF16, **DECODER, stream=FP32, int8=True)
    for dtype, name in ((FP16, "float16"), (FP32, "float32")):
        for rows in (16, 256):
            yield f"gelu_mlp {name}, {rows} rows, int8 weights", _call(rows, dtype, **DECODER, stream=FP32, int8=True)
    for rows in (16, 300):
        yield (
            f"gelu_mlp bfloat16, {rows} rows, int8, odd sizes",
            _call(rows, BF16, 100, 600, 72, "silu", False, int8=True),
        )
