"""`window_attention`: layouts, memory, and which bits depend on what."""

import pytest
import torch

from clvp_fast.kernels import window_attention as kernels
from clvp_fast.ops import window_attention
from clvp_fast.ops.window_attention import SEAM
from tests.kit import Guarded, at_threads, random, strided
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck
from tests.ops.test_window_attention import KERNELS, PLAIN, check, operands


@on(*KERNELS, types="dtype")
def test_strided_inputs_and_poison(backend, dtype):
    q, k, v, bias = args = operands(16, 8, 8, dtype, backend.device, images=2)
    expected = check(backend, args, shift=4)
    assert torch.equal(check(backend, [strided(x) for x in args], shift=4), expected)

    def by_head(x):
        return x.movedim(3, 1).contiguous().movedim(1, 3)

    def across(x):
        return x.transpose(1, 4).contiguous().transpose(1, 4)

    for views in ((by_head(q), k, across(v)), (across(q), by_head(k), v), (q, across(k), by_head(v))):
        assert len({x.stride()[1:] for x in views}) == 3
        assert torch.equal(window_attention(*views, bias, window=8, shift=4), expected)
    from_table = bias.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    packed = torch.stack((across(q), across(k), across(v)), 3)
    for views in ((q, k, v), tuple(map(across, (q, k, v))), packed.unbind(3)):
        assert torch.equal(window_attention(*views, from_table, window=8, shift=4), expected)


@pytest.mark.parametrize("head_dim", [24, 20, 9, 8])
@on("default", "torch", *KERNELS, types="dtype", among=(torch.float32, torch.float16, torch.bfloat16))
def test_views_of_a_packed_projection(backend, dtype, head_dim):
    packed = random(2, 16, 8, 3, 4, head_dim, seed=5, dtype=dtype, scale=1.5, device=backend.device)
    bias = random(8 * 8, 8 * 8, 4, seed=6, dtype=dtype, device=backend.device).permute(2, 0, 1)
    for shift in (0, 4):
        check(backend, (*packed.unbind(3), bias), shift=shift)


@pytest.mark.parametrize("shift", [0, 4])
@on("default", "torch", types="dtype", among=(torch.float32, torch.bfloat16))
def test_views_of_several_kinds(backend, dtype, shift):
    q, k, v, bias = operands(16, 8, 8, dtype, images=2, heads=3)
    views = strided(q), k.transpose(1, 2).contiguous().transpose(1, 2), v, strided(bias)
    check(backend, views, shift=shift)


@on(*KERNELS)
def test_one_image_for_all(backend):
    """Use strides of 0, for images that share their queries."""
    q, k, v, bias = operands(8, 8, device=backend.device, images=3)
    shared = q[:1].expand(3, -1, -1, -1, -1)
    out = check(backend, (shared, k, v, bias))
    assert torch.equal(out, window_attention(shared.contiguous(), k, v, bias, window=8))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # what the interpreter makes of a maximum
@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize("which", [0, 1, 2])
@on(*TRITON)
def test_nan_stays_in_its_window_and_head(backend, which, shift, monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 1)
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)  # windows of one program
    args = operands(16, 24, device=backend.device, images=2)
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


@pytest.mark.parametrize("window, head_dim", [(8, 24), (8, 32), (7, 20)])
@on(*TRITON, types="dtype")
def test_writes_all_of_its_output_and_nothing_else(backend, dtype, window, head_dim, monkeypatch):
    """Launch two programs a head, of four windows and of two."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 1)
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    q, k, v, bias = operands(2 * window, window, window, dtype, backend.device, images=3, head_dim=head_dim)
    out = Guarded(*q.shape, dtype=dtype, device=backend.device)
    kernels.window_attention(q, k, v, bias, window, 2, head_dim**-0.5, SEAM, out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, check(backend, (q, k, v, bias), window, 2))


@pytest.mark.parametrize("shift", [0, 4])
@on(*KERNELS, types="dtype")
def test_bits_do_not_depend_on_the_batch(backend, dtype, shift):
    q, k, v, bias = operands(16, 8, 8, dtype, backend.device, images=17, heads=1)
    out = window_attention(q, k, v, bias, window=8, shift=shift)
    assert torch.equal(out, window_attention(q, k, v, bias, window=8, shift=shift))
    for image in (0, 16):
        alone = (x[image : image + 1] for x in (q, k, v))
        assert torch.equal(out[image : image + 1], window_attention(*alone, bias, window=8, shift=shift))


@on("cpu", types="dtype")
def test_an_image_has_the_bits_that_it_has_alone_on_any_threads(backend, dtype):
    q, k, v, bias = operands(16, 16, 8, dtype, images=3)
    together = window_attention(q, k, v, bias, window=8, shift=4)
    for _ in at_threads(1, 3):
        for image in range(3):
            alone = window_attention(*(x[image : image + 1] for x in (q, k, v)), bias, window=8, shift=4)
            assert torch.equal(alone[0], together[image])


@on(*PLAIN, *KERNELS, types="dtype", among=(torch.float32, torch.bfloat16))
def test_empty_inputs(backend, dtype):
    q, k, v, bias = operands(8, 8, 8, dtype, backend.device)
    for shift in (0, 2):
        assert window_attention(q[:0], k[:0], v[:0], bias, window=8, shift=shift).shape == (0, 8, 8, 2, 24)
        assert window_attention(q[:, :0], k[:, :0], v[:, :0], bias, window=8, shift=shift).shape == (1, 0, 8, 2, 24)


@on("default", *TRITON)
def test_registered_operator(backend):
    for args in ((*operands(8, 16, device=backend.device), 8, shift, 0.2) for shift in (0, 4)):
        opcheck(backend, torch.ops.clvp_fast.window_attention.default, args)
