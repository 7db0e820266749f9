"""float32 products of the kernels in the interpreter, summed as a GPU's matrix unit sums: what their budget allows."""

import functools

import numpy as np
import pytest
import torch

from tests.kit import device, interpreter, matrix_unit
from tests.kit.backends import BACKENDS
from tests.ops import test_linear, test_mlp, test_paged_attention, test_rotary_attention_calls

pytestmark = pytest.mark.skipif(device.DEVICE == "cuda", reason="on a GPU the unit itself is tested")
(INTERPRETED,) = (backend for backend in BACKENDS if backend.name == "interpreted")
# An A100's, and units that have more than it: digits, products at a time, or both.
UNITS = {
    "A100": {},
    "more digits": dict(digits=2),
    "more products": dict(products=8),
    "both": dict(products=8, digits=2),
}


def use(monkeypatch, **unit):
    monkeypatch.setattr(interpreter, "summed", functools.partial(matrix_unit.dot, **unit))
    monkeypatch.setattr(device, "MATRIX_UNIT", True)


@pytest.fixture(params=UNITS)
def unit(request, monkeypatch):
    use(monkeypatch, **UNITS[request.param])


def attention():
    test_rotary_attention_calls.test_one_query_over_a_cache(INTERPRETED, torch.float32)


def decode():
    test_paged_attention.test_decode_widths_and_pages_of_32(INTERPRETED, torch.float32, 128)


def block():
    test_mlp.test_every_regime(INTERPRETED, torch.float32, "geglu_mlp", (1,))


# Those of the kernels' tests that came closest to the budget.
CASES = [attention, decode, block]


@pytest.mark.parametrize("case", CASES)
def test_three_products_of_tf32_keep_the_budget(unit, case):
    case()


# A block adds up each 32 columns outside of the unit, and keeps that budget too.
@pytest.mark.parametrize("case", [attention, decode])
def test_the_budget_of_rounded_sums_would_not_do(monkeypatch, case):
    use(monkeypatch)
    monkeypatch.setattr(device, "MATRIX_UNIT", False)
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        case()


@pytest.mark.parametrize("case", CASES)
def test_one_product_of_tf32_is_refused(monkeypatch, case):
    use(monkeypatch)
    monkeypatch.setattr(interpreter, "summed", lambda a, b, total, _: matrix_unit.dot(a, b, total, "TF32"))
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        case()


def test_over_int8_weights_the_error_does_not_grow_with_the_depth(unit):
    """Within the budget of rounded sums, as long sums are added up outside of the unit."""
    test_linear.check(INTERPRETED, *test_linear.operands((2,), 4096, 16, int8=True))


def test_in_the_unit_alone_it_would(monkeypatch):
    """Cut a sum off at each step, so that it shrinks: by 2e-5 at a depth of 4096, where GPU tests allow 1e-5."""
    use(monkeypatch)
    x, weight, _, _ = test_linear.operands((2,), 4096, 16, int8=True)
    exact = weight.double() @ x.double().T
    found = matrix_unit.dot(weight.float().numpy(), x.numpy().T, np.zeros((16, 2), np.float32), "TF32x3")
    assert (torch.from_numpy(found).double() - exact).abs().max() > 1e-5 * exact.abs().max()


def one(terms, total, **unit):
    """Return the first element of a product of ones and `terms`, added to `total`."""
    b = np.array(terms, np.float32)[:, None]
    return matrix_unit.dot(np.ones_like(b.T), b, np.array([[total]], np.float32), "TF32", **unit).item()


def test_the_unit_does_what_experiments_found():
    """Check findings on the A100, and steps of float32's own rounding that the unit leaves out."""
    assert one([2, 2**-23 + 2**-24], 0) == 2  # to 0 from above,
    assert one([-2, -(2**-23) - 2**-24], 0) == -2  # and from below
    assert one([1], 2**-24 - 1) == 2**-24  # one digit more
    assert one([1, 2**-25, 2**-25, 2**-25, 2**-25], 0) == 1  # each is cut off before they are added,
    assert one([2**-25, 2**-25, 2**-25, 1], 2**-25) == 1  # in whichever order they come,
    assert one([1, 2**-25, 2**-25, -1], 0, digits=2) == 2**-24  # where a unit has no further digit
    assert one([1] + [2**-25] * 4, 0, products=1, digits=2) == 1  # and so is each sum
    nearly = np.array([[1 + 2**-10]], np.float32)
    assert (
        matrix_unit.dot(nearly, nearly, np.zeros_like(nearly), "TF32").item() == (1 + 2**-10) ** 2
    )  # products are exact
