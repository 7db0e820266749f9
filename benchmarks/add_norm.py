"""Residual addition and norm: of the encoders over the rows of scoring, of the decoder over those of a step."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Task
from benchmarks.kernels import Case, name_of, ours, tasks as tasks_of
from clvp_fast.ops import add_norm

SHAPES = {
    "cpu": (("rms", 3200, 768), ("layer", 16, 1024)),
    "cuda": (("rms", 128_000, 768), ("rms", 3200, 768), ("layer", 256, 1024), ("layer", 16, 1024)),
    "smoke": (("rms", 3, 40), ("layer", 3, 40)),
}
EPS = 1e-5


def plain(kind, x, residual, weight, bias):
    total = x + residual
    if kind == "layer":
        return torch.stack((total, F.layer_norm(total, weight.shape, weight, bias, EPS)))
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(total.dtype) * weight
    return torch.stack((total, normed))


def compiled_rival(kind):
    def both(x, residual, weight, bias):
        return tuple(plain(kind, x, residual, weight, bias))

    return torch.compile(both, dynamic=False)


def difference(results, expected) -> float:
    return max(float((got.double() - want).norm() / want.norm()) for got, want in zip(results, expected, strict=True))


def cases(device: str, smoke: bool = False):
    for kind, num_rows, width in SHAPES["smoke" if smoke else device]:
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):

            def inputs(seed, num_rows=num_rows, width=width, dtype=dtype):
                generator = torch.Generator(device).manual_seed(seed)
                x, residual = torch.randn(2, num_rows, width, generator=generator, device=device, dtype=dtype)
                weight, bias = torch.randn(2, width, generator=generator, device=device, dtype=dtype)
                return x, residual, weight, bias

            def call(x, residual, weight, bias, kind=kind):
                bias = bias if kind == "layer" else None
                return add_norm(x, residual, weight=weight, bias=bias, eps=EPS, kind=kind)

            def reference(*arguments, kind=kind):
                return plain(kind, *(x.double() for x in arguments))

            providers, absent = ours(call, "add_norm", device)
            yield Case(
                shape=dict(kind=kind, rows=num_rows, width=width, dtype=name_of(dtype)),
                dtype=dtype,
                inputs=inputs,
                reference=reference,
                providers=providers | {"torch, compiled": compiled_rival(kind)},
                bytes=4 * num_rows * width * dtype.itemsize,
                absent=absent,
                error=difference,
                tolerance=4 * torch.finfo(dtype).eps,
            )


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    return tasks_of("add_norm", cases(device, smoke), device, smoke)
