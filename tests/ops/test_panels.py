"""Weights packed once: where each number comes to lie, and the product over them in float64, row by row."""

import re

import pytest
import torch

from clvp_fast import backend as forced_backend, ops
from clvp_fast.ops import panels
from clvp_fast.ops.linear import _native, _torch
from tests.kit import assert_within_budget, random
from tests.kit.backends import on
from tests.kit.isa import needs
from tests.ops.test_linear import INT8, exact, operands


@pytest.mark.parametrize("dtype, together", [(torch.float32, 1), (torch.bfloat16, 2), (torch.int8, 2)])
@pytest.mark.parametrize("outs", [1, 48, 50])
def test_each_weight_lies_at_its_place(dtype, together, outs):
    weight = (7 * random(outs, 64, seed=2)).to(dtype)
    packed = panels.pack(weight)
    assert packed.shape == (-(-outs // 48), 64 // together, 48, together) and packed.dtype == dtype
    for row in (0, outs // 2, outs - 1):
        for column in (0, 1, 31, 63):
            found = packed[row // 48, column // together, row % 48, column % together]
            assert found == weight[row, column]
    assert torch.equal(panels.pack(weight.T.contiguous().T), packed)
    before = packed.clone()
    assert torch.equal(panels.pack(weight + 1, into=packed), panels.pack(weight + 1)) and not packed.equal(before)


# Around the tiles (4 or 8 rows, 24 or 48 columns), a chain (64 columns) and an item (128 rows, 48 columns).
@pytest.mark.parametrize(
    "rows, columns, outs",
    [(1, 32, 1), (2, 160, 7), (3, 1024, 48), (4, 96, 49), (5, 256, 96), (9, 4096, 50), (129, 64, 97), (600, 32, 5)],
)
@INT8
@on("cpu", types="dtype")
def test_equals_the_product_in_float64(backend, dtype, int8, rows, columns, outs):
    x, weight, bias, scale = operands((rows,), columns, outs, dtype, int8)
    packed, residual = panels.pack(weight), random(rows, outs, seed=9)
    for args in ((x, weight, bias, scale, None), (x, weight, None, scale, "gelu_new")):
        out = _native(*args, None, packed)
        assert out.dtype == dtype and out.is_contiguous()
        assert_within_budget(out, exact(*args), _torch(*args))
        summed, expected = _native(*args, residual, packed), exact(*args) + residual.double()
        assert summed.dtype == torch.float32
        assert (summed.double() - expected).abs().max() <= 4e-6 * (1 + expected.abs().max())


@INT8
@on("cpu", types="dtype")
def test_a_row_has_the_bits_that_it_has_alone(backend, dtype, int8):
    x, weight, bias, scale = operands((133,), 416, 100, dtype, int8)
    packed = panels.pack(weight)
    whole = _native(x, weight, bias, scale, "gelu_new", None, packed)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16):
        for first in (0, 3, 133 - count):
            part = slice(first, first + count)
            assert torch.equal(_native(x[part], weight, bias, scale, "gelu_new", None, packed), whole[part])


@INT8
@on("cpu", types="dtype")
def test_a_bad_number_stays_in_its_row(backend, dtype, int8):
    x, weight, bias, scale = operands((6,), 256, 64, dtype, int8)
    x[2, 5], x[4, 63] = torch.nan, torch.inf
    out = _native(x, weight, bias, scale, "gelu_new", None, panels.pack(weight))
    assert out[2].isnan().all() and not out[4].isfinite().all() and out[[0, 1, 3, 5]].isfinite().all()


@on("cpu")
def test_every_int8_is_exact(backend):
    weight = torch.arange(-128, 128).to(torch.int8).expand(16, 256).contiguous()
    out = _native(torch.eye(256), weight, None, torch.ones(16), None, None, panels.pack(weight))
    assert torch.equal(out, weight.T.float())


@needs("linear")
@INT8
def test_the_operator_reads_them_where_its_kernel_serves(int8):
    x, weight, bias, scale = operands((3,), 64, 50, torch.float32, int8)
    packed = panels.pack(weight)
    assert panels.unserved(torch.float32, weight) is None
    out = ops.linear(x, weight, bias, scale=scale, panels=packed)
    assert torch.equal(out, _native(x, weight, bias, scale, None, None, packed))
    assert torch.equal(ops.linear(x, weight, bias, scale=scale, panels=torch.zeros_like(packed)), bias.expand(3, -1))
    for name in ("torch", "reference"):  # which read the weights
        with forced_backend(name):
            plain = ops.linear(x, weight, bias, scale=scale)
            assert torch.equal(ops.linear(x, weight, bias, scale=scale, panels=torch.zeros_like(packed)), plain)
    args = (x, weight, bias, scale, "gelu_new", random(3, 50, seed=7), packed)
    torch.library.opcheck(torch.ops.clvp_fast.linear.default, args)


def test_wrong_panels_are_refused():
    x, weight, bias, _ = operands()
    packed = panels.pack(weight)
    with pytest.raises(ValueError, match=r"panels must have shape \[2, 64, 48, 1\], as pack\(\) makes them"):
        ops.linear(x, weight, bias, panels=packed[:1])
    with pytest.raises(TypeError, match=r"panels must be torch\.float32, as pack\(\) makes them"):
        ops.linear(x, weight, bias, panels=packed.double())
    with pytest.raises(ValueError, match="panels must be contiguous"):
        ops.linear(x, weight, bias, panels=torch.cat((packed, packed), 3)[..., :1])


@needs("linear")
@pytest.mark.parametrize(
    "weight, says",
    [
        (torch.zeros(3, 33), r"rows of 32 n columns, not \[3, 33\]"),
        (torch.zeros(3, 32, dtype=torch.bfloat16), "of the dtype of x, torch.float32, or int8"),
        (torch.zeros(3, 32, device="meta"), "a CPU, not a meta device"),
    ],
)
def test_weights_without_panels(weight, says):
    assert re.search(says, panels.unserved(torch.float32, weight))
