"""The CPU's kernel of linear, on every instruction set of this machine."""

import pytest
import torch

from clvp_fast.ops.linear import _native, _torch, reference
from tests.kit import assert_within_budget, linear_operands, random, strided
from tests.kit.isa import needs_library, run_on

pytestmark = needs_library


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "portable"])
def kernel(request):
    """`linear`'s kernel on one instruction set."""
    run_on(request, request.param)
    return _native


# Around the tiles (4 or 8 rows, 2, 3 or 6 columns) and an item (128 rows, 48 columns); the decoder's own widths.
@pytest.mark.parametrize(
    "rows, columns, outs",
    [(1, 32, 1), (3, 64, 7), (4, 96, 48), (5, 32, 49), (17, 1024, 130), (128, 32, 47), (129, 64, 97), (300, 32, 5)],
)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_reference(kernel, dtype, int8, rows, columns, outs):
    x, weight, bias, scale = linear_operands(rows, columns, outs, dtype, int8)
    for args in ((x, weight, bias, scale, None), (x, weight, None, scale, "gelu_new")):
        wide = [None if tensor is None else tensor.double() for tensor in args[:4]]
        assert_within_budget(kernel(*args), reference(*wide, args[4]), _torch(*args))


@pytest.mark.parametrize("rows, outs", [(1, 1), (5, 49), (17, 130), (129, 47)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_is_added_before_anything_is_rounded(kernel, dtype, int8, rows, outs):
    """Beside a half type too the sum is float32, of which the product is as exact as in float32."""
    x, weight, bias, scale = linear_operands(rows, 64, outs, dtype, int8)
    residual = strided(random(rows, outs, seed=9))
    for activation in (None, "gelu_new"):
        out = kernel(x, weight, bias, scale, activation, residual)
        wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, scale)]
        expected = reference(*wide, activation, residual.double())
        assert out.dtype == torch.float32
        assert (out.double() - expected).abs().max() <= 2e-6 * (1 + expected.abs().max())


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_bits_that_it_has_alone(kernel, dtype, int8):
    args = linear_operands(133, 256, 100, dtype, int8)
    together = kernel(*args, "gelu_new")
    for row in (0, 1, 3, 4, 127, 128, 132):
        assert torch.equal(kernel(args[0][row : row + 1], *args[1:], "gelu_new")[0], together[row])


def test_threads_change_no_bit(kernel):
    args = linear_operands(9, 64, 500, torch.float32, False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(kernel(*args, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_bad_number_stays_in_its_row(kernel):
    x, weight, bias, _ = linear_operands(6, 64, 60, torch.float32, False)
    x[2, 5], x[4, 63] = torch.nan, torch.inf
    out = kernel(x, weight, bias, None, "gelu_new")
    assert out[2].isnan().all()
    assert not out[4].isfinite().all() and out[[0, 1, 3, 5]].isfinite().all()


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 5.0, 88.0, 1e18, float("inf")])
def test_gelu_at_its_ends(kernel, value):
    x, weight = torch.full((1, 32), value), torch.zeros(3, 32)
    weight[:, 0] = 1.0
    x[:, 1:] = 0
    got = kernel(x, weight, None, None, "gelu_new").double()
    expected = torch.nn.functional.gelu(torch.tensor(value, dtype=torch.float64), approximate="tanh")
    torch.testing.assert_close(got, expected.expand(1, 3), rtol=1e-6, atol=1e-12)
