"""`merge_norm` as a kernel: budgets against float64, edges, strides, memory, bits."""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import norm
from clvp_fast.ops import merge_norm
from tests.kit import Guarded, assert_within_budget, random, strided
from tests.kit.device import DEVICE, DTYPES

EPS = 1e-2


def arguments(*shape, dtype):
    x = random(*shape, seed=0, dtype=dtype, scale=3.0, device=DEVICE) + 1
    weight, bias = (random(4 * shape[-1], seed=seed, dtype=dtype, device=DEVICE) for seed in (1, 2))
    return x, dict(weight=weight, bias=bias, eps=EPS)


def check(x, options):
    out = merge_norm(x, **options)
    wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    with clvp_fast.backend("reference"):
        expected = merge_norm(x.double(), **wide)
    with clvp_fast.backend("torch"):
        assert_within_budget(out, expected, merge_norm(x, **options))
    assert out.is_contiguous() and out.dtype == x.dtype
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 4, 6, 96), (1, 5, 4, 24), (2, 2, 7, 7), (3, 3, 3, 1), (1, 1, 1, 40), (1, 2, 2, 384), (4, 10, 6, 16)]
)
def test_against_reference(shape, dtype):
    x, options = arguments(*shape, dtype=dtype)
    check(x, options)
    check(x, options | {"bias": None})


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_poison(dtype):
    x, options = arguments(3, 5, 6, 24, dtype=dtype)
    expected = check(x, options)
    across, turned = x.transpose(1, 3).contiguous().transpose(1, 3), x.transpose(1, 2).contiguous().transpose(1, 2)
    batched = x.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (strided(x), across, turned, batched):
        assert torch.equal(check(view, options), expected)
    assert torch.equal(
        merge_norm(x, weight=strided(options["weight"]), bias=strided(options["bias"]), eps=EPS), expected
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_all_of_its_output_and_nothing_else(dtype):
    x, options = arguments(3, 5, 4, 24, dtype=dtype)
    out = Guarded(3, 3, 2, 96, dtype=dtype, device=DEVICE)
    norm.merge_norm(x, options["weight"], options["bias"], EPS, out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, merge_norm(x, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_batch(dtype):
    x, options = arguments(17, 5, 4, 24, dtype=dtype)
    out = merge_norm(x, **options)
    assert torch.equal(out, merge_norm(x, **options))
    for image in (0, 16):
        assert torch.equal(out[image : image + 1], merge_norm(x[image : image + 1], **options))


def test_nan_stays_in_its_place():
    x, options = arguments(2, 4, 4, 24, dtype=torch.float32)
    expected = merge_norm(x, **options)
    x[1, 2, 1, 5] = float("nan")
    out = merge_norm(x, **options)
    reached = torch.zeros_like(out, dtype=torch.bool)
    reached[1, 1, 0] = True
    assert out[reached].isnan().all() and torch.equal(out[~reached], expected[~reached])


def test_nothing_to_do_and_what_is_not_served():
    x, options = arguments(1, 4, 4, 8, dtype=torch.float32)
    assert merge_norm(x[:0], **options).shape == (0, 2, 2, 32)
    torch.library.opcheck(torch.ops.clvp_fast.merge_norm.default, (x, *options.values()))
    big, wide = arguments(1, 1, 1, 2049, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="rows must be at most 8192 wide, not 8196"):
        merge_norm(big, **wide)
    with pytest.raises(RuntimeError, match="tensors must be float32, float16 or bfloat16"):
        merge_norm(x.double(), **options)
    with pytest.raises(RuntimeError, match="requires grad"):
        merge_norm(x.requires_grad_(), **options)
