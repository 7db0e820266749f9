"""`window_attention`: its paths against the float64 reference, and both against attention as Swin defines it."""

import sys

import pytest
import torch
from transformers.models.clap.modeling_clap import ClapAudioLayer, window_partition, window_reverse

import clvp_fast
from clvp_fast.ops import window_attention, window_attention_weights
from tests.kit import assert_within_budget, random, strided

module = sys.modules["clvp_fast.ops.window_attention"]  # the package's name for it is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# height, width, window, shift: of checkpoints (the last stage, and one before), oblong, odd, one place a window.
SHAPES = [(8, 8, 8, 0), (16, 16, 8, 4), (8, 24, 8, 4), (12, 4, 4, 1), (15, 10, 5, 2), (8, 8, 8, 4), (3, 2, 1, 0)]


def operands(height, width, window, dtype=torch.float32, batch=2, heads=3, head_dim=24, seed=0):
    q = random(batch, height, width, heads, head_dim, seed=seed, dtype=dtype, scale=2.0)
    k, v = (random(*q.shape, seed=seed + n, dtype=dtype) for n in (1, 2))
    return q, k, v, random(heads, window**2, window**2, seed=seed + 3, dtype=dtype)


def eager(q, k, v, bias, window, shift):
    """As transformers goes about it: roll, cut, attend under a mask, join, roll back; its own code cuts and masks."""
    batch, height, width, heads, head_dim = q.shape
    mask = None
    if shift:
        geometry = type("Geometry", (), {"shift_size": shift, "window_size": window})
        mask = ClapAudioLayer.get_attn_mask(geometry, height, width, q.dtype, q.device)

    def windows(x):
        cut = window_partition(x.roll((-shift, -shift), (1, 2)).flatten(3), window)
        return cut.view(-1, window**2, heads, head_dim).transpose(1, 2)

    scores = windows(q) @ windows(k).transpose(-1, -2) * head_dim**-0.5 + bias
    if mask is not None:
        scores = scores + mask.repeat(batch, 1, 1)[:, None]
    weights = scores.softmax(-1)
    out = (weights @ windows(v)).transpose(1, 2).reshape(-1, window, window, heads * head_dim)
    return window_reverse(out, window, height, width).roll((shift, shift), (1, 2)).view(q.shape), weights


def check(args, window, shift):
    with clvp_fast.backend("reference"):
        reference = window_attention(*(x.double() for x in args), window=window, shift=shift)
    for backend in (None, "torch"):  # by default also a CPU's kernel
        with clvp_fast.backend(backend):
            actual = window_attention(*args, window=window, shift=shift)
        assert actual.is_contiguous() and actual.dtype == args[2].dtype
        assert_within_budget(actual, reference, eager(*args, window, shift)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_path_against_reference(shape, dtype):
    *size, window, shift = shape
    check(operands(*size, window, dtype), window, shift)


@pytest.mark.parametrize("path", ["_sdpa", "_matmul"])
@pytest.mark.parametrize("shape", SHAPES)
def test_paths_over_windows_in_order(shape, path):
    """Those of a GPU and of half types, here in float32: the choice is made for the machine."""
    *size, window, shift = shape
    args = operands(*size, window)
    order = module._window_order(*size, window, shift, "cpu")
    bias = module._scored_bias(args[3], *size, window, shift, torch.float32)
    out = getattr(module, path)(*args[:3], bias, order, window, 24**-0.5, 0.0)
    assert out.is_contiguous()
    assert_within_budget(out, eager(*(x.double() for x in args), window, shift)[0], eager(*args, window, shift)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_swins_attention(shape):
    *size, window, shift = shape
    args = operands(*size, window, torch.float64)
    with clvp_fast.backend("reference"):
        assert_within_budget(window_attention(*args, window=window, shift=shift), eager(*args, window, shift)[0])
    out, weights = window_attention_weights(*args, window=window, shift=shift)
    for found, expected in zip((out, weights), eager(*args, window, shift), strict=True):
        assert_within_budget(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 4])
def test_views_of_a_packed_projection(dtype, shift):
    packed = random(2, 16, 8, 3, 4, 8, seed=5, dtype=dtype, scale=1.5)
    bias = random(8 * 8, 8 * 8, 4, seed=6, dtype=dtype).permute(2, 0, 1)
    check((*packed.unbind(3), bias), 8, shift)
    q, k, v, bias = operands(16, 8, 8, dtype)
    check((strided(q), k.transpose(1, 2).contiguous().transpose(1, 2), v, strided(bias)), 8, shift)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_seam_keeps_strangers_apart(backend):
    """Opposite corners of the image meet in one shifted window, and do not see each other."""
    q, k, v, bias = (torch.zeros_like(x) for x in operands(8, 8, 4, heads=1, head_dim=1))
    v[:, 0, 0] = 1.0
    with clvp_fast.backend(backend):
        out = window_attention(q, k, v, bias, window=4, shift=2)[0, :, :, 0, 0]
    seen = torch.zeros(8, 8)
    seen[:2, :2] = 1 / 4  # the quarter of the corner's window that is its neighbourhood
    torch.testing.assert_close(out, seen, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [0, 2])
def test_gradients(shift):
    args = [x.requires_grad_() for x in operands(4, 8, 4, torch.float64, batch=1, heads=2, head_dim=3)]

    def run(*t):
        return window_attention(*t, window=4, shift=shift)

    assert torch.autograd.gradcheck(run, args, fast_mode=True)
    ours = torch.autograd.grad(run(*args).square().sum(), args)
    with clvp_fast.backend("reference"):
        theirs = torch.autograd.grad(run(*args).square().sum(), args)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_within_budget(mine, expected)


def test_dropout_drops_weights():
    q, k, v, bias = operands(8, 8, 4)
    whole, weights = window_attention_weights(q, k, v, bias, window=4, shift=2)
    for backend in ("reference", "torch"):
        torch.manual_seed(0)
        with clvp_fast.backend(backend):
            drawn = torch.stack([window_attention(q, k, v, bias, window=4, shift=2, dropout_p=0.4) for _ in range(300)])
        assert not torch.equal(drawn[0], drawn[1])
        deviation = (drawn.mean(0) - whole).abs() / (drawn.std(0) / 300**0.5)
        assert deviation.mean() < 1.1 and deviation.max() < 6
    dropped, same = window_attention_weights(q, k, v, bias, window=4, shift=2, dropout_p=0.4)
    assert torch.equal(same, weights) and not torch.allclose(dropped, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 2])
def test_empty_batch(shift, dtype):
    args = operands(8, 8, 4, dtype, batch=0)
    for backend in ("reference", "torch"):
        with clvp_fast.backend(backend):
            assert window_attention(*args, window=4, shift=shift).shape == (0, 8, 8, 3, 24)


def test_compiles_whole():
    args = operands(8, 8, 4)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, window=4, shift=2), window_attention(*args, window=4, shift=2))


def test_registered_operator():
    args = (*operands(8, 8, 4), 4, 2, 0.2)
    torch.library.opcheck(torch.ops.clvp_fast.window_attention.default, args)


def test_autocast():
    args = operands(8, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = window_attention(*args, window=4, shift=2)
    torch.testing.assert_close(out.float(), window_attention(*args, window=4, shift=2), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"q": torch.zeros(2, 8, 8, 24)},
            ValueError,
            r"q must have shape \[batch, height, width, num_heads, head_dim\]",
        ),
        ({"k": torch.zeros(2, 8, 4, 3, 24)}, ValueError, "k must have shape that of q"),
        ({"v": torch.zeros(2, 8, 8, 3, 24).half()}, TypeError, "v must have the dtype of q"),
        ({"bias": torch.zeros(3, 16, 15)}, ValueError, r"bias must have shape \[3, 16, 16\]"),
        ({"bias": torch.zeros(3, 16, 16).long()}, TypeError, "bias must be floating, not torch.int64"),
        ({"window": 3}, ValueError, "window must divide the image, 8 x 8, and 3 does not: pad the image"),
        ({"window": 0}, ValueError, "window must divide the image"),
        ({"shift": 4}, ValueError, "shift must be from 0 to window - 1 = 3, not 4"),
        ({"shift": -1}, ValueError, "not -1"),
    ],
)
def test_bad_input(changes, error, message):
    q, k, v, bias = operands(8, 8, 4)
    call = dict(q=q, k=k, v=v, bias=bias, window=4) | changes
    for function in (window_attention, window_attention_weights):
        with pytest.raises(error, match=message):
            function(**call)
