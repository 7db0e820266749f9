"""Every configuration of the linear layer: over int8 weights and those of its type, rows, shapes, odd sizes."""

import torch

from clvp_fast.kernels import linear

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _call(rows, dtype, columns, depth, activation="linear", bias=True, int8=True):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def thunk():
        weight, scale = empty(columns, depth), None
        if int8:
            weight, scale = empty(columns, depth, dtype=torch.int8), empty(columns, dtype=torch.float32)
        x, out = empty(rows, depth), empty(rows, columns)
        linear.linear(x, weight, scale, empty(columns) if bias else None, activation, out=out)

    return thunk


def calls():
    for name, dtype in TYPES.items():
        for rows in (1, 32, 64, 256, 8192):
            yield f"{name}, {rows} rows, 1024 to 3072", _call(rows, dtype, 3072, 1024)
        yield f"{name}, 16 rows, 1024 to 4096, gelu_new", _call(16, dtype, 4096, 1024, "gelu_new")
        yield f"{name}, 256 rows, 1024 to 4096, gelu_new", _call(256, dtype, 4096, 1024, "gelu_new")
        for rows in (16, 64):
            yield f"{name}, {rows} rows, 4096 to 1024, no bias", _call(rows, dtype, 1024, 4096, bias=False)
        yield f"{name}, odd sizes", _call(16, dtype, 300, 100, "gelu_new")
        yield f"{name}, a tail", _call(16, dtype, 304, 784, "gelu_new")
    for name, dtype in TYPES.items():
        for rows in (1, 64, 256, 3200):
            yield f"{name} weights, {rows} rows, 1024 to 3072", _call(rows, dtype, 3072, 1024, int8=False)
            yield f"{name} weights, {rows} rows, 1024 to 8194", _call(rows, dtype, 8194, 1024, int8=False)
