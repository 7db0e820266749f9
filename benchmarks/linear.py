"""Linear layers of few rows: the kernels, which read weights as they lie, beside torch's own products.

A CPU has a kernel for all weights, a GPU for int8 alone, beside which torch's path widens the weights first.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, Task, task
from benchmarks.kernels import captured, name_of, ours
from clvp_fast import ops
from clvp_fast.engine.products import Product, in_int8

ROWS = {"cpu": (1, 4, 16, 64, 128), "cuda": (1, 4, 16, 64, 128, 256, 512)}
SHAPES = ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))
# So many weights that they come from memory, as in a decoding step: a GPU's second-level cache has room for many.
LAYERS = {"cpu": 8, "cuda": 128}


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    shapes = [(1, (64, 32))] if smoke else itertools.product(ROWS[device], SHAPES)
    layers = 2 if smoke else LAYERS[device]
    for num_rows, (out, width) in shapes:
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
            shape = {"rows": num_rows, "out": out, "in": width, "layers": layers, "dtype": name_of(dtype)}
            yield _task(device, shape, dtype, 1 if smoke else 5)


def _task(device: str, shape: dict, dtype: torch.dtype, repeats: int) -> Task:
    def torch_s(layers):
        return [F.linear(layers.x, weight, layers.bias) for weight in layers.weights]

    def plain(layers):
        return [ops.linear(layers.x, weight, layers.bias) for weight in layers.weights]

    def int8(layers):
        return [weight(layers.x) for weight in layers.quantized]

    ways = {"torch": (torch_s, dtype.itemsize)}
    if device == "cpu":
        ways["clvp_fast kernel"] = plain, dtype.itemsize
    named, absent = ours(int8, "linear", device)
    ways |= {f"{name}, int8 weights": (run, 1) for name, run in named.items()}
    absent = {f"{name}, int8 weights": why for name, why in absent.items()}
    makers = {name: partial(_made, device, shape, dtype, name, *way) for name, way in ways.items()}
    return task("linear", shape, makers, repeats, absent, torch.no_grad)


class Layers:
    """`layers` products of the same rows `x` `[rows, in]`, each with a weight `[out, in]` of its own."""

    def __init__(self, device: str, rows: int, out: int, width: int, layers: int, dtype: torch.dtype):
        draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(rows), device=device)
        self.weights = [draw(out, width).to(dtype) for _ in range(layers)]
        self.x, self.bias = draw(rows, width).to(dtype), draw(out).to(dtype)
        self.quantized = [in_int8(Product(weight, self.bias)) for weight in self.weights]

    def expected(self, int8: bool) -> torch.Tensor:
        """Return the first product in float64; int8 weights count as the weights that they represent."""
        weight, quantized = self.weights[0].double(), self.quantized[0]
        meant = quantized.weight.double() * quantized.scale[:, None] if int8 else weight
        return F.linear(self.x.double(), meant, self.bias.double())


_layers = lru_cache(maxsize=1)(Layers)


def _made(device: str, shape: dict, dtype: torch.dtype, name: str, way: Callable, itemsize: int) -> Provider:
    layers = _layers(device, shape["rows"], shape["out"], shape["in"], shape["layers"], dtype)
    run, expected = partial(way, layers), layers.expected("int8" in name)
    error = float((run()[0] - expected).abs().max() / expected.abs().max())
    replay = captured(run) if device == "cuda" else None
    counted = {"bytes": shape["layers"] * itemsize * shape["out"] * shape["in"]}
    return Provider(name, replay or run, error, 1e-5 if dtype == torch.float32 else 1e-2, counted=counted)
