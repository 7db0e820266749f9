"""`window_attention` as a kernel: budgets against float64, windows of every size, the seam, memory, bits."""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import window_attention as kernels
from clvp_fast.ops import window_attention
from clvp_fast.ops.window_attention import SEAM
from tests.kit import Guarded, assert_within_budget, random, strided
from tests.kit.device import DEVICE, DTYPES, times


def inputs(height, width, window=8, heads=2, head_dim=24, images=1, seed=0, dtype=torch.float32):
    shape = images, height, width, heads, head_dim
    q = random(*shape, seed=seed, dtype=dtype, scale=2.0, device=DEVICE)
    k, v = (random(*shape, seed=seed + n, dtype=dtype, device=DEVICE) for n in (1, 2))
    return q, k, v, random(heads, window**2, window**2, seed=seed + 3, dtype=dtype, device=DEVICE)


def attend(backend, *args, **options):
    with clvp_fast.backend(backend):
        return window_attention(*args, **options)


def check(args, window=8, shift=0, baseline="torch", **options):
    options |= dict(window=window, shift=shift)
    actual = window_attention(*args, **options)
    assert actual.is_contiguous() and actual.dtype == args[2].dtype
    reference = attend("reference", *(x.double() for x in args), **options)
    plain = attend(baseline, *args, **options).clone()
    assert_within_budget(actual, reference, plain, times=times(actual.dtype))
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize("heads, head_dim", [(4, 24), (3, 32), (32, 24), (2, 20), (2, 16), (1, 8), (1, 1)])
def test_heads_and_their_width(heads, head_dim, shift, dtype):
    check(inputs(8, 16, heads=heads, head_dim=head_dim, dtype=dtype), shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window, shift", [(7, 3), (5, 2), (4, 0), (3, 1), (2, 1), (1, 0)])
def test_windows_of_every_size(window, shift, dtype):
    check(inputs(2 * window, 3 * window, window, images=2, dtype=dtype), window, shift)


@pytest.mark.parametrize("shift", range(1, 8))
def test_every_shift(shift):
    check(inputs(16, 24, heads=1), shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images, height, width", [(5, 8, 8), (3, 24, 8), (1, 8, 56), (2, 40, 24)])
def test_any_number_of_windows(images, height, width, dtype):
    for shift in (0, 3):
        check(inputs(height, width, heads=1, images=images, dtype=dtype), shift=shift)


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])])
def test_programs_of_several_windows(dtype, monkeypatch):
    args = inputs(40, 56, heads=2, images=1, dtype=dtype)
    alone = check(args, shift=4)
    for multiprocessors in (1, 2):  # 8 windows a program, and 4: the last one has fewer
        monkeypatch.setattr(kernels, "multiprocessors", lambda: multiprocessors)  # noqa: B023
        assert torch.equal(window_attention(*args, window=8, shift=4), alone)
    monkeypatch.setattr(kernels, "_PROGRAMS", 0.25)  # all that one may have
    assert torch.equal(window_attention(*args, window=8, shift=4), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_poison(dtype):
    q, k, v, bias = args = inputs(16, 8, images=2, dtype=dtype)
    expected = check(args, shift=4)
    assert torch.equal(check([strided(x) for x in args], shift=4), expected)

    def by_head(x):
        return x.movedim(3, 1).contiguous().movedim(1, 3)

    def across(x):
        return x.transpose(1, 4).contiguous().transpose(1, 4)

    for views in ((by_head(q), k, across(v)), (across(q), by_head(k), v), (q, across(k), by_head(v))):
        assert len({x.stride()[1:] for x in views}) == 3
        assert torch.equal(window_attention(*views, bias, window=8, shift=4), expected)
    from_table = bias.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(window_attention(q, k, v, from_table, window=8, shift=4), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [24, 20, 9])
def test_views_of_a_packed_projection(head_dim, dtype):
    packed = random(2, 16, 8, 3, 4, head_dim, seed=5, dtype=dtype, scale=1.5, device=DEVICE)
    check((*packed.unbind(3), inputs(8, 8, heads=4, dtype=dtype)[3]), shift=4)


def test_one_image_for_all():
    """Strides of 0, of images that share their queries."""
    q, k, v, bias = inputs(8, 8, images=3)
    check((q[:1].expand(3, -1, -1, -1, -1), k, v, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_another_type(dtype):
    q, k, v, bias = inputs(8, 8, dtype=dtype)
    for other in DTYPES:
        check((q, k, v, bias.to(other)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_that_forbids(dtype):
    """By the least number of its type, and by infinity; a place that sees nothing weighs all alike."""
    q, k, v, bias = inputs(8, 8, heads=2, dtype=dtype)
    bias[0, :, ::3], bias[1, :, ::2] = torch.finfo(dtype).min, float("-inf")
    check((q, k, v, bias))
    blind = torch.full_like(bias, torch.finfo(torch.float32).min, dtype=torch.float32)
    out = window_attention(q, k, v, blind, window=8).double()
    mean = v.double().mean((1, 2), keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scores(dtype):
    """Beside the reference in the same type: torch rounds such scores to halves on a CPU."""
    q, k, v, bias = inputs(16, 8, dtype=dtype)
    check((q * 80, k * 50, v, bias), shift=4, baseline="reference")
    q[:], k[:] = 40, 30  # one score for all keys
    check((q, k, v, bias), shift=4, baseline="reference")
    check((q, -k, v, bias), scale=2.5, baseline="reference")


def test_scale():
    args = inputs(8, 8)
    for scale in (0.7, 0.0, -0.2):
        check(args, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_seam_keeps_strangers_apart(dtype):
    """The value of one corner is seen by its own quarter of the shifted window alone."""
    q, k, v, bias = (torch.zeros_like(x) for x in inputs(16, 16, heads=1, dtype=dtype))
    v[:, 15, 0] = 1.0
    out = window_attention(q, k, v, bias, window=8, shift=3)[0, :, :, 0, 0]
    seen = torch.zeros(16, 16, dtype=dtype, device=DEVICE)
    seen[11:, :3] = 1 / 15
    torch.testing.assert_close(out, seen)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # what the interpreter makes of a maximum
@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_stays_in_its_window_and_head(which, shift, monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 1)
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)  # windows of one program
    args = inputs(16, 24, images=2)
    expected = window_attention(*args, window=8, shift=shift)
    args[which][1, 9, 13, 1, 3] = float("nan")
    out = window_attention(*args, window=8, shift=shift)
    reached = torch.zeros_like(out, dtype=torch.bool)
    rows, columns = (slice(8, 16), slice(8, 16)) if shift == 0 else (slice(4, 12), slice(12, 20))
    reached[1, rows, columns, 1] = True
    assert torch.equal(out[~reached], expected[~reached])
    if which == 0:  # one place asks
        assert out[1, 9, 13, 1].isnan().all() and out.isnan().sum() == 24
    elif which == 1:  # all that ask
        assert out[1, rows, columns, 1].isnan().all()
    else:  # one channel
        assert out[1, rows, columns, 1, 3].isnan().all() and out.isnan().sum() == 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window, head_dim", [(8, 24), (8, 32), (7, 20)])
def test_writes_all_of_its_output_and_nothing_else(window, head_dim, dtype, monkeypatch):
    """By two programs a head, of four windows and of two."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 1)
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    q, k, v, bias = inputs(2 * window, window, window, head_dim=head_dim, images=3, dtype=dtype)
    out = Guarded(*q.shape, dtype=dtype, device=DEVICE)
    kernels.window_attention(q, k, v, bias, window, 2, head_dim**-0.5, SEAM, out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, window_attention(q, k, v, bias, window=window, shift=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 4])
def test_bits_do_not_depend_on_the_batch(shift, dtype):
    q, k, v, bias = inputs(16, 8, heads=1, images=17, dtype=dtype)
    out = window_attention(q, k, v, bias, window=8, shift=shift)
    assert torch.equal(out, window_attention(q, k, v, bias, window=8, shift=shift))
    for image in (0, 16):
        alone = (x[image : image + 1] for x in (q, k, v))
        assert torch.equal(out[image : image + 1], window_attention(*alone, bias, window=8, shift=shift))


def test_nothing_to_do():
    q, k, v, bias = inputs(8, 8)
    assert window_attention(q[:0], k[:0], v[:0], bias, window=8).shape == (0, 8, 8, 2, 24)
    assert window_attention(q[:, :0], k[:, :0], v[:, :0], bias, window=8).shape == (1, 0, 8, 2, 24)


def test_registered_operator():
    for shift in (0, 4):
        args = (*inputs(8, 16), 8, shift, 0.2)
        torch.library.opcheck(torch.ops.clvp_fast.window_attention.default, args)


def test_what_the_kernel_does_not_serve():
    q, k, v, bias = inputs(9, 9, 9, head_dim=33)
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
