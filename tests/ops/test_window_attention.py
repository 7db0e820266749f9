"""`window_attention`: every backend against attention as Swin defines it, in float64; the seam, gradients, errors.

Layouts, memory and bits are in test_window_attention_layouts.py.
"""

import sys

import pytest
import torch
from transformers.models.clap.modeling_clap import ClapAudioLayer, window_partition, window_reverse

import clvp_fast
from clvp_fast.kernels import window_attention as kernels
from clvp_fast.ops import window_attention, window_attention_weights
from tests.kit import assert_within_budget, random
from tests.kit.backends import TRITON, on

module = sys.modules["clvp_fast.ops.window_attention"]  # the package's name for it is the function
KERNELS = ("cpu", *TRITON)
PLAIN = ("default", "torch", "reference")
HALF_TYPES = (torch.float16, torch.bfloat16)
# height, width, window, shift: of checkpoints (the last stage, and one before), oblong, odd, one place a window.
SHAPES = [(8, 8, 8, 0), (16, 16, 8, 4), (8, 24, 8, 4), (12, 4, 4, 1), (15, 10, 5, 2), (8, 8, 8, 4), (3, 2, 1, 0)]


def operands(height, width, window=8, dtype=torch.float32, device="cpu", images=1, heads=2, head_dim=24):
    """q, k, v and bias."""
    shape = images, height, width, heads, head_dim
    q, k, v = (random(*shape, seed=n, dtype=dtype, scale=1.0 if n else 2.0, device=device) for n in range(3))
    return q, k, v, random(heads, window**2, window**2, seed=3, dtype=dtype, device=device)


def eager(q, k, v, bias, window=8, shift=0, scale=None):
    """Compute as transformers: roll, cut, attend under a mask, join, roll back; its own code cuts and masks."""
    batch, height, width, heads, head_dim = q.shape
    mask = None
    if shift:
        geometry = type("Geometry", (), {"shift_size": shift, "window_size": window})
        mask = ClapAudioLayer.get_attn_mask(geometry, height, width, q.dtype, q.device)

    def windows(x):
        cut = window_partition(x.roll((-shift, -shift), (1, 2)).flatten(3), window)
        return cut.view(-1, window**2, heads, head_dim).transpose(1, 2)

    scores = windows(q) @ windows(k).transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale) + bias
    if mask is not None:
        scores = scores + mask.repeat(batch, 1, 1)[:, None]
    weights = scores.softmax(-1)
    out = (weights @ windows(v)).transpose(1, 2).reshape(-1, window, window, heads * head_dim)
    return window_reverse(out, window, height, width).roll((shift, shift), (1, 2)).view(q.shape), weights


def check(backend, args, window=8, shift=0, baseline="torch", **options):
    """Compare with transformers' way in float64; the budget is the error of torch's path, or for that of theirs."""
    actual = window_attention(*args, window=window, shift=shift, **options)
    assert actual.is_contiguous() and actual.dtype == args[2].dtype
    if backend.name in KERNELS:
        with clvp_fast.backend(baseline):
            plain = window_attention(*args, window=window, shift=shift, **options).clone()
    else:
        plain = eager(*args, window, shift, **options)[0]
    reference = eager(*(x.double() for x in args), window, shift, **options)[0]
    assert_within_budget(actual, reference, plain, times=backend.times(actual.dtype))
    return actual


@pytest.mark.parametrize("shape", SHAPES)
@on(*PLAIN, "cpu", "gpu", types="dtype")
def test_is_swins_attention(backend, dtype, shape):
    *size, window, shift = shape
    check(backend, operands(*size, window, dtype, backend.device, images=2, heads=3), window, shift)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_swins(shape):
    *size, window, shift = shape
    args = operands(*size, window, torch.float64, images=2, heads=3)
    out, weights = window_attention_weights(*args, window=window, shift=shift)
    for found, expected in zip((out, weights), eager(*args, window, shift), strict=True):
        assert_within_budget(found, expected)


@pytest.mark.parametrize("path", ["_sdpa", "_matmul"])
@pytest.mark.parametrize("shape", SHAPES)
def test_paths_over_windows_in_order(shape, path):
    """Run a GPU's and half types' paths in float32, whatever this machine would choose."""
    *size, window, shift = shape
    args = operands(*size, window, images=2, heads=3)
    order = module._window_order(*size, window, shift, "cpu")
    bias = module._scored_bias(args[3], *size, window, shift, torch.float32)
    out = getattr(module, path)(*args[:3], bias, order, window, 24**-0.5, 0.0)
    assert out.is_contiguous()
    assert_within_budget(out, eager(*(x.double() for x in args), window, shift)[0], eager(*args, window, shift)[0])


# Widths around a vector of 4, 8 or 16 numbers, or of 32 halves, and around half of one.
@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize(
    "heads, head_dim", [(4, 24), (3, 32), (32, 24), (2, 20), (2, 16), (2, 8), (1, 9), (1, 8), (1, 1)]
)
@on(*KERNELS, types="dtype")
def test_heads_and_their_width(backend, dtype, heads, head_dim, shift):
    check(backend, operands(8, 16, 8, dtype, backend.device, heads=heads, head_dim=head_dim), shift=shift)


@pytest.mark.parametrize("window, shift", [(7, 3), (5, 2), (4, 0), (3, 1), (2, 1), (1, 0)])
@on(*KERNELS, types="dtype")
def test_windows_of_every_size(backend, dtype, window, shift):
    check(backend, operands(2 * window, 3 * window, window, dtype, backend.device, images=2), window, shift)


@on("cpu", types="dtype")
def test_a_cpu_serves_more_windows_and_heads(backend, dtype):
    check(backend, operands(24, 36, 12, dtype, images=2), 12, 5)
    for head_dim in (47, 128):
        check(backend, operands(16, 8, 8, dtype, heads=1, head_dim=head_dim), shift=4)


@pytest.mark.parametrize("shift", range(8))
@on(*KERNELS)
def test_every_shift(backend, shift):
    check(backend, operands(16, 24, device=backend.device, heads=1), shift=shift)


@pytest.mark.parametrize("images, height, width", [(5, 8, 8), (3, 24, 8), (1, 8, 56), (2, 40, 24)])
@on(*KERNELS, types="dtype")
def test_any_number_of_windows(backend, dtype, images, height, width):
    for shift in (0, 3):
        check(backend, operands(height, width, 8, dtype, backend.device, images, heads=1), shift=shift)


def check_programs(backend, dtype, monkeypatch):
    args = operands(40, 56, 8, dtype, backend.device)
    alone = check(backend, args, shift=4)
    for multiprocessors in (1, 2):  # 8 windows a program, and 4: the last one has fewer
        monkeypatch.setattr(kernels, "multiprocessors", lambda: multiprocessors)  # noqa: B023
        assert torch.equal(window_attention(*args, window=8, shift=4), alone)
    monkeypatch.setattr(kernels, "_PROGRAMS", 0.25)  # all that one may have
    assert torch.equal(window_attention(*args, window=8, shift=4), alone)


@on(*TRITON)
def test_programs_of_several_windows(backend, monkeypatch):
    check_programs(backend, torch.float32, monkeypatch)


@pytest.mark.slow
@on(*TRITON, types="dtype", among=HALF_TYPES)
def test_programs_of_several_windows_in_half_types(backend, dtype, monkeypatch):
    check_programs(backend, dtype, monkeypatch)


@on(*KERNELS, types="dtype, other")
def test_a_bias_of_another_type(backend, dtype, other):
    q, k, v, bias = operands(8, 8, 8, dtype, backend.device)
    check(backend, (q, k, v, bias.to(other)))


@on(*KERNELS, types="dtype")
def test_a_bias_that_forbids(backend, dtype):
    """Forbid by the least number of the type, and by infinity; a place without keys weighs all alike."""
    q, k, v, bias = operands(8, 8, 8, dtype, backend.device)
    bias[0, :, ::3], bias[1, :, ::2] = torch.finfo(dtype).min, float("-inf")
    check(backend, (q, k, v, bias))
    blind = torch.full_like(bias, torch.finfo(torch.float32).min, dtype=torch.float32)
    out = window_attention(q, k, v, blind, window=8).double()
    mean = v.double().mean((1, 2), keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=0, atol=2 * torch.finfo(dtype).eps)


@on(*TRITON, types="dtype")
def test_extreme_scores(backend, dtype):
    """Compare with the reference in the same type, as torch rounds such scores to halves on a CPU."""
    q, k, v, bias = operands(16, 8, 8, dtype, backend.device)
    check(backend, (q * 80, k * 50, v, bias), shift=4, baseline="reference")
    q[:], k[:] = 40, 30  # one score for all keys
    check(backend, (q, k, v, bias), shift=4, baseline="reference")
    check(backend, (q, -k, v, bias), scale=2.5, baseline="reference")


@on("cpu", types="dtype")
def test_large_scores_and_bad_numbers(backend, dtype):
    q, k, v, bias = operands(8, 16, 8, dtype, heads=1)
    check(backend, (q * 3, k, v, bias))
    q[0, 2, 3, 0, 5], k[0, 1, 9, 0, 0] = torch.nan, torch.nan
    out = window_attention(q, k, v, bias, window=8)
    spoilt = out.isnan().all(-1)[0, ..., 0]
    assert spoilt[2, 3] and spoilt[:, 8:].all() and int(spoilt.sum()) == 1 + 64
    assert out[0, ~spoilt].isfinite().all()


@on(*TRITON)
def test_scale(backend):
    args = operands(8, 8, device=backend.device)
    for scale in (0.7, 0.0, -0.2):
        check(backend, args, scale=scale)


@on(*PLAIN, *KERNELS, types="dtype")
def test_seam_keeps_strangers_apart(backend, dtype):
    """Opposite corners of the image meet in one shifted window; each is seen by its own quarter of it alone."""
    narrow = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else {}
    for side, window, shift, value, quarter in (
        (8, 4, 2, (0, 0), (slice(None, 2), slice(None, 2))),
        (16, 8, 3, (15, 0), (slice(11, None), slice(None, 3))),
    ):
        args = operands(side, side, window, dtype, backend.device, heads=1, head_dim=24 if side == 16 else 1)
        q, k, v, bias = (torch.zeros_like(x) for x in args)
        v[:, value[0], value[1]] = 1.0
        out = window_attention(q, k, v, bias, window=window, shift=shift)[0, :, :, 0, 0]
        seen = torch.zeros(side, side, dtype=dtype, device=backend.device)
        seen[quarter] = 1 / seen[quarter].numel()
        torch.testing.assert_close(out, seen, **narrow)


@on(*TRITON)
def test_unserved_arguments_are_named(backend):
    q, k, v, bias = operands(9, 9, 9, device=backend.device, head_dim=33)
    small = [x[..., :24] for x in (q, k, v)]
    cases = [
        ([x.double() for x in (*small, bias)], {}, "q must be float32, float16 or bfloat16, not torch.float64"),
        ((*small, bias.double()), {}, "bias must be float32, float16 or bfloat16, not torch.float64"),
        ((q, k, v, bias), {}, "head_dim must be at most 32, not 33"),
        ((*small, bias), {}, "window must be at most 8, not 9"),
        ((small[0].clone().requires_grad_(), *small[1:], bias), {}, "requires grad"),
        ((*small, bias), {"dropout_p": 0.5}, "dropout is for training"),
    ]
    for args, options, message in cases:
        with clvp_fast.backend("triton"), pytest.raises(RuntimeError, match=message):
            window_attention(*args, window=9, **options)


@pytest.mark.parametrize("shift", [0, 2])
def test_gradients(shift):
    args = [x.requires_grad_() for x in operands(4, 8, 4, torch.float64, head_dim=3)]

    def run(*t):
        return window_attention(*t, window=4, shift=shift)

    assert torch.autograd.gradcheck(run, args, fast_mode=True)
    ours = torch.autograd.grad(run(*args).square().sum(), args)
    with clvp_fast.backend("reference"):
        theirs = torch.autograd.grad(run(*args).square().sum(), args)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_within_budget(mine, expected)


def test_dropout_drops_weights():
    q, k, v, bias = operands(8, 8, 4, images=2, heads=3)
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


def test_compiles_whole():
    args = operands(8, 8, 4, images=2, heads=3)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, window=4, shift=2), window_attention(*args, window=4, shift=2))


def test_autocast():
    args = operands(8, 8, 4, images=2, heads=3)
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
    q, k, v, bias = operands(8, 8, 4, images=2, heads=3)
    call = dict(q=q, k=k, v=v, bias=bias, window=4) | changes
    for function in (window_attention, window_attention_weights):
        with pytest.raises(error, match=message):
            function(**call)
