"""`merge_norm`: every backend against transformers' own way, in float64; layouts, memory, bits, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.clap.modeling_clap import ClapAudioPatchMerging

from clvp_fast.kernels import norm
from clvp_fast.ops import merge_norm
from tests.kit import Guarded, assert_within_budget, random, strided
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck

EPS = 1e-2
EVERY = ("reference", "torch", *TRITON)
# Even and odd sides, one place alone, widths of one and beyond a power of two.
SHAPES = [(2, 4, 6, 96), (1, 5, 4, 24), (2, 2, 7, 7), (3, 3, 3, 1), (1, 1, 1, 40), (1, 2, 2, 384), (4, 10, 6, 16)]
SHAPES += [(2, *sides, 6) for sides in ((4, 6), (5, 4), (2, 7), (1, 1), (3, 3))]


def arguments(*shape, dtype=torch.float32, device="cpu"):
    x = random(*shape, seed=0, dtype=dtype, scale=3.0, device=device) + 1
    weight, bias = (random(4 * shape[-1], seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    return x, dict(weight=weight, bias=bias, eps=EPS)


def stock(x, weight, bias, eps=EPS):
    """Run transformers' patch merging up to its norm; its linear layer is left out."""
    merging = ClapAudioPatchMerging.__new__(ClapAudioPatchMerging)  # whose arguments differ between versions
    torch.nn.Module.__init__(merging)
    merging.norm = torch.nn.LayerNorm(4 * x.shape[3], eps=eps)
    merging.norm.weight.data, merging.norm.bias.data = weight, torch.zeros_like(weight) if bias is None else bias
    merging.reduction = torch.nn.Identity()
    out = merging(x.flatten(1, 2), tuple(x.shape[1:3]))
    return out.detach().view(len(x), -(-x.shape[1] // 2), -(-x.shape[2] // 2), -1)


def check(x, options):
    out = merge_norm(x, **options)
    wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    assert_within_budget(out, stock(x.double(), **wide), stock(x, **options))
    assert out.is_contiguous() and out.dtype == x.dtype
    return out


@pytest.mark.parametrize("shape", SHAPES)
@on(*EVERY, types="dtype")
def test_as_transformers(backend, dtype, shape):
    x, options = arguments(*shape, dtype=dtype, device=backend.device)
    check(x, options)
    check(x, options | {"bias": None})


@on(*EVERY, types="dtype")
def test_strided_inputs_and_poison(backend, dtype):
    x, options = arguments(3, 5, 6, 24, dtype=dtype, device=backend.device)
    expected = check(x, options)
    across, turned = x.transpose(1, 3).contiguous().transpose(1, 3), x.transpose(1, 2).contiguous().transpose(1, 2)
    batched = x.transpose(0, 1).contiguous().transpose(0, 1)
    affine = {"weight": strided(options["weight"]), "bias": strided(options["bias"])}
    for view in (strided(x), across, turned, batched):
        assert torch.equal(check(view, options), expected)
    assert torch.equal(merge_norm(x, **options | affine), expected)


@on(*TRITON, types="dtype")
def test_writes_all_of_its_output_and_nothing_else(backend, dtype):
    x, options = arguments(3, 5, 4, 24, dtype=dtype, device=backend.device)
    out = Guarded(3, 3, 2, 96, dtype=dtype, device=backend.device)
    norm.merge_norm(x, options["weight"], options["bias"], EPS, out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, merge_norm(x, **options))


@on(*TRITON, types="dtype")
def test_bits_do_not_depend_on_the_batch(backend, dtype):
    x, options = arguments(17, 5, 4, 24, dtype=dtype, device=backend.device)
    out = merge_norm(x, **options)
    assert torch.equal(out, merge_norm(x, **options))
    for image in (0, 16):
        assert torch.equal(out[image : image + 1], merge_norm(x[image : image + 1], **options))


@on(*EVERY)
def test_nan_stays_in_its_place(backend):
    x, options = arguments(2, 4, 4, 24, device=backend.device)
    expected = merge_norm(x, **options)
    x[1, 2, 1, 5] = float("nan")
    out = merge_norm(x, **options)
    reached = torch.zeros_like(out, dtype=torch.bool)
    reached[1, 1, 0] = True
    assert out[reached].isnan().all() and torch.equal(out[~reached], expected[~reached])


@on(*TRITON)
def test_empty_input_and_unserved_arguments(backend):
    x, options = arguments(1, 4, 4, 8, device=backend.device)
    assert merge_norm(x[:0], **options).shape == (0, 2, 2, 32)
    opcheck(backend, torch.ops.clvp_fast.merge_norm.default, (x, *options.values()))
    big, wide = arguments(1, 1, 1, 2049, device=backend.device)
    with pytest.raises(RuntimeError, match="rows must be at most 8192 wide, not 8196"):
        merge_norm(big, **wide)
    with pytest.raises(RuntimeError, match="tensors must be float32, float16 or bfloat16"):
        merge_norm(x.double(), **options)
    with pytest.raises(RuntimeError, match="requires grad"):
        merge_norm(x.requires_grad_(), **options)


def test_gradients():
    x, options = arguments(2, 3, 4, 2, dtype=torch.float64)
    args = [t.requires_grad_() for t in (x, options["weight"], options["bias"])]
    assert torch.autograd.gradcheck(lambda x, w, b: merge_norm(x, weight=w, bias=b, eps=EPS), args, fast_mode=True)


def test_compiles_whole_and_is_registered():
    x, options = arguments(2, 5, 4, 6)
    compiled = torch.compile(merge_norm, fullgraph=True, backend="aot_eager")
    expected = merge_norm(x, **options)
    torch.testing.assert_close(compiled(x, **options), expected)
    assert not torch.allclose(expected, F.layer_norm(expected, expected.shape[-1:]))
    torch.library.opcheck(torch.ops.clvp_fast.merge_norm.default, (x, options["weight"], None, EPS))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 4, 6)}, ValueError, r"x must have shape \[batch, height, width, channels\]"),
        ({"weight": torch.ones(6)}, ValueError, r"weight must have shape \[24\], four times the channels of x"),
        ({"bias": torch.ones(23)}, ValueError, "bias must have shape that of weight"),
        ({"bias": torch.ones(24).half()}, TypeError, "bias must have the dtype of weight"),
    ],
)
def test_bad_input(changes, error, message):
    x, options = arguments(2, 4, 4, 6)
    with pytest.raises(error, match=message):
        merge_norm(**dict(x=x) | options | changes)
