"""Calls of `rotary_attention`: layouts, memory and bits of its kernels, gradients, compiled graphs, errors.

Its numbers are in test_rotary_attention.py.
"""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import rotary_attention as kernels
from clvp_fast.ops import rotary_attention, rotary_attention_weights
from tests.kit import Guarded, assert_within_budget, queries_keys_values, random, strided
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck
from tests.ops.test_rotary_attention import (
    THREE,
    B,
    D,
    H,
    attend,
    check,
    frequencies,
    inputs,
    make_mask,
    ragged,
    ragged_inputs,
)

OPS = torch.ops.clvp_fast


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@on("default", types="dtype", among=THREE)
def test_head_sizes_and_strided_inputs(backend, dtype, head_dim):
    q, k, v = (strided(x) for x in queries_keys_values(2, 9, 9, 3, head_dim, seed=head_dim, dtype=dtype))
    mask = strided(make_mask("left", B, 9, 9, fewest=1)[:2])
    check(backend, (q, k, v), mask=mask, causal=True, **frequencies(9, batch=2))
    packed = random(2, 9, 3, 3, head_dim, seed=1, dtype=dtype)
    check(backend, packed.unbind(2), **frequencies(9, rotary_dim=head_dim))


@on("cpu", *TRITON, types="dtype", served="rotary_attention")
def test_strided_inputs_and_poison(backend, dtype):
    qkv, angles = inputs(20, 140, dtype=dtype, angle_batch=2, device=backend.device)
    mask = make_mask("left", 2, 20, 140, backend.device)
    apart = {name: strided(x) for name, x in angles.items()}
    for offset in (None, 0):  # from the first place on, some queries have no keys
        options = {"causal": True, "query_offset": offset}
        out = check(backend, [strided(x) for x in qkv], mask=strided(mask), **options, **apart)
        assert torch.equal(out, rotary_attention(*qkv, mask=mask, **options, **angles))
    packed = random(2, 100, 3, 2, 64, seed=3, dtype=dtype, device=backend.device)
    check(backend, packed.unbind(2), **inputs(1, 100, device=backend.device)[1])
    across = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in qkv]
    assert across[0].stride(3) != 1
    check(backend, across, **angles)


@on("cpu", *TRITON, served="rotary_attention")
def test_each_input_has_strides_of_its_own(backend):
    def by_head(x):
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)

    def apart(x):
        return strided(x.movedim(-1, 0)).movedim(0, -1)

    (q, k, v), angles = inputs(20, 70, 32, 16, angle_batch=2, device=backend.device)
    options = {"causal": True, "cos": angles["cos"], "sin": apart(angles["sin"])}
    expected = rotary_attention(q, k, v, causal=True, **angles)
    for views in ((apart(q), k, by_head(v)), (by_head(q), apart(k), v), (q, by_head(k), apart(v))):
        assert len({x.stride()[1:] for x in views}) == 3
        assert torch.equal(rotary_attention(*views, **options), expected)
    q, k, v = (x[0, :20] for x in (q, k, v))
    bounds = torch.tensor([0, 3, 20], dtype=torch.int32, device=backend.device)
    ragged = {"cu_seqlens": bounds, "max_seqlen": 17}
    expected = rotary_attention(q, k, v, **ragged)
    for views in ((apart(q), k, by_head(v)), (by_head(q), apart(k), v), (q, by_head(k), apart(v))):
        assert torch.equal(rotary_attention(*views, **ragged), expected)


@on("default", types="dtype", among=THREE)
def test_one_query_over_keys_stored_by_head(backend, dtype):
    """Use a key-value cache's layout, with room behind the keys that must not be read."""
    q, k, v = queries_keys_values(5, 1, 50, H, D, seed=2, dtype=dtype)
    room = [torch.full((5, H, 64, D), float("nan"), dtype=dtype) for _ in range(2)]
    for buffer, x in zip(room, (k, v), strict=True):
        buffer[:, :, :50] = x.transpose(1, 2)
    k, v = (buffer[:, :, :50].transpose(1, 2) for buffer in room)
    check(backend, (q, k, v), causal=True)
    check(backend, (q, k, v), mask=torch.arange(50) >= torch.tensor([[0], [3], [49], [17], [25]]), causal=True)


@on("cpu", *TRITON, types="dtype", served="rotary_attention")
def test_one_query_over_a_cache(backend, dtype):
    """Store keys head by head, with room behind them that must not be read."""
    (q, k, v), _ = inputs(1, 70, R=0, B=3, dtype=dtype, device=backend.device)
    room = [torch.full((3, 2, 90, 64), float("nan"), dtype=dtype, device=backend.device) for _ in range(2)]
    for buffer, x in zip(room, (k, v), strict=True):
        buffer[:, :, :70] = x.transpose(1, 2)
    k, v = (buffer[:, :, :70].transpose(1, 2) for buffer in room)
    check(backend, (q, k, v), causal=True)
    for offset in (None, 0):  # at the first place, some queries have no keys
        mask = make_mask("left", 3, 1, 70, backend.device)
        check(backend, (q, k, v), causal=True, query_offset=offset, mask=mask)


@on("cpu", *TRITON, served="rotary_attention")
def test_angles_that_another_place_owns_are_not_read(backend):
    """Take queries from the second row on, and poison the angles of one place too many."""
    qkv, angles = inputs(4, 20, device=backend.device)
    poisoned = {name: torch.cat((x, torch.full_like(x, float("nan"))), 1)[:, :20] for name, x in angles.items()}
    assert torch.equal(rotary_attention(*qkv, causal=True, **poisoned), rotary_attention(*qkv, causal=True, **angles))


@on(*TRITON, types="dtype")
def test_writes_all_of_its_output_and_nothing_else(backend, dtype):
    (q, k, v), angles = inputs(140, 140, 40, 32, H=1, dtype=dtype, device=backend.device)
    out = Guarded(2, 140, 1, 40, dtype=dtype, device=backend.device)
    kernels.rotary_attention(q, k, v, angles["cos"], angles["sin"], None, True, 0, 40**-0.5, out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, check(backend, (q, k, v), causal=True, **angles))
    tokens = [x.flatten(0, 1) for x in (q, k, v)]
    bounds = torch.tensor([0, 0, 130, 280, 280], dtype=torch.int32, device=backend.device)
    angles = inputs(1, 150, device=backend.device)[1]
    ragged = Guarded(280, 1, 40, dtype=dtype, device=backend.device)
    kernels.rotary_attention_ragged(
        *tokens, bounds, 150, angles["cos"], angles["sin"], False, 40**-0.5, out=ragged.tensor
    )
    ragged.check()


@pytest.mark.parametrize("q_len", [1, 20])
@on("cpu", *TRITON, types="dtype", served="rotary_attention")
def test_bits_do_not_depend_on_the_batch(backend, dtype, q_len):
    """Take queries at the last places, and at the first, where some have no keys."""
    rows = 17 if q_len == 1 or backend.device == "cuda" else 5
    qkv, angles = inputs(q_len, 100, 32, 16, B=rows, H=1, dtype=dtype, device=backend.device)
    mask = make_mask("left", rows, q_len, 100, backend.device)
    for offset in (None, 0):
        options = {"causal": True, "query_offset": offset, **angles}
        out = check(backend, qkv, mask=mask, **options)
        assert torch.equal(out, rotary_attention(*qkv, mask=mask, **options))
        for row in (0, rows - 1):
            alone = [x[row : row + 1] for x in qkv]
            assert torch.equal(out[row : row + 1], rotary_attention(*alone, mask=mask[row : row + 1], **options))


@on("cpu", *TRITON, served="rotary_attention")
def test_bits_of_a_sequence_do_not_depend_on_its_neighbours(backend):
    lengths = (5, 70, 0, 1, 150)
    qkv, bounds, angles = ragged_inputs(lengths, device=backend.device)
    out = rotary_attention(*qkv, cu_seqlens=bounds, max_seqlen=150, causal=True, **angles)
    for length, start in zip(lengths, bounds.tolist(), strict=False):
        alone = [x[start : start + length] for x in qkv]
        own = {name: x[:, :length] for name, x in angles.items()}
        ends = torch.tensor([0, length], dtype=torch.int32, device=backend.device)
        part = rotary_attention(*alone, cu_seqlens=ends, max_seqlen=length, causal=True, **own)
        assert torch.equal(out[start : start + length], part)


@on("cpu", served="rotary_attention")
def test_bits_depend_on_neither_threads_nor_items(backend, monkeypatch):
    """Give each thread all queries of a head, or 128."""
    qkv, angles = inputs(300, 300, 40, 32)
    found = []
    for threads in (1, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(rotary_attention(*qkv, causal=True, **angles))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@on("cpu", served="rotary_attention")
def test_a_sequence_without_angles_is_left_out_on_a_cpu(backend):
    """Read no angle behind the table's last."""
    qkv, bounds, angles = ragged_inputs((3, 40, 4))
    angles = {name: x[:, :20] for name, x in angles.items()}
    out = rotary_attention(*qkv, cu_seqlens=bounds, max_seqlen=20, **angles)
    for row in (slice(0, 3), slice(43, 47)):
        alone = [x[None, row] for x in qkv]
        own = {name: x[:, : row.stop - row.start] for name, x in angles.items()}
        torch.testing.assert_close(out[row], attend("torch", *alone, **own)[0], rtol=1e-5, atol=1e-5)


@on("cpu", *TRITON, served="rotary_attention")
def test_empty_inputs(backend):
    qkv, _ = inputs(3, 5, R=0, device=backend.device)
    assert rotary_attention(qkv[0][:0], qkv[1][:0], qkv[2][:0]).shape == (0, 3, 2, 64)
    assert rotary_attention(qkv[0][:, :0], *qkv[1:]).shape == (2, 0, 2, 64)
    without_keys = (qkv[0], qkv[1][:, :0], qkv[2][:, :0])
    assert torch.equal(rotary_attention(*without_keys), attend("reference", *without_keys))
    none = [x[0, :0] for x in qkv]
    bounds = torch.zeros(4, dtype=torch.int32, device=backend.device)
    assert rotary_attention(*none, cu_seqlens=bounds, max_seqlen=0).shape == (0, 2, 64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "left"])
def test_gradients(causal, mask):
    q, k, v = (x.requires_grad_() for x in queries_keys_values(B, 3, 5, H, 8, seed=3, dtype=torch.float64))
    options = {
        "mask": make_mask(mask, B, 3, 5, fewest=1),
        "causal": causal,
        **frequencies(5, dtype=torch.float64, rotary_dim=6),
    }
    assert torch.autograd.gradcheck(lambda *x: rotary_attention(*x, **options), (q, k, v))
    grad_out = random(B, 3, H, 8, seed=8, dtype=torch.float64)
    ours = torch.autograd.grad(rotary_attention(q, k, v, **options), (q, k, v), grad_out)
    with clvp_fast.backend("reference"):
        theirs = torch.autograd.grad(rotary_attention(q, k, v, **options), (q, k, v), grad_out)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_within_budget(mine, expected)


def test_gradients_under_an_additive_mask():
    """Include rows without keys: each of their weights is 1 / keys, in the backward too."""
    q, k, v = (x.requires_grad_() for x in queries_keys_values(2, 4, 4, H, 8, seed=3, dtype=torch.float64))
    added = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    added[1] = torch.finfo(torch.float64).min
    grad_out = random(2, 4, H, 8, seed=8, dtype=torch.float64)
    grad_v = torch.autograd.grad(rotary_attention(q, k, v, mask=added), v, grad_out)[0]
    assert_within_budget(grad_v[1], grad_out[1].mean(0).expand(4, H, 8).clone())


def test_gradients_of_ragged_sequences():
    qkv, bounds = ragged((2, 0, 3), torch.float64)
    turn = frequencies(3, dtype=torch.float64)
    qkv = [x[..., :34].detach().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(lambda *x: rotary_attention(*x, causal=True, **bounds, **turn), qkv)


def test_dropout_drops_weights_and_keeps_the_mean():
    q, k, v = queries_keys_values(2, 4, 8, H, D, seed=6)
    for backend in ("reference", "torch"):
        torch.manual_seed(0)
        with clvp_fast.backend(backend):
            drawn = torch.stack([rotary_attention(q, k, v, dropout_p=0.3) for _ in range(400)])
        exact = rotary_attention(q, k, v)
        assert not torch.equal(drawn[0], drawn[1])
        deviation = (drawn.mean(0) - exact).abs() / (drawn.std(0) / 20)
        assert deviation.mean() < 1.1 and deviation.max() < 6
    out, weights = rotary_attention_weights(q, k, v, dropout_p=0.3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, H, 4))
    assert not torch.allclose(out, exact)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def run(q, k, v, cos, sin, mask):
        first = rotary_attention(q, k, v, cos=cos, sin=sin, mask=mask, causal=True)
        second = rotary_attention(first, k, v, causal=True)
        return rotary_attention(second[:, -1:], k, v, mask=mask, causal=True), second

    q, k, v = queries_keys_values(B, 9, 9, H, D, seed=3)
    arguments = (q, k, v, *frequencies(9).values(), make_mask("left", B, 9, 9, fewest=1))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for actual, expected in zip(compiled(*arguments), run(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_compiles_ragged_sequences_whole():
    qkv, bounds = ragged((4, 1, 6))
    turn = frequencies(6)

    def run(q, k, v):
        return rotary_attention(q, k, v, causal=True, **bounds, **turn) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv), run(*qkv), rtol=1e-5, atol=1e-5)
    args = (*qkv, bounds["cu_seqlens"], 6, turn["cos"], turn["sin"], True, 0.2)
    torch.library.opcheck(torch.ops.clvp_fast.rotary_attention_ragged.default, args)


def test_registered_operator():
    q, k, v = queries_keys_values(B, 9, 11, H, D, seed=3)
    options = frequencies(11)
    op = torch.ops.clvp_fast.rotary_attention.default
    for mask in (None, make_mask("left", B, 9, 11, fewest=1)):
        torch.library.opcheck(op, (q, k, v, options["cos"], options["sin"], mask, True, 2, D**-0.5))
    expected = rotary_attention(q, k, v, causal=True, **options)
    actual = op(q, k, v, options["cos"], options["sin"], None, True, 2, D**-0.5)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@on(*TRITON)
def test_registered_operators(backend):
    (q, k, v), angles = inputs(3, 5, B=1, H=1, device=backend.device)
    for mask in (None, make_mask("left", 1, 3, 5, backend.device)):
        args = (q, k, v, angles["cos"], angles["sin"], mask, True, 2, 0.125)
        opcheck(backend, OPS.rotary_attention.default, args)
    qkv, bounds, angles = ragged_inputs((3, 0, 4), device=backend.device)
    args = (*qkv, bounds, 4, angles["cos"], angles["sin"], True, 0.125)
    opcheck(backend, OPS.rotary_attention_ragged.default, args)


@on(*TRITON)
def test_unserved_arguments_are_named(backend):
    (q, k, v), _ = inputs(3, 5, R=0, device=backend.device)
    big = [x.repeat(1, 1, 1, 3)[..., :136] for x in (q, k, v)]
    cases = [
        ([x.double() for x in (q, k, v)], {}, "q must be float32, float16 or bfloat16, not torch.float64"),
        (big, {}, "head_dim must be at most 128, not 136"),
        ((q, k, v), {"scale": 0.0}, "scale must be positive, not 0.0"),
        ((q.clone().requires_grad_(), k, v), {}, "requires grad"),
        ((q, k, v), {"dropout_p": 0.5}, "dropout is for training"),
    ]
    for qkv, options, message in cases:
        with clvp_fast.backend("triton"), pytest.raises(RuntimeError, match=message):
            rotary_attention(*qkv, **options)


@on("cpu", served="rotary_attention")
def test_masks_that_a_cpu_does_not_serve_are_named(backend):
    qkv, _ = inputs(9, 9, R=0)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"on a CPU it serves masks \[batch, key_len\], not \[1, 1, 9, 9\]"):
        rotary_attention(*qkv, mask=mask)


def test_bad_arguments_are_named():
    q, k, v = queries_keys_values(2, 3, 5, H, D, seed=0)
    cos, sin = frequencies(5).values()
    cases = [
        ((q[0], k, v), {}, ValueError, "q must have shape"),
        ((q, k[:, :, :1], v), {}, ValueError, r"k must have shape \[2, key_len, 2, 40\], not \[2, 5, 1, 40\]"),
        ((q, k, v[:, :3]), {}, ValueError, "v must have shape"),
        ((q, k.double(), v), {}, TypeError, "k must have the dtype of q"),
        ((q, k.to("meta"), v), {}, ValueError, "k is on meta and q on cpu"),
        ((q, k, v), {"cos": cos}, ValueError, "together"),
        ((q, k, v), {"cos": cos[:, :3], "sin": sin[:, :3]}, ValueError, "cos must have shape"),
        ((q, k, v), {"cos": cos, "sin": sin[..., :8]}, ValueError, "sin must have shape"),
        ((q, k, v), {"cos": cos[:, :, None], "sin": sin}, ValueError, r"or \[1 or 2, 5, 1, half of it\]"),
        ((q, k, v), {"mask": torch.ones(2, 5, dtype=torch.long)}, TypeError, "mask must be bool"),
        ((q, k, v), {"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"mask must have shape \[2, 5\]"),
        ((q, k, v), {"causal": True, "query_offset": 3}, ValueError, "rows 3 to 6 must lie within the 5 keys"),
        ((k, q, q), {"causal": True}, ValueError, "query_offset"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            rotary_attention(*arguments, **options)


def test_bad_ragged_arguments_are_named():
    (q, k, v), bounds = ragged((3, 5))
    ends = bounds["cu_seqlens"]
    cases = [
        ((q[None], k, v), {}, ValueError, r"q must have shape \[tokens, num_heads, head_dim\] \(with cu_seqlens\)"),
        ((q, k[1:], v), {}, ValueError, r"k must have shape that of q, \[8, 2, 40\], not \[7, 2, 40\]"),
        ((q, k, v.double()), {}, TypeError, "v must have the dtype of q"),
        ((q, k, v), {"cu_seqlens": ends.long()}, TypeError, "cu_seqlens must be int32, not torch.int64"),
        ((q, k, v), {"cu_seqlens": ends[None]}, ValueError, r"cu_seqlens must have shape \[sequences \+ 1\]"),
        ((q, k, v), {"cu_seqlens": ends.to("meta")}, ValueError, "cu_seqlens is on meta and q on cpu"),
        ((q, k, v), {"max_seqlen": None}, ValueError, "max_seqlen must be the length of the longest"),
        ((q, k, v), frequencies(4), ValueError, r"cos must have shape \[1, 5, an even number of at most 40\]"),
        ((q, k, v), frequencies(5, batch=2), ValueError, r"cos must have shape \[1, 5"),
        ((q, k, v), {"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "together with cu_seqlens"),
        ((q, k, v), {"dropout_p": 0.1}, ValueError, "together with cu_seqlens"),
        ((q, k, v), {"query_offset": 1}, ValueError, "together with cu_seqlens"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            rotary_attention(*arguments, **{**bounds, **options})
