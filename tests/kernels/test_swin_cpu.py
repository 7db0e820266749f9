"""The CPU's kernels of both halves of a Swin layer, on every instruction set of this machine."""

import pytest
import torch

import clvp_fast
from clvp_fast.ops import swin
from tests.kit import assert_within_budget, strided
from tests.kit.isa import needs_library, run_on
from tests.ops.test_swin import mlp_operands, window_operands

pytestmark = needs_library
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["avx512bf16", "avx512", "avx2", "portable"], autouse=True)
def isa(request):
    run_on(request, request.param)


def wide(args):
    return [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args]


def in_plain_torch(parts, args):
    with clvp_fast.backend("torch"):
        return parts(*args)


def check_window(args):
    actual = swin._window_native(*args)
    assert actual.is_contiguous() and actual.dtype == args[0].dtype
    assert_within_budget(actual, swin._window_reference(*wide(args)), in_plain_torch(swin._window_parts, args))
    return actual


def check_mlp(args):
    actual = swin._mlp_native(*args)
    assert actual.is_contiguous() and actual.dtype == args[0].dtype
    assert_within_budget(actual, swin._mlp_reference(*wide(args)), in_plain_torch(swin._mlp_parts, args))


# Channels of checkpoints and around a group of 48 columns; heads around a vector; places that fill no vector.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "height, width, window, shift, heads, head_dim",
    [
        (16, 8, 8, 4, 4, 24),
        (8, 8, 8, 0, 1, 32),
        (14, 7, 7, 3, 2, 32),
        (4, 6, 2, 1, 8, 4),
        (3, 3, 3, 0, 1, 128),
        (5, 4, 1, 0, 2, 16),
        (24, 12, 12, 5, 3, 32),
    ],
)
def test_window_block(height, width, window, shift, heads, head_dim, dtype):
    args = window_operands(height, width, window, heads, head_dim, dtype)
    check_window((*args, window, shift, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_block_without_biases(dtype):
    args = list(window_operands(8, 16, 4, 2, 16, dtype))
    for absent in ((2,), (4,), (7,), (2, 4, 7)):
        given = [None if i in absent else arg for i, arg in enumerate(args)]
        check_window((*given, 4, 2, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_block_of_strided_tensors(dtype):
    x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out = window_operands(8, 8, 4, 2, 16, dtype)
    expected = check_window((x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, 4, 2, 1e-5))
    gathered = bias.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    rows = [torch.cat([w, w], 1)[:, : w.shape[1]] for w in (w_qkv, w_out)]  # further apart than they are long
    others = strided(x), strided(norm_weight), strided(norm_bias), rows[0], strided(b_qkv), gathered, rows[1], b_out
    assert torch.equal(swin._window_native(*others, 4, 2, 1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_the_bits_that_it_has_alone(dtype):
    x, *others = window_operands(16, 16, 8, 2, 16, dtype, batch=3)
    together, before = swin._window_native(x, *others, 8, 4, 1e-5), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for image in range(3):
                alone = swin._window_native(x[image : image + 1], *others, 8, 4, 1e-5)
                assert torch.equal(alone[0], together[image])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_offsets_and_small_variances(dtype):
    """A mean far from zero costs float32 statistics no digits, and eps is in the root."""
    x, *others = window_operands(4, 4, 4, 2, 16, dtype)
    check_window((x + 30, *others, 4, 0, 1e-5))
    check_window((x * 1e-3, *others, 4, 0, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_number_spoils_its_window_alone(dtype):
    x, *others = window_operands(8, 8, 4, 2, 16, dtype)
    whole = swin._window_native(x, *others, 4, 0, 1e-5)
    x[0, 1, 2, 3] = torch.nan
    out = swin._window_native(x, *others, 4, 0, 1e-5)
    assert out[0, :4, :4].isnan().all()
    assert torch.equal(out[0, 4:], whole[0, 4:]) and torch.equal(out[1:], whole[1:])


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, channels, inner", [(1, 32, 32), (9, 96, 384), (130, 64, 96), (40, 384, 32)])
def test_mlp_block(rows, channels, inner, dtype, activation):
    args = (*mlp_operands(rows, channels, inner, dtype), activation, 1e-5)
    check_mlp(args)
    check_mlp([None if i == 2 else arg for i, arg in enumerate(args)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_bits_that_it_has_alone(dtype):
    x, *weights = mlp_operands(300, 64, 96, dtype)
    together = swin._mlp_native(x, *weights, "gelu", 1e-5)
    for row in (0, 7, 8, 127, 128, 299):
        assert torch.equal(swin._mlp_native(x[row : row + 1], *weights, "gelu", 1e-5)[0], together[row])
