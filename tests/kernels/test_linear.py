"""int8 weights in kernels, `linear` and `gelu_mlp`: budgets against float64 in every regime, a row's bits, memory."""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import linear as kernels, mlp
from clvp_fast.ops import gelu_mlp, linear
from tests.kit import POISON, Guarded, assert_within_budget, random, strided
from tests.kit.device import DEVICE, DTYPES


def quantized(outs, columns, seed):
    """int8 weights that reach both ends, and scales of several sizes."""
    weight = (60 * random(outs, columns, seed=seed, device=DEVICE)).round().clamp(-128, 127).to(torch.int8)
    return weight, (random(outs, seed=seed + 1, device=DEVICE).abs() + 0.1) / 60 / columns**0.5


def operands(dtype, rows, columns=256, outs=64):
    weight, scale = quantized(outs, columns, seed=2)
    x = random(*rows, columns, seed=1, dtype=dtype, device=DEVICE)
    return x, weight, random(outs, seed=4, dtype=dtype, device=DEVICE), scale


def block(dtype, rows, width=128, inner=256, outer=40):
    """The arguments of `gelu_mlp` and a residual."""
    (w_in, scale_in), (w_out, scale_out) = quantized(inner, width, seed=2), quantized(outer, inner, seed=4)
    x, b_in, b_out, residual = (
        random(*shape, seed=seed, dtype=dtype, device=DEVICE)
        for seed, shape in enumerate(((*rows, width), (inner,), (outer,), (*rows, outer)), 6)
    )
    return (x, w_in, b_in, w_out, b_out), dict(residual=residual, scale_in=scale_in, scale_out=scale_out)


def check(run, tensors, named, **options):
    """`run` within twice the error of plain torch, which widens the weights."""
    out = run(*tensors, **named, **options)
    exact = [x if x is None or x.dtype == torch.int8 else x.double() for x in tensors]
    wide = {name: x if name.startswith("scale") else x.double() for name, x in named.items()}
    with clvp_fast.backend("reference"):
        reference = run(*exact, **wide, **options)
    with clvp_fast.backend("torch"):
        baseline = run(*tensors, **named, **options)
    assert out.is_contiguous()
    assert_within_budget(out, reference, baseline)
    return out


def check_linear(x, weight, bias, scale, activation=None):
    return check(linear, (x, weight, bias), {"scale": scale}, activation=activation)


# Each tile's edges, and several tiles.
ROWS = [(1,), (2, 8), (17,), (33,), (64,), (65,), (2, 100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_every_regime(rows, dtype):
    check_linear(*operands(dtype, rows), "gelu_new")
    tensors, named = block(dtype, rows)
    check(gelu_mlp, tensors, named)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu_new", "gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_epilogue(with_bias, activation, dtype):
    x, weight, bias, scale = operands(dtype, (3, 5))
    check_linear(x, weight, bias if with_bias else None, scale, activation)


# Columns and outputs that end within a tile or are few; more outputs than small tiles are for.
@pytest.mark.parametrize("sizes", [(1, 1), (100, 31), (144, 48), (128, 2112), (1040, 80)])
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype, rows, sizes):
    check_linear(*operands(dtype, (rows,), *sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [512, 1000, 1040])
@pytest.mark.parametrize("rows", [3, 100, pytest.param(513, marks=pytest.mark.slow)])
def test_a_sum_over_several_programs(rows, inner, dtype):
    split = mlp.workspace(rows, 24, inner, dtype.itemsize, True).partial > 0
    assert split == (rows <= 512)
    tensors, named = block(dtype, (rows,), width=16, inner=inner, outer=24)
    check(gelu_mlp, tensors, named)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("rows", [3, 100])
def test_float32_residual_beside_a_half_type(rows, dtype):
    """What is added to a large residual is as exact as the product alone."""
    tensors, named = block(dtype, (rows,), inner=512)
    large = named["residual"].float() * 300
    out = gelu_mlp(*tensors, **named | {"residual": large})
    alone = gelu_mlp(*tensors, **named | {"residual": torch.zeros_like(large)})
    assert out.dtype == torch.float32 and alone.abs().max() > 1
    torch.testing.assert_close(out - large, alone, rtol=0, atol=2**-23 * float(large.abs().max()))
    assert not torch.equal(alone, alone.to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(512, 96), pytest.param((100, 31), marks=pytest.mark.slow)])
def test_a_row_has_the_bits_that_it_has_alone(sizes, dtype):
    """In every regime of rows, which share the instruction and the order of the sums; and the same twice."""
    x, weight, bias, scale = operands(dtype, (140,), *sizes)
    whole = linear(x, weight, bias, scale=scale, activation="gelu_new")
    assert torch.equal(linear(x, weight, bias, scale=scale, activation="gelu_new"), whole)
    tensors, named = block(dtype, (140,), width=64, inner=512)
    both = gelu_mlp(*tensors, **named)
    for count in (1, 17, 40, 65, 129):
        first = 139 - count
        part = linear(x[first:-1], weight, bias, scale=scale, activation="gelu_new")
        assert torch.equal(part, whole[first:-1])
        residual = named["residual"][first:-1]
        part = gelu_mlp(tensors[0][first:-1], *tensors[1:], **named | {"residual": residual})
        assert torch.equal(part, both[first:-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    x, weight, bias, scale = operands(dtype, (2, 7))
    expected = linear(x, weight, bias, scale=scale)
    by_columns, spaced = weight.t().contiguous().t(), torch.stack((weight, weight), -1)[..., 0]
    for view in (weight, by_columns, spaced, torch.cat((weight, weight), 1)[:, :256]):
        out = linear(strided(x), view, strided(bias), scale=strided(scale))
        assert out.is_contiguous() and torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, sizes", [(19, (256, 64)), (70, (256, 64)), (19, (100, 31))])
def test_all_is_written_and_nothing_else(rows, sizes, dtype):
    x, weight, bias, scale = operands(dtype, (rows,), *sizes)
    # The rows behind x, weight and scale would show.
    tail = torch.full_like(x[:3], POISON)
    guarded = torch.cat((x, tail))[:rows], torch.cat((weight, weight[:2] | 127))[: len(weight)]
    scales = torch.cat((scale, torch.full_like(scale[:3], POISON)))[: len(scale)]
    out = Guarded(rows, len(weight), dtype=dtype, device=DEVICE)
    kernels.linear(*guarded, scales, bias, "gelu_new", out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, linear(x, weight, bias, scale=scale, activation="gelu_new"))


def test_float32_is_not_tf32():
    """Operands whose products TF32 alone would round: a sum that cancels keeps what its last digits say."""
    x = torch.ones(1, 64, device=DEVICE)
    x[0, :32] += torch.arange(32, device=DEVICE) * 2**-23
    weight = torch.ones(16, 64, dtype=torch.int8, device=DEVICE)
    weight[:, 32:] = -1
    out = linear(x, weight, scale=torch.full((16,), 2.0**23, device=DEVICE))
    torch.testing.assert_close(out, torch.full_like(out, 496.0), rtol=0, atol=96)  # sums of 32 ones end in 2^-19


def test_every_int8_is_exact():
    columns = torch.arange(-128, 128, device=DEVICE).to(torch.int8)
    for dtype in DTYPES:
        x = torch.eye(256, device=DEVICE, dtype=dtype)
        out = linear(x, columns.expand(16, 256).contiguous(), scale=torch.ones(16, device=DEVICE))
        assert torch.equal(out, columns.to(dtype)[:, None].expand(256, 16))


def test_a_bad_number_stays_in_its_row():
    for dtype in DTYPES:
        x, weight, bias, scale = operands(dtype, (6,))
        x[2, 5], x[4, 63] = torch.nan, torch.inf
        out = linear(x, weight, bias, scale=scale, activation="gelu_new")
        assert out[2].isnan().all() and not out[4].isfinite().all() and out[[0, 1, 3, 5]].isfinite().all()


def test_no_rows():
    x, weight, bias, scale = operands(torch.float32, (0, 3))
    assert linear(x, weight, bias, scale=scale).shape == (0, 3, 64)


def test_the_registered_operators():
    for dtype in (torch.float32, torch.float16):
        x, weight, bias, scale = operands(dtype, (2, 3))
        for args in ((x, weight, bias, scale, "gelu_new"), (x, weight, None, scale, None)):
            torch.library.opcheck(torch.ops.clvp_fast.linear.default, args)
        tensors, named = block(dtype, (2, 3), inner=512)
        args = (*tensors, named["residual"], "gelu_new", named["scale_in"], named["scale_out"])
        torch.library.opcheck(torch.ops.clvp_fast.gelu_mlp.default, args)


def test_what_the_kernel_does_not_serve():
    x, weight, bias, scale = operands(torch.float32, (3,))
    with pytest.raises(RuntimeError, match=r"linear was forced .* x must be float32, float16 or bfloat16, not"):
        linear(x.double(), weight, bias.double(), scale=scale)
    with pytest.raises(RuntimeError, match=r"bias must be \[64\] of the dtype of x, torch\.float32, not \[63\]"):
        linear(x, weight, bias[:-1], scale=scale)
    with pytest.raises(RuntimeError, match=r"it serves x with as many columns as the weights, .* not 256, 255"):
        linear(x, weight[:, :-1], bias, scale=scale)


def test_gradients_take_torch_s_product():
    x, weight, bias, scale = operands(torch.float32, (3,))
    linear(x.requires_grad_(), weight, bias, scale=scale).sum().backward()
    torch.testing.assert_close(x.grad, (weight * scale[:, None]).sum(0).expand(3, -1), rtol=1e-4, atol=1e-5)
