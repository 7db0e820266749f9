"""Linear layers of few rows: the kernels, which read weights as they lie, beside torch's own products.

A CPU has a kernel for all weights, a GPU for int8 alone, beside which torch's path widens the weights first.
"""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, Task, measure
from benchmarks.kernels import captured, name_of, ours
from clvp_fast import ops
from clvp_fast.engine.products import Int8Linear

SHAPES = ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))
# So many weights that they come from memory, as in a decoding step: a GPU's second-level cache has room for many.
LAYERS = {"cpu": 8, "cuda": 128}


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    shapes = [(1, (64, 32))] if smoke else itertools.product((1, 4, 16, 64, 128, 256, 512), SHAPES)
    layers = 2 if smoke else LAYERS[device]
    for num_rows, (out, width) in shapes:
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
            shape = {"rows": num_rows, "out": out, "in": width, "layers": layers, "dtype": name_of(dtype)}
            yield Task(shape, partial(rows, device, shape, dtype, 1 if smoke else 5))


@torch.no_grad()
def rows(device: str, shape: dict, dtype: torch.dtype, repeats: int) -> list[dict]:
    num_rows, out, width, layers = shape["rows"], shape["out"], shape["in"], shape["layers"]
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(num_rows), device=device)
    weights = [draw(out, width).to(dtype) for _ in range(layers)]
    x, bias = draw(num_rows, width).to(dtype), draw(out).to(dtype)
    quantized = [Int8Linear(weight, bias) for weight in weights]

    def torch_s():
        return [F.linear(x, weight, bias) for weight in weights]

    def plain():
        return [ops.linear(x, weight, bias) for weight in weights]

    def int8():
        return [weight(x) for weight in quantized]

    ways, absent = [("torch", torch_s, dtype.itemsize)], {}
    if device == "cpu":
        ways += [("kernel", plain, dtype.itemsize), ("kernel, int8 weights", int8, 1)]
    else:
        named, absent = ours(int8, "linear", device)
        ways += [(f"{name.removeprefix('clvp_fast ')}, int8 weights", run, 1) for name, run in named.items()]
    expected = F.linear(x.double(), weights[0].double(), bias.double())
    meant = quantized[0].weight.double() * quantized[0].scale[:, None]
    of_int8 = F.linear(x.double(), meant, bias.double())
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    providers = []
    for name, run, itemsize in ways:
        answer = of_int8 if "int8" in name else expected
        error = float((run()[0] - answer).abs().max() / answer.abs().max())
        replay = captured(run) if device == "cuda" else None
        counted = {"bytes": layers * itemsize * out * width}
        providers.append(Provider(name, replay or run, error, allowed, counted=counted))
    return measure("linear", shape, providers, repeats, absent=absent)
