"""The shared part of `benchmarks/geglu_mlp.py` and `benchmarks/gelu_mlp.py`: cases of a feed-forward block."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.kernels import Case, name_of, ours


def cases(
    call: Callable, rival: Callable, operator: str, device: str, counts: tuple[int, ...], widths: tuple[int, int, int]
) -> Iterator[Case]:
    """Return cases of `call(x, w_in, b_in, w_out, b_out, residual)`, ours and `rival`, which is compiled.

    counts: of rows. widths: of the model, of the first product's result, of the second's operand.
    """
    width, hidden, inner = widths
    for num_rows in counts:
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):

            def inputs(seed, num_rows=num_rows, dtype=dtype):
                generator = torch.Generator(device).manual_seed(seed)
                x, residual = torch.randn(2, num_rows, width, generator=generator, device=device, dtype=dtype)
                w_in = torch.randn(hidden, width, generator=generator, device=device, dtype=dtype) * width**-0.5
                w_out = torch.randn(width, inner, generator=generator, device=device, dtype=dtype) * inner**-0.5
                b_in, b_out = (torch.randn(n, generator=generator, device=device, dtype=dtype) for n in (hidden, width))
                return x, w_in, b_in, w_out, b_out, residual

            providers, absent = ours(call, operator, device)
            weights = width * hidden + inner * width
            yield Case(
                shape=dict(rows=num_rows, width=width, inner=inner, dtype=name_of(dtype)),
                dtype=dtype,
                inputs=inputs,
                reference=lambda *arguments: rival(*(x.double() for x in arguments)),
                providers=providers | {"torch, compiled": torch.compile(rival, dynamic=False)},
                bytes=(3 * num_rows * width + weights + hidden + width) * dtype.itemsize,
                flop=2 * num_rows * weights,
                absent=absent,
                repeats=10 if device == "cpu" and num_rows > 1000 else 30,
            )


def geglu(x, w_in, b_in, w_out, b_out, residual):
    value, gate = F.linear(x, w_in, b_in).chunk(2, -1)
    return F.linear(value * F.gelu(gate), w_out, b_out) + residual


def gelu(x, w_in, b_in, w_out, b_out, residual):
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out) + residual
