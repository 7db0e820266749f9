"""`gelu_mlp` over int8 weights in kernels: budgets against float64 in every regime, split sums, bits, registration."""

from itertools import product

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import mlp
from clvp_fast.ops import gelu_mlp
from tests.kit import assert_within_budget, random
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck
from tests.ops.test_linear import quantized

HALF_TYPES = (torch.float16, torch.bfloat16)


def block(backend, dtype, rows, width=128, inner=256, outer=40):
    """Make the arguments of `gelu_mlp` and a residual."""
    (w_in, scale_in), (w_out, scale_out) = (
        quantized(*shape, seed, backend.device) for shape, seed in (((inner, width), 2), ((outer, inner), 4))
    )
    x, b_in, b_out, residual = (
        random(*shape, seed=seed, dtype=dtype, device=backend.device)
        for seed, shape in enumerate(((*rows, width), (inner,), (outer,), (*rows, outer)), 6)
    )
    return (x, w_in, b_in, w_out, b_out), dict(residual=residual, scale_in=scale_in, scale_out=scale_out)


def check(tensors, named):
    """Check results within twice the error of plain torch, which widens the weights."""
    out = gelu_mlp(*tensors, **named)
    wide = [x if x.dtype == torch.int8 else x.double() for x in tensors]
    with clvp_fast.backend("reference"):
        reference = gelu_mlp(*wide, **named | {"residual": named["residual"].double()})
    with clvp_fast.backend("torch"):
        baseline = gelu_mlp(*tensors, **named)
    assert out.is_contiguous()
    assert_within_budget(out, reference, baseline)


# Each tile's edges, and several tiles.
@pytest.mark.parametrize("rows", [(1,), (2, 8), (17,), (33,), (64,), (65,), (2, 100)])
@on(*TRITON, types="dtype")
def test_every_regime(backend, dtype, rows):
    check(*block(backend, dtype, rows))


@pytest.mark.parametrize(
    "rows, inner",
    [
        *((3, 512), (3, 1000), (3, 1040), (100, 1040)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in product((100, 513), (512, 1000))),
        pytest.param(513, 1040, marks=pytest.mark.slow),
    ],
)
@on(*TRITON, types="dtype")
def test_a_sum_over_several_programs(backend, dtype, rows, inner):
    split = mlp.workspace(rows, 24, inner, dtype.itemsize, True).partial > 0
    assert split == (rows <= 512)
    check(*block(backend, dtype, (rows,), width=16, inner=inner, outer=24))


@pytest.mark.parametrize("rows", [3, 100])
@on(*TRITON, types="dtype", among=HALF_TYPES)
def test_float32_residual_beside_a_half_type(backend, dtype, rows):
    """Add to a large residual as exactly as the product alone."""
    tensors, named = block(backend, dtype, (rows,), inner=512)
    large = named["residual"].float() * 300
    out = gelu_mlp(*tensors, **named | {"residual": large})
    alone = gelu_mlp(*tensors, **named | {"residual": torch.zeros_like(large)})
    assert out.dtype == torch.float32 and alone.abs().max() > 1
    torch.testing.assert_close(out - large, alone, rtol=0, atol=2**-23 * float(large.abs().max()))
    assert not torch.equal(alone, alone.to(dtype).float())


@on(*TRITON, types="dtype")
def test_a_row_has_the_bits_that_it_has_alone(backend, dtype):
    """Try every regime of rows; all share the instruction and the order of the sums."""
    tensors, named = block(backend, dtype, (140,), width=64, inner=512)
    both = gelu_mlp(*tensors, **named)
    for count in (1, 17, 40, 65, 129):
        part = slice(139 - count, -1)
        found = gelu_mlp(tensors[0][part], *tensors[1:], **named | {"residual": named["residual"][part]})
        assert torch.equal(found, both[part])


@on(*TRITON, types="dtype", among=(torch.float16,))
def test_registered(backend, dtype):
    tensors, named = block(backend, dtype, (2, 3), inner=512)
    args = (*tensors, named["residual"], "gelu_new", named["scale_in"], named["scale_out"])
    opcheck(backend, torch.ops.clvp_fast.gelu_mlp.default, args)
