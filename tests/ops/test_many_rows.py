"""The CPU's kernel of many rows, one layer and two, on every instruction set of this machine."""

import pytest
import torch

from clvp_fast.ops.linear import _torch, reference as linear_reference
from clvp_fast.ops.many_rows import layers
from clvp_fast.ops.mlp import _geglu_torch, _gelu_torch, geglu_reference, gelu_reference
from tests.kit import assert_within_budget, at_threads, linear_operands, random, strided
from tests.kit.backends import on


def operands(rows, columns, inner, outs, dtype, gated=False):
    """x, and weights and biases of two layers."""
    x, w_in, b_in, _ = linear_operands(rows, columns, (1 + gated) * inner, dtype, False)
    _, w_out, b_out, _ = linear_operands(1, inner, outs, dtype, False)
    return x, w_in, b_in, w_out, b_out


def wide(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


# Around the tiles (4 or 8 rows; 12, 24 or 48 columns) and an item (up to 128 rows); the audio tower's own widths.
SIZES = [(1, 32, 32, 33), (7, 64, 32, 13), (8, 96, 384, 96), (9, 32, 64, 49), (130, 64, 96, 23), (600, 96, 32, 48)]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("rows, columns, inner, outs", SIZES)
@pytest.mark.parametrize("gated", [False, True])
@on("cpu", types="dtype")
def test_two_layers_are_the_reference(backend, dtype, gated, rows, columns, inner, outs, activation):
    args = operands(rows, columns, inner, outs, dtype, gated)
    reference, torch_path = (geglu_reference, _geglu_torch) if gated else (gelu_reference, _gelu_torch)
    others = (torch.float32,) if dtype == torch.float32 else (torch.bfloat16, torch.float32)
    for residual in (None, *(random(rows, outs, seed=7, dtype=other) for other in others)):
        out = layers(*args, residual, activation, gated)
        expected = reference(*wide(*args, residual), activation)
        assert_within_budget(out, expected, torch_path(*args, residual, activation))


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new"])
@pytest.mark.parametrize("rows, columns, _, outs", SIZES)
@on("cpu", types="dtype")
def test_one_layer_is_the_reference(backend, dtype, rows, columns, _, outs, activation):
    x, weight, bias, _ = linear_operands(rows, columns, outs, dtype, False)
    for b, residual in ((bias, None), (None, random(rows, outs, seed=9))):
        out = layers(x, weight, b, None, None, residual, activation)
        expected = linear_reference(*wide(x, weight, b), None, activation, *wide(residual))
        if residual is None:
            assert_within_budget(out, expected, _torch(x, weight, b, None, activation))
        else:  # float32 beside a half type too: the product is as exact as in float32
            room = 5e-5 if dtype == torch.bfloat16 and activation == "gelu" else 3e-6
            assert out.dtype == torch.float32 and (out - expected).abs().max() <= room * (1 + expected.abs().max())


@pytest.mark.parametrize("gated", [False, True])
@on("cpu", types="dtype")
def test_a_row_has_the_bits_that_it_has_alone(backend, dtype, gated):
    x, *weights = operands(300, 64, 96, 50, dtype, gated)
    residual = random(300, 50, seed=7, dtype=dtype)
    together = layers(x, *weights, residual, "gelu", gated)
    for row in (0, 1, 7, 8, 127, 128, 299):
        alone = layers(x[row : row + 1], *weights, residual[row : row + 1], "gelu", gated)
        assert torch.equal(alone[0], together[row])


@on("cpu")
def test_threads_change_no_bit(backend):
    args = operands(700, 64, 96, 50, torch.float32)
    results = [layers(*args, None, "gelu") for _ in at_threads(1, 2, 5)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("gated", [False, True])
@on("cpu", types="dtype")
def test_views_are_read_where_they_lie(backend, dtype, gated):
    args = operands(20, 64, 96, 50, dtype, gated)
    residual = random(20, 50, seed=7, dtype=dtype)
    expected = layers(*args, residual, "gelu", gated)
    assert torch.equal(layers(*(strided(x) for x in (*args, residual)), "gelu", gated), expected)
    assert layers(args[0].view(4, 5, 64), *args[1:], residual.view(4, 5, 50), "gelu", gated).shape == (4, 5, 50)


@on("cpu", types="dtype")
def test_a_bad_number_stays_in_its_row(backend, dtype):
    x, *weights = operands(20, 64, 96, 50, dtype)
    x[2, 5], x[11, 63] = torch.nan, torch.inf
    out = layers(x, *weights, None, "gelu")
    assert out[2].isnan().all() and not out[11].isfinite().all()
    assert out[[row for row in range(20) if row not in (2, 11)]].isfinite().all()


@on("cpu", types="dtype")
def test_gelu_from_end_to_end(backend, dtype):
    """Also where products of its parts would overflow or where nothing is left of it."""
    values = torch.cat([torch.linspace(-14, 14, 999), torch.tensor([-1e30, -1e18, -88.0, -1e-30, 0.0, 88.0, 1e30])])
    x, weight = torch.zeros(len(values), 32), torch.zeros(3, 32)
    x[:, 0], weight[:, 0] = values, 1.0
    out = layers(x.to(dtype), weight.to(dtype), None, None, None, torch.zeros(len(values), 3), "gelu").double()
    expected = torch.nn.functional.gelu(x.to(dtype)[:, :1].double()).expand(-1, 3)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 5e-5)
