"""Linear layers: every backend is the product in float64, over int8 weights too; residuals, layouts, bits, memory.

The CPU's kernel is called itself, on instruction sets too on which the operator leaves products to torch.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F

from clvp_fast import ops
from clvp_fast.kernels import linear as kernels
from clvp_fast.ops.linear import _native, _torch
from tests.kit import POISON, Guarded, assert_within_budget, at_threads, random, strided
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck

PLAIN = ("default", "torch", "reference")
INT8 = pytest.mark.parametrize("int8", [False, True])


def quantized(outs, columns, seed=2, device="cpu"):
    """Make int8 weights that reach both ends, and scales of several sizes."""
    weight = (60 * random(outs, columns, seed=seed, device=device)).round().clamp(-128, 127).to(torch.int8)
    return weight, (random(outs, seed=seed + 1, device=device).abs() + 0.1) / 60 / columns**0.5


def operands(rows=(3,), columns=64, outs=50, dtype=torch.float32, int8=False, device="cpu"):
    """x `[*rows, columns]`, weight, bias and the scale of the rows of int8 weights."""
    x = random(*rows, columns, seed=1, dtype=dtype, device=device)
    bias = random(outs, seed=4, dtype=dtype, device=device)
    if not int8:
        return x, (random(outs, columns, seed=2, device=device) / columns**0.5).to(dtype), bias, None
    weight, scale = quantized(outs, columns, device=device)
    return x, weight, bias, scale


def run(backend, x, weight, bias=None, scale=None, activation=None, residual=None):
    if backend.name == "cpu":
        return _native(x, weight, bias, scale, activation, residual)
    with warnings.catch_warnings():
        if backend.name in PLAIN:
            warnings.simplefilter("error")
        return ops.linear(x, weight, bias, scale=scale, activation=activation, residual=residual)


def exact(x, weight, bias, scale, activation):
    out = x.double() @ weight.double().T * (1 if scale is None else scale[:, None].double().T)
    out = out if bias is None else out + bias.double()
    return out if activation is None else F.gelu(out, approximate="none" if activation == "gelu" else "tanh")


def check(backend, x, weight, bias=None, scale=None, activation=None):
    out = run(backend, x, weight, bias, scale, activation)
    assert out.dtype == x.dtype and out.is_contiguous()
    assert_within_budget(out, exact(x, weight, bias, scale, activation), _torch(x, weight, bias, scale, activation))
    return out


@pytest.mark.parametrize("activation", [None, "gelu_new", "gelu"])
@pytest.mark.parametrize("with_bias", [True, False])
@INT8
@on(*PLAIN, types="dtype")
def test_equals_the_product_in_float64(backend, dtype, int8, with_bias, activation):
    x, weight, bias, scale = operands(dtype=dtype, int8=int8)
    check(backend, x, weight, bias if with_bias else None, scale, activation)


@pytest.mark.parametrize("activation", [None, "gelu_new", "gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("with_bias", [False, True])
@on(*TRITON, types="dtype")
def test_every_epilogue(backend, dtype, with_bias, activation):
    x, weight, bias, scale = operands((3, 5), 256, 64, dtype, int8=True, device=backend.device)
    check(backend, x, weight, bias if with_bias else None, scale, activation)


# Each tile's edges, and several tiles.
@pytest.mark.parametrize("rows", [(1,), (2, 8), (17,), (33,), (64,), (65,), (2, 100)])
@on(*TRITON, types="dtype")
def test_every_regime(backend, dtype, rows):
    check(backend, *operands(rows, 256, 64, dtype, int8=True, device=backend.device), "gelu_new")


# Columns and outputs that end within a tile or are few; more outputs than small tiles are for.
@pytest.mark.parametrize("sizes", [(1, 1), (100, 31), (144, 48), (128, 2112), (1040, 80)])
@pytest.mark.parametrize("rows", [5, 70])
@on(*TRITON, types="dtype")
def test_sizes(backend, dtype, rows, sizes):
    check(backend, *operands((rows,), *sizes, dtype, int8=True, device=backend.device))


# Around the tiles (4 or 8 rows, 2, 3 or 6 columns) and an item (128 rows, 48 columns); the decoder's own widths.
@pytest.mark.parametrize(
    "rows, columns, outs",
    [(1, 32, 1), (3, 64, 7), (4, 96, 48), (5, 32, 49), (17, 1024, 130), (128, 32, 47), (129, 64, 97), (300, 32, 5)],
)
@INT8
@on("cpu", types="dtype")
def test_sizes_of_vectors(backend, dtype, int8, rows, columns, outs):
    x, weight, bias, scale = operands((rows,), columns, outs, dtype, int8)
    check(backend, x, weight, bias, scale)
    check(backend, x, weight, None, scale, "gelu_new")


@pytest.mark.parametrize("activation", [None, "gelu_new", "gelu"])
@INT8
@pytest.mark.parametrize("wide", [True, False])
@on(*PLAIN, types="dtype")
def test_a_residual_is_added(backend, dtype, wide, int8, activation):
    """Use the dtype of x, or float32 beside a half type; the result has its dtype, and the residual stays."""
    if wide and dtype == torch.float64:
        wide = False
    args = (*operands(dtype=dtype, int8=int8), activation)
    residual = random(3, 50, seed=7, dtype=torch.float32 if wide else dtype)
    before = residual.clone()
    out = run(backend, *args, residual)
    assert out.dtype == residual.dtype and torch.equal(residual, before)
    assert_within_budget(out, exact(*args) + residual.double(), residual + _torch(*args))


@pytest.mark.parametrize("rows, outs", [(1, 1), (5, 49), (17, 130), (129, 47)])
@INT8
@on("cpu", types="dtype")
def test_a_residual_is_added_before_anything_is_rounded(backend, dtype, int8, rows, outs):
    """Sum in float32 beside a half type too, with a product as exact as in float32."""
    tensors, residual = operands((rows,), 64, outs, dtype, int8), strided(random(rows, outs, seed=9))
    for activation in (None, "gelu_new"):
        out = run(backend, *tensors, activation, residual)
        expected = exact(*tensors, activation) + residual.double()
        assert out.dtype == torch.float32
        assert (out.double() - expected).abs().max() <= 2e-6 * (1 + expected.abs().max())


@INT8
@on("default")
def test_registered_by_default(backend, int8):
    x, weight, bias, scale = operands(int8=int8)
    for args in ((x, weight, bias, scale, "gelu_new"), (x, weight, None, scale, None, random(3, 50, seed=7))):
        torch.library.opcheck(torch.ops.clvp_fast.linear.default, args)


@on(*TRITON, types="dtype", among=(torch.float32, torch.float16))
def test_registered(backend, dtype):
    x, weight, bias, scale = operands((2, 3), 256, 64, dtype, int8=True, device=backend.device)
    for args in ((x, weight, bias, scale, "gelu_new"), (x, weight, None, scale, None)):
        opcheck(backend, torch.ops.clvp_fast.linear.default, args)


@on(*PLAIN)
def test_leading_axes_and_strides(backend):
    x, weight, bias, _ = operands((6,))
    expected = ops.linear(x, weight, bias)
    assert torch.equal(ops.linear(x.view(2, 3, 64), weight, bias), expected.view(2, 3, 50))
    assert ops.linear(x.view(1, 6, 64)[:, :0], weight, bias).shape == (1, 0, 50)
    views = strided(x), strided(weight), strided(bias)
    torch.testing.assert_close(ops.linear(*views), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ops.linear(x, weight.T.contiguous().T, bias), expected, rtol=1e-6, atol=1e-6)


@on(*TRITON, types="dtype")
def test_strides_of_int8_weights(backend, dtype):
    x, weight, bias, scale = operands((2, 7), 256, 64, dtype, int8=True, device=backend.device)
    expected = run(backend, x, weight, bias, scale)
    by_columns, spaced = weight.t().contiguous().t(), torch.stack((weight, weight), -1)[..., 0]
    for view in (weight, by_columns, spaced, torch.cat((weight, weight), 1)[:, :256]):
        out = run(backend, strided(x), view, strided(bias), strided(scale))
        assert out.is_contiguous() and torch.equal(out, expected)
    assert run(backend, x[:0], weight, bias, scale).shape == (0, 7, 64)


@on(*PLAIN)
def test_a_vector(backend):
    """Map `[in]` to `[out]` by a linear layer and by blocks of such layers, also where it is a column."""
    x, weight, bias, _ = operands((1,))
    back, bias_back = random(64, 50, seed=8), random(64, seed=9)
    half, bias_half = random(64, 25, seed=8), random(64, seed=9)
    calls = (
        lambda x: ops.linear(x, weight, bias),
        lambda x: ops.gelu_mlp(x, weight, bias, back, bias_back),
        lambda x: ops.geglu_mlp(x, weight, bias, half, bias_half),
    )
    for call in calls:
        for vector in (x[0], torch.stack([x[0], x[0]], 1)[:, 0]):
            torch.testing.assert_close(call(vector), call(x)[0], rtol=1e-5, atol=1e-5)


def check_bits(backend, args, rows):
    """Check that a row has the same bits alone, in every regime of rows, and twice."""
    x, *others = args
    whole = run(backend, x, *others, "gelu_new")
    assert torch.equal(run(backend, x, *others, "gelu_new"), whole)
    for part in rows:
        assert torch.equal(run(backend, x[part], *others, "gelu_new"), whole[part])


@on(*TRITON, types="dtype")
def test_a_row_has_the_bits_that_it_has_alone(backend, dtype):
    args = operands((140,), 512, 96, dtype, int8=True, device=backend.device)
    check_bits(backend, args, [slice(139 - count, -1) for count in (1, 17, 40, 65, 129)])


@pytest.mark.slow
@on(*TRITON, types="dtype")
def test_a_row_has_the_bits_that_it_has_alone_at_odd_sizes(backend, dtype):
    args = operands((140,), 100, 31, dtype, int8=True, device=backend.device)
    check_bits(backend, args, [slice(139 - count, -1) for count in (1, 17, 40, 65, 129)])


@pytest.mark.parametrize("sizes", [(256, 80), (200, 70)], ids=["even", "odd"])
@on(*TRITON, types="dtype")
def test_a_row_has_the_same_bits_for_every_number_of_rows(backend, dtype, sizes):
    """Compare every tile over weights of the type of x, those of a step of each size and those of a prefill."""
    x, weight, bias, _ = operands((1100,), *sizes, dtype, device=backend.device)

    def product(rows):
        out = x.new_empty(rows, len(weight))
        kernels.linear(x[:rows], weight, None, bias, "gelu_new", out=out)
        return out

    whole = product(len(x))
    for rows in (1, 4, 16, 33, 64, 256):
        assert torch.equal(product(rows), whole[:rows]), rows
    assert len({row.tobytes() for row in whole[:256].float().cpu().numpy()}) == 256


# An item has 128 rows; of 8192 columns it has 16 in float32, and 32 in bfloat16.
@pytest.mark.parametrize("rows, columns", [(133, 256), (41, 8192)])
@INT8
@on("cpu", types="dtype")
def test_a_row_has_the_bits_that_it_has_alone_on_a_cpu(backend, dtype, int8, rows, columns):
    args = operands((rows,), columns, 100, dtype, int8)
    alone = (0, 1, 3, 4, 15, 16, 31, 32, 40, 127, 128, 132)
    check_bits(backend, args, [slice(row, row + 1) for row in alone if row < rows])


@on("cpu")
def test_threads_change_no_bit(backend):
    args = operands((9,), 64, 500)
    results = [run(backend, *args) for _ in at_threads(1, 2, 5)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("rows, sizes", [(19, (256, 64)), (70, (256, 64)), (19, (100, 31))])
@on(*TRITON, types="dtype")
def test_all_is_written_and_nothing_else(backend, dtype, rows, sizes):
    x, weight, bias, scale = operands((rows,), *sizes, dtype, int8=True, device=backend.device)
    # The rows behind x, weight and scale would show.
    tail = torch.full_like(x[:3], POISON)
    guarded = torch.cat((x, tail))[:rows], torch.cat((weight, weight[:2] | 127))[: len(weight)]
    scales = torch.cat((scale, torch.full_like(scale[:3], POISON)))[: len(scale)]
    out = Guarded(rows, len(weight), dtype=dtype, device=backend.device)
    kernels.linear(*guarded, scales, bias, "gelu_new", out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, check(backend, x, weight, bias, scale, "gelu_new"))


@on(*TRITON)
def test_float32_is_not_tf32(backend):
    """Use products that TF32 alone would round: a sum that cancels keeps their last digits."""
    x = torch.ones(1, 64, device=backend.device)
    x[0, :32] += torch.arange(32, device=backend.device) * 2**-23
    weight = torch.ones(16, 64, dtype=torch.int8, device=backend.device)
    weight[:, 32:] = -1
    out = run(backend, x, weight, scale=torch.full((16,), 2.0**23, device=backend.device))
    torch.testing.assert_close(out, torch.full_like(out, 496.0), rtol=0, atol=96)  # sums of 32 ones end in 2^-19


@on(*TRITON, types="dtype")
def test_every_int8_is_exact(backend, dtype):
    columns = torch.arange(-128, 128, device=backend.device).to(torch.int8)
    x = torch.eye(256, device=backend.device, dtype=dtype)
    out = run(backend, x, columns.expand(16, 256).contiguous(), scale=torch.ones(16, device=backend.device))
    assert torch.equal(out, columns.to(dtype)[:, None].expand(256, 16))


@on("cpu", *TRITON, types="dtype")
def test_a_bad_number_stays_in_its_row(backend, dtype):
    for int8 in (False, True) if backend.name == "cpu" else (True,):
        x, weight, bias, scale = operands((6,), 256, 64, dtype, int8, backend.device)
        x[2, 5], x[4, 63] = torch.nan, torch.inf
        out = run(backend, x, weight, bias, scale, "gelu_new")
        assert out[2].isnan().all() and not out[4].isfinite().all() and out[[0, 1, 3, 5]].isfinite().all()


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 5.0, 88.0, 1e18, float("inf")])
@on("cpu")
def test_gelu_at_its_ends(backend, value):
    x, weight = torch.full((1, 32), value), torch.zeros(3, 32)
    weight[:, 0] = 1.0
    x[:, 1:] = 0
    got = run(backend, x, weight, activation="gelu_new").double()
    expected = torch.nn.functional.gelu(torch.tensor(value, dtype=torch.float64), approximate="tanh")
    torch.testing.assert_close(got, expected.expand(1, 3), rtol=1e-6, atol=1e-12)


@on(*TRITON)
def test_unserved_arguments_are_named(backend):
    x, weight, bias, scale = operands((3,), 256, 64, int8=True, device=backend.device)
    with pytest.raises(RuntimeError, match=r"linear was forced .* x must be float32, float16 or bfloat16, not"):
        run(backend, x.double(), weight, bias.double(), scale)
    with pytest.raises(RuntimeError, match=r"bias must be \[64\] of the dtype of x, torch\.float32, not \[63\]"):
        run(backend, x, weight, bias[:-1], scale)
    with pytest.raises(RuntimeError, match=r"it serves x with as many columns as the weights, .* not 256, 255"):
        run(backend, x, weight[:, :-1], bias, scale)


@on(*TRITON)
def test_gradients_take_torch_s_product(backend):
    x, weight, bias, scale = operands((3,), 256, 64, int8=True, device=backend.device)
    run(backend, x.requires_grad_(), weight, bias, scale).sum().backward()
    torch.testing.assert_close(x.grad, (weight * scale[:, None]).sum(0).expand(3, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "error, says, change",
    [
        (ValueError, "scale belongs to weights of int8: it is missing", {"scale": None}),
        (ValueError, "scale must have shape \\[50\\]", {"scale": torch.ones(49)}),
        (TypeError, "scale must be float32", {"scale": torch.ones(50, dtype=torch.float64)}),
        (ValueError, "activation must be None or one of", {"activation": "gelo"}),
        (ValueError, "residual must have shape \\[3, 50\\]", {"residual": torch.ones(50)}),
        (TypeError, "residual must have the dtype of x", {"residual": torch.ones(3, 50, dtype=torch.float64)}),
    ],
)
def test_wrong_arguments_are_refused(error, says, change):
    x, weight, bias, scale = operands(int8=True)
    with pytest.raises(error, match=says):
        ops.linear(x, weight, bias, **{"scale": scale} | change)
    with pytest.raises(ValueError, match="it is given, and the weights are"):
        ops.linear(x, weight.float(), bias, scale=scale)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_tensors_on_several_devices(name):
    x, weight, bias, _ = operands()
    given = {"weight": weight, "bias": bias}
    with pytest.raises(ValueError, match=f"{name} is on meta and x on cpu: move them to one device"):
        ops.linear(x, **given | {name: given[name].to("meta")})
