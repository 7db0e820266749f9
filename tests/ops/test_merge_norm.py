"""`merge_norm`: every path against transformers' own way, in float64; gradients, bad input."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.clap.modeling_clap import ClapAudioPatchMerging

import clvp_fast
from clvp_fast.ops import merge_norm
from tests.kit import assert_within_budget, random, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = 1e-2
SIZES = [(4, 6), (5, 4), (2, 7), (1, 1), (3, 3)]


def arguments(height, width, channels=6, dtype=torch.float32):
    x = random(2, height, width, channels, seed=0, dtype=dtype, scale=3.0) + 1
    return x, *(random(4 * channels, seed=seed, dtype=dtype) for seed in (1, 2))


def stock(x, weight, bias):
    """transformers' patch merging up to its norm; its linear layer is left out."""
    merging = ClapAudioPatchMerging.__new__(ClapAudioPatchMerging)  # whose arguments differ between versions
    torch.nn.Module.__init__(merging)
    merging.norm = torch.nn.LayerNorm(4 * x.shape[3], eps=EPS)
    merging.norm.weight.data, merging.norm.bias.data = weight, bias
    merging.reduction = torch.nn.Identity()
    out = merging(x.flatten(1, 2), tuple(x.shape[1:3]))
    return out.detach().view(len(x), -(-x.shape[1] // 2), -(-x.shape[2] // 2), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("size", SIZES)
def test_as_transformers(size, backend, dtype):
    x, weight, bias = arguments(*size, dtype=dtype)
    expected = stock(*(t.double() for t in (x, weight, bias)))
    with clvp_fast.backend(backend):
        for image in (x, strided(x)):
            out = merge_norm(image, weight=weight, bias=bias, eps=EPS)
            assert out.dtype == dtype and out.is_contiguous()
            assert_within_budget(out, expected, stock(x, weight, bias))
        none = torch.zeros_like(bias)
        without = merge_norm(x, weight=weight, eps=EPS)
        assert_within_budget(without, stock(x.double(), weight.double(), none.double()), stock(x, weight, none))


def test_gradients():
    args = [t.requires_grad_() for t in arguments(3, 4, channels=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda x, w, b: merge_norm(x, weight=w, bias=b, eps=EPS), args, fast_mode=True)


def test_compiles_whole_and_is_registered():
    x, weight, bias = arguments(5, 4)
    compiled = torch.compile(merge_norm, fullgraph=True, backend="aot_eager")
    expected = merge_norm(x, weight=weight, bias=bias, eps=EPS)
    torch.testing.assert_close(compiled(x, weight=weight, bias=bias, eps=EPS), expected)
    assert not torch.allclose(expected, F.layer_norm(expected, expected.shape[-1:]))
    torch.library.opcheck(torch.ops.clvp_fast.merge_norm.default, (x, weight, None, EPS))


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
    x, weight, bias = arguments(4, 4)
    with pytest.raises(error, match=message):
        merge_norm(**dict(x=x, weight=weight, bias=bias, eps=EPS) | changes)
