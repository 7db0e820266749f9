"""Linear layers of few rows on a CPU: the kernel, which reads weights as they lie, beside torch's own products."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, Task, measure
from benchmarks.kernels import name_of
from clvp_fast import ops
from clvp_fast.engine.products import Int8Linear

SHAPES = ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))
LAYERS = 8


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    shapes = [(1, (64, 32))] if smoke else itertools.product((1, 4, 16, 64, 128, 256, 512), SHAPES)
    for num_rows, (out, width) in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            shape = {"rows": num_rows, "out": out, "in": width, "layers": LAYERS, "dtype": name_of(dtype)}
            yield Task(shape, partial(rows, device, shape, dtype, 1 if smoke else 5))


@torch.no_grad()
def rows(device: str, shape: dict, dtype: torch.dtype, repeats: int) -> list[dict]:
    num_rows, out, width = shape["rows"], shape["out"], shape["in"]
    generator = torch.Generator().manual_seed(num_rows)
    # As many weights as a few layers have: they come from memory, as in a decoding step.
    exact = [torch.randn(out, width, generator=generator) for _ in range(LAYERS)]
    weights = [weight.to(device, dtype) for weight in exact]
    x = torch.randn(num_rows, width, generator=generator).to(device, dtype)
    bias = torch.randn(out, generator=generator).to(device, dtype)
    quantized = [Int8Linear(weight, bias) for weight in weights]

    def torch_s():
        return [F.linear(x, weight, bias) for weight in weights]

    def ours():
        return [ops.linear(x, weight, bias) for weight in weights]

    def int8():
        return [weight(x) for weight in quantized]

    expected = F.linear(x.double(), weights[0].double(), bias.double())
    meant = quantized[0].weight.double() * quantized[0].scale[:, None]
    of_int8 = F.linear(x.double(), meant, bias.double())
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    providers = [
        Provider(
            name,
            run,
            float((run()[0] - answer).abs().max() / answer.abs().max()),
            allowed,
            counted={"bytes": LAYERS * itemsize * out * width},
        )
        for name, run, answer, itemsize in (
            ("torch", torch_s, expected, dtype.itemsize),
            ("kernel", ours, expected, dtype.itemsize),
            ("kernel, int8 weights", int8, of_int8, 1),
        )
    ]
    return measure("linear", shape, providers, repeats)
