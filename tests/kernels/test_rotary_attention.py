"""`rotary_attention` as a kernel, ragged sequences included: budgets against float64, masks, memory, bits."""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import rotary_attention as kernels
from clvp_fast.ops import rotary_attention
from tests.kit import Guarded, assert_within_budget, generator, queries_keys_values, random, strided
from tests.kit.device import DEVICE, DTYPES, times

OPS = torch.ops.clvp_fast


def inputs(q_len, k_len, D=64, R=32, B=2, H=2, seed=0, dtype=torch.float32, angle_batch=1):
    """q, k, v, and angles whose two halves differ: nothing says that they agree."""
    qkv = queries_keys_values(B, q_len, k_len, H, D, seed=seed, dtype=dtype, device=DEVICE)
    angles = random(angle_batch, k_len, R, seed=seed + 7, scale=3.0, device=DEVICE) if R else None
    return qkv, {} if angles is None else {"cos": angles.cos(), "sin": angles.sin()}


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def attend(backend, *qkv, **options):
    with clvp_fast.backend(backend):
        return rotary_attention(*qkv, **options)


def check(qkv, **options):
    actual = rotary_attention(*qkv, **options)
    assert actual.is_contiguous() and actual.dtype == qkv[2].dtype
    reference = attend("reference", *map(wide, qkv), **{name: wide(x) for name, x in options.items()})
    baseline = attend("torch", *qkv, **options).clone()
    assert_within_budget(actual, reference, baseline, times=times(actual.dtype))
    return actual


def make_mask(kind, batch, q_len, k_len):
    """Padding left or right, rows that may attend to nothing; or a mask of its own for each query."""
    places = torch.arange(k_len, device=DEVICE)
    ends = torch.linspace(0, k_len, batch + 1)[1:].int().tolist()
    if kind == "left":
        return torch.stack([places >= k_len - n for n in ends])
    if kind == "right":
        return torch.stack([places < n for n in reversed(ends)])
    if kind == "nothing":
        return torch.zeros(batch, k_len, dtype=torch.bool, device=DEVICE)
    if kind == "square":
        return (torch.rand(1, 1, q_len, k_len, generator=generator(5)) > 0.6).to(DEVICE)
    if kind == "rows":
        return (torch.rand(batch, 1, 1, k_len, generator=generator(6)) > 0.6).to(DEVICE)
    if kind == "additive":
        return random(batch, 1, q_len, k_len, seed=5, scale=2.0, device=DEVICE)
    return None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D, R",
    [(64, 32), (64, 0), (64, 64), (32, 32), (32, 0), (80, 32), (80, 0), (96, 32), (96, 96), (128, 32), (128, 0)]
    + [(128, 128), (64, 2), (64, 20), (40, 32), (8, 4), (24, 24), (1, 0), (120, 66)],
)
def test_geometries(D, R, dtype):
    qkv, angles = inputs(18, 18, D, R, B=1, dtype=dtype)
    check(qkv, causal=True, **angles)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D, R", [(64, 32), (40, 20), (32, 32)])
def test_angles_that_both_halves_share(D, R, dtype):
    qkv, angles = inputs(20, 70, D, R // 2, dtype=dtype, angle_batch=2)
    twice = {name: torch.cat((x, x), -1) for name, x in angles.items()}
    once = {name: strided(x[:, :, None]) for name, x in angles.items()}
    out = check(qkv, causal=True, **once)
    assert torch.equal(out, rotary_attention(*qkv, causal=True, **twice))


# Masks are read alike in every type: in the others all of them are for the long run.
@pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(one, marks=[pytest.mark.slow] * (DEVICE == "cpu")) for one in DTYPES[1:])]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "left", "right", "nothing", "square", "rows", "additive"])
def test_masks_and_lengths(mask, causal, dtype):
    for q_len, k_len in ((1, 1), (1, 65), (17, 150), (65, 65)):
        qkv, angles = inputs(q_len, k_len, 32, 16, B=2, H=1, seed=q_len + k_len, dtype=dtype, angle_batch=2)
        check(qkv, mask=make_mask(mask, 2, q_len, k_len), causal=causal, **angles)


@pytest.mark.parametrize("q_len, k_len", [(128, 128), (129, 127), (63, 200), (260, 260)])
def test_tiles_and_their_ends(q_len, k_len):
    for causal in (False, True)[: 1 + (q_len <= k_len)]:
        qkv, _ = inputs(q_len, k_len, R=0, B=1, H=1)
        check(qkv, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_query_offset(causal):
    qkv, angles = inputs(90, 90, B=1)
    whole = rotary_attention(*qkv, causal=causal, **angles)
    for offset, q_len in ((0, 1), (89, 1), (3, 40)):
        part = (qkv[0][:, offset : offset + q_len], *qkv[1:])
        out = check(part, causal=causal, query_offset=offset, **angles)
        torch.testing.assert_close(out, whole[:, offset : offset + q_len], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("additive", [False, True])
def test_query_without_keys_gets_the_mean_of_all_values(additive, dtype):
    """All of them: those after it too, where causality ends the loop over keys early."""
    (q, k, v), _ = inputs(200, 200, 32, R=0, H=1, dtype=dtype)
    mask = make_mask("left", 2, 200, 200)
    assert not mask[0, :100].any()
    if additive:
        mask = torch.zeros(2, 1, 1, 200, device=DEVICE).masked_fill_(
            ~mask[:, None, None], torch.finfo(torch.float32).min
        )
    out = rotary_attention(q * 20, k, v, mask=mask, causal=True)
    expected = v[0].double().mean(0).expand(100, 1, 32)
    torch.testing.assert_close(out[0, :100].double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_poison(dtype):
    qkv, angles = inputs(20, 20, dtype=dtype, angle_batch=2)
    expected = rotary_attention(*qkv, causal=True, mask=make_mask("left", 2, 20, 20), **angles)
    apart = {name: strided(x) for name, x in angles.items()}
    out = check([strided(x) for x in qkv], causal=True, mask=strided(make_mask("left", 2, 20, 20)), **apart)
    assert torch.equal(out, expected)
    packed = random(2, 33, 3, 2, 64, seed=3, dtype=dtype, device=DEVICE)
    check(packed.unbind(2), **inputs(1, 33)[1])
    across = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in qkv]
    assert across[0].stride(3) != 1
    check(across, **angles)


def test_each_input_has_strides_of_its_own():
    def by_head(x):
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)

    def apart(x):
        return strided(x.movedim(-1, 0)).movedim(0, -1)

    (q, k, v), angles = inputs(20, 70, 32, 16, angle_batch=2)
    options = {"causal": True, "cos": angles["cos"], "sin": apart(angles["sin"])}
    expected = rotary_attention(q, k, v, causal=True, **angles)
    for views in ((apart(q), k, by_head(v)), (by_head(q), apart(k), v), (q, by_head(k), apart(v))):
        assert len({x.stride()[1:] for x in views}) == 3
        assert torch.equal(rotary_attention(*views, **options), expected)
    q, k, v = (x[0, :20] for x in (q, k, v))
    bounds = torch.tensor([0, 3, 20], dtype=torch.int32, device=DEVICE)
    ragged = {"cu_seqlens": bounds, "max_seqlen": 17}
    expected = rotary_attention(q, k, v, **ragged)
    for views in ((apart(q), k, by_head(v)), (by_head(q), apart(k), v), (q, by_head(k), apart(v))):
        assert torch.equal(rotary_attention(*views, **ragged), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query_over_a_cache(dtype):
    """Keys stored head by head, with room behind them that nobody may read."""
    (q, k, v), _ = inputs(1, 70, R=0, B=3, dtype=dtype)
    room = [torch.full((3, 2, 90, 64), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    for buffer, x in zip(room, (k, v), strict=True):
        buffer[:, :, :70] = x.transpose(1, 2)
    k, v = (buffer[:, :, :70].transpose(1, 2) for buffer in room)
    check((q, k, v), causal=True)
    check((q, k, v), causal=True, mask=make_mask("left", 3, 1, 70))


def test_angles_that_another_place_owns_are_not_read():
    """Queries from the second row on, angles of one place too many poisoned."""
    qkv, angles = inputs(4, 20)
    poisoned = {name: torch.cat((x, torch.full_like(x, float("nan"))), 1)[:, :20] for name, x in angles.items()}
    assert torch.equal(rotary_attention(*qkv, causal=True, **poisoned), rotary_attention(*qkv, causal=True, **angles))


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_all_of_its_output_and_nothing_else(dtype):
    (q, k, v), angles = inputs(140, 140, 40, 32, H=1, dtype=dtype)
    out = Guarded(2, 140, 1, 40, dtype=dtype, device=DEVICE)
    kernels.rotary_attention(q, k, v, angles["cos"], angles["sin"], None, True, 0, 40**-0.5, out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, rotary_attention(q, k, v, causal=True, **angles))
    tokens = [x.flatten(0, 1) for x in (q, k, v)]
    bounds = torch.tensor([0, 0, 130, 280, 280], dtype=torch.int32, device=DEVICE)
    angles = inputs(1, 150)[1]
    ragged = Guarded(280, 1, 40, dtype=dtype, device=DEVICE)
    kernels.rotary_attention_ragged(
        *tokens, bounds, 150, angles["cos"], angles["sin"], False, 40**-0.5, out=ragged.tensor
    )
    ragged.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scores(dtype):
    (q, k, v), _ = inputs(20, 70, R=0, dtype=dtype)
    check((q * 80, k * 50, v))
    q[:], k[:] = 40, 30  # one score for all keys
    check((q, k, v))
    check((q, -k, v), mask=make_mask("right", 2, 20, 70))


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float32])
def test_rotation_is_rounded_once(dtype):
    """Seen through one key, whose value comes out as it was rotated."""
    qkv, angles = inputs(1, 1, 128, 128, B=12, H=1, dtype=dtype, angle_batch=12)
    out = rotary_attention(*qkv, **angles)
    exact = attend("reference", *map(wide, qkv), **{name: wide(x) for name, x in angles.items()})
    assert (out == exact.to(dtype)).double().mean() > 0.999
    check(qkv, **{name: x.to(dtype) for name, x in angles.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 20])
def test_bits_do_not_depend_on_the_batch(q_len, dtype):
    rows = 17 if q_len == 1 or DEVICE == "cuda" else 5
    qkv, angles = inputs(q_len, 40, 32, 16, B=rows, H=1, dtype=dtype)
    mask = make_mask("left", rows, q_len, 40)
    out = rotary_attention(*qkv, mask=mask, causal=True, **angles)
    assert torch.equal(out, rotary_attention(*qkv, mask=mask, causal=True, **angles))
    for row in (0, rows - 1):
        alone = [x[row : row + 1] for x in qkv]
        assert torch.equal(
            out[row : row + 1], rotary_attention(*alone, mask=mask[row : row + 1], causal=True, **angles)
        )


def ragged_inputs(lengths, D=64, R=32, dtype=torch.float32):
    tokens = sum(lengths)
    q, k, v = (x[0] for x in queries_keys_values(1, tokens, tokens, 1, D, seed=1, dtype=dtype, device=DEVICE))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    return (q, k, v), bounds, inputs(1, max(lengths), D, R)[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D, R", [(32, 16), (40, 0)])
def test_ragged_sequences(D, R, causal, dtype):
    qkv, bounds, angles = ragged_inputs((0, 1, 17, 130, 64), D, R, dtype)
    check(qkv, cu_seqlens=bounds, max_seqlen=130, causal=causal, **angles)
    packed = torch.stack(qkv, 1)
    out = rotary_attention(*packed.unbind(1), cu_seqlens=bounds, max_seqlen=130, causal=causal, **angles)
    assert torch.equal(out, rotary_attention(*qkv, cu_seqlens=bounds, max_seqlen=130, causal=causal, **angles))


def test_bits_of_a_sequence_do_not_depend_on_its_neighbours():
    lengths = (5, 70, 0, 1, 150)
    qkv, bounds, angles = ragged_inputs(lengths)
    out = rotary_attention(*qkv, cu_seqlens=bounds, max_seqlen=150, causal=True, **angles)
    for length, start in zip(lengths, bounds.tolist(), strict=False):
        alone = [x[start : start + length] for x in qkv]
        own = {name: x[:, :length] for name, x in angles.items()}
        ends = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
        part = rotary_attention(*alone, cu_seqlens=ends, max_seqlen=length, causal=True, **own)
        assert torch.equal(out[start : start + length], part)


def test_nothing_to_do():
    qkv, _ = inputs(3, 5, R=0)
    assert rotary_attention(qkv[0][:0], qkv[1][:0], qkv[2][:0]).shape == (0, 3, 2, 64)
    assert rotary_attention(qkv[0][:, :0], *qkv[1:]).shape == (2, 0, 2, 64)
    without_keys = (qkv[0], qkv[1][:, :0], qkv[2][:, :0])
    assert torch.equal(rotary_attention(*without_keys), attend("reference", *without_keys))
    none = [x[0, :0] for x in qkv]
    bounds = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    assert rotary_attention(*none, cu_seqlens=bounds, max_seqlen=0).shape == (0, 2, 64)


def test_registered_operators():
    (q, k, v), angles = inputs(3, 5, B=1, H=1)
    for mask in (None, make_mask("left", 1, 3, 5)):
        args = (q, k, v, angles["cos"], angles["sin"], mask, True, 2, 0.125)
        torch.library.opcheck(OPS.rotary_attention.default, args)
    qkv, bounds, angles = ragged_inputs((3, 0, 4))
    args = (*qkv, bounds, 4, angles["cos"], angles["sin"], True, 0.125)
    torch.library.opcheck(OPS.rotary_attention_ragged.default, args)


def test_what_the_kernel_does_not_serve():
    (q, k, v), _ = inputs(3, 5, R=0)
    big = [x.repeat(1, 1, 1, 3)[..., :136] for x in (q, k, v)]
    cases = [
        ([x.double() for x in (q, k, v)], {}, "q must be float32, float16 or bfloat16, not torch.float64"),
        (big, {}, "head_dim must be at most 128, not 136"),
        ((q, k, v), {"scale": 0.0}, "scale must be positive, not 0.0"),
        ((q.clone().requires_grad_(), k, v), {}, "requires grad"),
        ((q, k, v), {"dropout_p": 0.5}, "dropout is for training"),
    ]
    for qkv, options, message in cases:
        with pytest.raises(RuntimeError, match=message):
            rotary_attention(*qkv, **options)
