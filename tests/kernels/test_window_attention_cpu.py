"""The CPU's kernel of window_attention, on every instruction set of this machine."""

import sys

import pytest
import torch

import clvp_fast.ops
from tests.kit import assert_within_budget, random, strided
from tests.kit.isa import needs_library, run_on

pytestmark = needs_library
DTYPES = [torch.float32, torch.bfloat16]
operator = sys.modules[clvp_fast.ops.window_attention.__module__]


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "portable"], autouse=True)
def isa(request):
    run_on(request, request.param)


def inputs(height, width, window=8, heads=2, head_dim=24, images=1, dtype=torch.float32):
    shape = images, height, width, heads, head_dim
    q, k, v = (random(*shape, seed=n, dtype=dtype, scale=2.0 if n == 0 else 1.0) for n in range(3))
    return q, k, v, random(heads, window**2, window**2, seed=3, dtype=dtype)


def attend(q, k, v, bias, window=8, shift=0):
    return operator._native(q, k, v, bias, window, shift, q.shape[-1] ** -0.5)


def check(args, window=8, shift=0):
    actual, scale = attend(*args, window, shift), args[0].shape[-1] ** -0.5
    assert actual.is_contiguous() and actual.dtype == args[2].dtype
    reference = operator.reference(*(x.double() for x in args), window, shift, scale)
    assert_within_budget(actual, reference, operator._torch(*args, window, shift, scale))
    return actual


# Widths around a vector of 4, 8 or 16 numbers, or of 32 halves, and around half of one.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, head_dim", [(4, 24), (3, 32), (2, 20), (2, 8), (1, 9), (1, 1), (1, 47), (1, 128)])
def test_heads_and_their_width(heads, head_dim, dtype):
    check(inputs(16, 8, heads=heads, head_dim=head_dim, dtype=dtype), shift=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window, shift", [(12, 5), (7, 3), (5, 2), (4, 0), (3, 1), (2, 1), (1, 0)])
def test_windows_of_every_size(window, shift, dtype):
    check(inputs(2 * window, 3 * window, window, images=2, dtype=dtype), window, shift)


@pytest.mark.parametrize("shift", range(8))
def test_every_shift(shift):
    check(inputs(16, 24, heads=1), shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_the_same_bits(dtype):
    q, k, v, bias = args = inputs(16, 8, images=2, dtype=dtype)
    expected = check(args, shift=4)
    assert torch.equal(attend(*(strided(x) for x in args), shift=4), expected)
    across = [x.transpose(1, 4).contiguous().transpose(1, 4) for x in (q, k, v)]
    assert torch.equal(attend(*across, bias.permute(1, 2, 0).contiguous().permute(2, 0, 1), shift=4), expected)
    packed = torch.stack((q, k, v), 3)
    assert torch.equal(attend(*packed.unbind(3), bias, shift=4), expected)
    assert torch.equal(attend(q[:1].expand_as(q), k, v, bias, shift=4)[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_the_bits_that_it_has_alone(dtype):
    q, k, v, bias = inputs(16, 16, images=3, dtype=dtype)
    together, before = attend(q, k, v, bias, shift=4), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for image in range(3):
                alone = attend(*(x[image : image + 1] for x in (q, k, v)), bias, shift=4)
                assert torch.equal(alone[0], together[image])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_another_type(dtype):
    q, k, v, bias = inputs(8, 8, dtype=dtype)
    for other in DTYPES:
        check((q, k, v, bias.to(other)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_that_forbids(dtype):
    """By the least number of its type, and by infinity; a place that sees nothing weighs all alike."""
    q, k, v, bias = inputs(8, 8, dtype=dtype)
    bias[0, :, ::3], bias[1, :, ::2] = torch.finfo(dtype).min, float("-inf")
    check((q, k, v, bias))
    out = attend(q, k, v, torch.full_like(bias, torch.finfo(torch.float32).min, dtype=torch.float32)).double()
    mean = v.double().mean((1, 2), keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_bad_numbers(dtype):
    q, k, v, bias = inputs(8, 16, heads=1, dtype=dtype)
    check((q * 3, k, v, bias))
    q[0, 2, 3, 0, 5], k[0, 1, 9, 0, 0] = torch.nan, torch.nan
    out = attend(q, k, v, bias)
    spoilt = out.isnan().all(-1)[0, ..., 0]
    assert spoilt[2, 3] and spoilt[:, 8:].all() and int(spoilt.sum()) == 1 + 64
    assert out[0, ~spoilt].isfinite().all()
