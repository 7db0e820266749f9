"""Linear layers give one answer, whichever way round the product is taken."""

import pytest
import torch
import torch.nn.functional as F

from clvp_fast import ops
from clvp_fast.ops.linear import SWAPPED_ROWS, swaps


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def operands(rows: int, dtype=torch.float32, leading=()):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(*leading, rows, 24, generator=generator)
    weight, bias = torch.randn(40, 24, generator=generator), torch.randn(40, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 256, 257])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,)])
def test_equals_the_product_in_float64(rows, with_bias, leading):
    x, weight, bias = operands(rows, leading=leading)
    bias = bias if with_bias else None
    assert swaps(x, weight) == (rows in SWAPPED_ROWS)
    got = ops.linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == expected.shape and got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_plain_product(dtype):
    x, weight, bias = operands(32, dtype)
    assert not swaps(x, weight)
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))


def test_gradients_flow():
    x, weight, bias = operands(32)
    weight.requires_grad_()
    assert not swaps(x, weight)
    ops.linear(x, weight, bias).square().sum().backward()
    expected = 2 * F.linear(x, weight, bias).detach().t() @ x
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-3)


def test_compiles_whole():
    x, weight, bias = operands(32)
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, bias), ops.linear(x, weight, bias), rtol=0, atol=2e-5)


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "quick_gelu"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_decoder_mlp_of_few_rows(activation, with_residual):
    x, w_in, b_in = operands(32, leading=(1,))
    generator = torch.Generator().manual_seed(0)
    w_out, b_out = torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator)
    residual = torch.randn(x.shape, generator=generator) if with_residual else None
    before = None if residual is None else residual.clone()
    arguments = (x, w_in, b_in, w_out, b_out)
    got = ops.gelu_mlp(*arguments, residual=residual, activation=activation)
    with ops.backend("reference"):
        expected = ops.gelu_mlp(*(t.double() for t in arguments), activation=activation)
    expected = expected if residual is None else expected + residual
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-4)
    assert residual is None or torch.equal(residual, before)
