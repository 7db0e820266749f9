"""Products of 8 bits: rows of x rounded to whole steps, multiplied in integers by int8 weights, on every set.

Sums are exact. So they are compared with float64 at the precision of the few operations that follow a sum.
"""

import re

import pytest
import torch
import torch.nn.functional as F

from clvp_fast import backend as forced_backend, ops
from clvp_fast.ops import panels
from clvp_fast.ops.binding import Scratch
from clvp_fast.ops.linear import _native, bind_linear, rounded
from tests.kit import random
from tests.kit.backends import on
from tests.kit.isa import needs
from tests.ops.test_linear import operands, quantized

SETS = ("cpu", "vnni")


def in_steps(x):
    """Return whole numbers `[..., in]` of float64, and the step `[..., 1]` of each row: the rounding in float32."""
    step = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() * (1 / step)).round().double(), step.double()


def exact(x, weight, bias, scale, activation=None):
    whole, step = in_steps(x)
    out = (whole @ weight.double().T) * step * scale.double()
    out = out if bias is None else out + bias.double()
    return out if activation is None else F.gelu(out, approximate="tanh")


def run(x, weight, bias=None, scale=None, activation=None, residual=None):
    return _native(x, weight, bias, scale, activation, residual, panels.pack(weight, int8_x=True), True)


def assert_close(out, expected):
    """Check a result of float32 to some units in its last place, and of bfloat16 to one."""
    room = 1e-6 if out.dtype == torch.float32 else 4e-3
    assert ((out.double() - expected).abs() <= room * (0.5 + expected.abs())).all()


@pytest.mark.parametrize("outs", [1, 48, 50])
def test_each_weight_lies_at_its_place(outs):
    weight, _ = quantized(outs, 64)
    packed = panels.pack(weight, int8_x=True)
    assert packed.shape == (-(-outs // 48), 16, 48, 4) and packed.dtype == torch.uint8
    for row in (0, outs // 2, outs - 1):
        for column in (0, 1, 2, 31, 63):
            assert packed[row // 48, column // 4, row % 48, column % 4] == int(weight[row, column]) + 128
    assert torch.equal(panels.pack(weight.T.contiguous().T, int8_x=True), packed)
    assert torch.equal(panels.pack(-weight, packed.clone(), int8_x=True), panels.pack(-weight, int8_x=True))


def test_rows_are_rounded_to_steps_of_their_largest_number():
    x = random(5, 64, seed=1) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1e-42])[:, None]
    x[2, 3] = -900.0
    whole, step = in_steps(x)
    assert whole.abs().amax(1).tolist() == [127, 127, 127, 0, 0]
    found = rounded(x)
    assert torch.equal(found.double(), (whole * step).float().double())
    assert ((found - x).abs() <= 0.5001 * step).all()
    assert rounded(x.bfloat16()).dtype == torch.float32 and rounded(x.double()).dtype == torch.float64


# Around tiles (4 or 8 rows, 16, 24 or 48 columns), a chain (256 columns) and an item (128 rows, 48 columns).
@pytest.mark.parametrize(
    "rows, columns, outs",
    [
        *[(1, 32, 1), (2, 160, 7), (3, 1024, 48), (4, 256, 49), (5, 288, 96), (8, 512, 17), (9, 4096, 50)],
        *[(16, 224, 130), (17, 544, 47), (128, 64, 49), (129, 64, 97), (600, 32, 5)],
    ],
)
@on(*SETS, types="dtype")
def test_equals_the_product_in_float64(backend, dtype, rows, columns, outs):
    x, weight, bias, scale = operands((rows,), columns, outs, dtype, int8=True)
    residual = random(rows, outs, seed=9)
    for args in ((x, weight, bias, scale, None), (x, weight, None, scale, "gelu_new")):
        out = run(*args)
        assert out.dtype == dtype and out.is_contiguous()
        assert_close(out, exact(*args))
        summed = run(*args, residual)
        assert summed.dtype == torch.float32
        assert_close(summed, exact(*args) + residual.double())


@on(*SETS, types="dtype")
def test_the_largest_sums_are_exact(backend, dtype):
    """Reach both ends of what 16 and 32 bits hold: no sum of two products or of all columns may saturate."""
    weight = torch.full((4, panels.MOST_INT8_COLUMNS), 127, dtype=torch.int8)
    weight[1::2] = -128
    weight[2:, ::3] = -weight[2:, ::3]
    x = torch.full((3, panels.MOST_INT8_COLUMNS), 127, dtype=dtype)
    x[1] = -127
    x[2, 1::2] = -127
    out = run(x, weight, None, torch.ones(4), None, torch.zeros(3, 4))
    expected = exact(x, weight, None, torch.ones(4))
    assert expected.abs().max() == 127 * 128 * panels.MOST_INT8_COLUMNS
    torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=0)


@on(*SETS)
def test_every_pair_of_numbers_is_exact(backend):
    """Multiply each x from -127 to 127 by each weight, in each of the four columns that lie side by side."""
    weight = torch.arange(-128, 128).to(torch.int8)[:, None] * torch.tensor([[1] + [0] * 31], dtype=torch.int8)
    whole = torch.arange(-127, 128).float()
    for place in range(4):
        x = torch.zeros(255, 32)
        x[:, place], x[:, 31] = whole, 127  # whose weights are 0
        out = run(x, weight.roll(place, 1), None, torch.ones(256))
        assert torch.equal(out, whole[:, None] * torch.arange(-128, 128).float())


@on(*SETS)
def test_halves_are_rounded_to_even(backend):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0] + [0.0] * 24])
    weight = torch.eye(8, 32).to(torch.int8)
    assert run(x, weight, None, torch.ones(8)).tolist() == [[0, 2, 2, 0, -2, -2, 126, 127]]


@on(*SETS, types="dtype")
def test_a_row_has_the_bits_that_it_has_alone(backend, dtype):
    x, weight, bias, scale = operands((133,), 416, 100, dtype, int8=True)
    x *= torch.logspace(-3, 3, 133)[:, None].to(dtype)
    whole = run(x, weight, bias, scale, "gelu_new")
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16):
        for first in (0, 3, 133 - count):
            part = slice(first, first + count)
            assert torch.equal(run(x[part], weight, bias, scale, "gelu_new"), whole[part])


@on(*SETS, types="dtype")
def test_a_bad_number_stays_in_its_row(backend, dtype):
    x, weight, bias, scale = operands((6,), 256, 64, dtype, int8=True)
    x[2, 5], x[4, 63] = torch.nan, torch.inf
    x[1], x[3] = 0, 1e-30
    out = run(x, weight, bias, scale)
    assert not out[[2, 4]].isfinite().any() and out[[0, 1, 3, 5]].isfinite().all()
    assert torch.equal(out[1], bias) and torch.equal(out[3], bias)
    for name in ("torch", "reference"):
        with forced_backend(name):
            out = ops.linear(x, weight, bias, scale=scale, int8_x=True)
        assert not out[[2, 4]].isfinite().any() and out[[0, 1, 3, 5]].isfinite().all()


@pytest.mark.parametrize("activation", [None, "gelu_new", "gelu"])
@on("default", "torch", "reference", types="dtype", among=(torch.float32, torch.bfloat16))
def test_every_backend_computes_the_same(backend, dtype, activation):
    x, weight, bias, scale = operands(dtype=dtype, int8=True)
    packed, residual = panels.pack(weight, int8_x=True), random(3, 50, seed=7)
    expected = exact(x, weight, bias, scale)
    expected = expected if activation is None else F.gelu(expected, approximate="tanh" if "_" in activation else "none")
    settings = dict(scale=scale, activation=activation, residual=residual, panels=packed, int8_x=True)
    out = ops.linear(x, weight, bias, **settings)
    room = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected + residual.double(), rtol=room, atol=room)
    plain = ops.linear(x, weight, bias, **settings | dict(int8_x=False, panels=panels.pack(weight)))
    assert (plain - out).abs().max() > 1e-3
    bound = torch.empty_like(out)
    bind_linear(bound, Scratch(3, "cpu"), x, weight, bias, **settings)()
    assert torch.equal(bound, out)


@needs("linear", torch.int8)
def test_the_operator_takes_the_kernel():
    x, weight, bias, scale = operands(int8=True)
    packed = panels.pack(weight, int8_x=True)
    assert panels.unserved(torch.float32, weight, int8_x=True) is None
    out = ops.linear(x, weight, bias, scale=scale, panels=packed, int8_x=True)
    assert torch.equal(out, run(x, weight, bias, scale))
    args = (x, weight, bias, scale, "gelu_new", random(3, 50, seed=7), packed, True)
    torch.library.opcheck(torch.ops.clvp_fast.linear.default, args)


@needs("linear", torch.int8)
@pytest.mark.parametrize(
    "weight, says",
    [
        (torch.zeros(3, 64), r"over int8 weights of up to 65536 columns, not \[3, 64\], torch.float32"),
        (torch.zeros(3, 1 << 17, dtype=torch.int8), r"up to 65536 columns, not \[3, 131072\]"),
        (torch.zeros(3, 33, dtype=torch.int8), r"rows of 32 n columns, not \[3, 33\]"),
    ],
)
def test_weights_without_such_products(weight, says):
    assert re.search(says, panels.unserved(torch.float32, weight, int8_x=True))


def test_wrong_calls_are_refused():
    x, weight, bias, scale = operands(int8=True)
    with pytest.raises(ValueError, match=r"panels must have shape \[2, 16, 48, 4\], as pack\(\) makes them"):
        ops.linear(x, weight, bias, scale=scale, panels=panels.pack(weight), int8_x=True)
    with pytest.raises(TypeError, match=r"panels must be torch\.uint8, as pack\(\) makes them"):
        packed = panels.pack(weight, int8_x=True).view(torch.int8)
        ops.linear(x, weight, bias, scale=scale, panels=packed, int8_x=True)
    with pytest.raises(TypeError, match=r"int8_x multiplies weights of int8, not torch\.float32"):
        ops.linear(x, weight.float(), bias, int8_x=True)


@needs("linear", torch.int8)
def test_products_of_8_bits_want_panels():
    x, weight, bias, scale = operands(int8=True)
    with forced_backend("cpu"), pytest.raises(RuntimeError, match="it rounds x to 8 bits over packed weights alone"):
        ops.linear(x, weight, bias, scale=scale, int8_x=True)
