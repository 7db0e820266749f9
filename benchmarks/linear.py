"""Linear layers of few rows: `x W^T` as torch takes it against `W x^T`, over the decoder's shapes."""

import itertools

import torch
import torch.nn.functional as F

from benchmarks.harness import Provider, measure
from clvp_fast.ops.linear import linear_columns

SHAPES = ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))
LAYERS = 8


@torch.no_grad()
def rows(device: str, repeats: int = 5) -> list[dict]:
    measured = []
    for num_rows, (out, width) in itertools.product((1, 4, 16, 64, 96, 128, 256), SHAPES):
        generator = torch.Generator().manual_seed(num_rows)
        # As many weights as a few layers have: they come from memory, as in a decoding step.
        weights = [torch.randn(out, width, generator=generator).to(device) for _ in range(LAYERS)]
        x = torch.randn(num_rows, width, generator=generator).to(device)
        bias = torch.randn(out, generator=generator).to(device)

        def by_rows(x=x, weights=weights, bias=bias):
            return [F.linear(x, weight, bias) for weight in weights]

        def by_columns(x=x, weights=weights, bias=bias):
            return [linear_columns(x.t(), weight, bias).t().contiguous() for weight in weights]

        expected = F.linear(x.double(), weights[0].double(), bias.double())
        errors = [float((run()[0] - expected).abs().max() / expected.abs().max()) for run in (by_rows, by_columns)]
        measured += measure(
            "linear",
            {"rows": num_rows, "out": out, "in": width, "layers": LAYERS},
            [Provider("x W^T", by_rows, errors[0], 1e-5), Provider("W x^T", by_columns, errors[1], 1e-5)],
            repeats,
            bytes=LAYERS * 4 * out * width,
        )
    return measured
