"""`rotary_attention` on every backend: numbers against float64 and transformers' own attention; masks, geometries,
ragged sequences."""

import pytest
import torch
from transformers.models.clvp.configuration_clvp import ClvpEncoderConfig
from transformers.models.clvp.modeling_clvp import ClvpRotaryPositionalEmbedding, ClvpSelfAttention

import clvp_fast
from clvp_fast.ops import rotary_attention, rotary_attention_weights
from tests.kit import assert_within_budget, generator, queries_keys_values, random, strided
from tests.kit.backends import TRITON, on

PLAIN = ("reference", "torch")
HALF_TYPES = (torch.bfloat16, torch.float16)
THREE = (torch.float32, *HALF_TYPES)
B, H, D, R = 3, 2, 40, 32


def frequencies(length, batch=1, dtype=torch.float32, rotary_dim=R):
    steps = 10000 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    places = torch.arange(length)[None] + 7 * torch.arange(batch)[:, None]
    emb = (places[..., None] * steps).repeat(1, 1, 2)
    return {"cos": emb.cos().to(dtype), "sin": emb.sin().to(dtype)}


def inputs(q_len, k_len, D=64, R=32, B=2, H=2, seed=0, dtype=torch.float32, angle_batch=1, device="cpu"):
    """q, k, v, and angles whose two halves differ: nothing says that they agree."""
    qkv = queries_keys_values(B, q_len, k_len, H, D, seed=seed, dtype=dtype, device=device)
    angles = random(angle_batch, k_len, R, seed=seed + 7, scale=3.0, device=device) if R else None
    return qkv, {} if angles is None else {"cos": angles.cos(), "sin": angles.sin()}


def make_mask(kind, batch, q_len, k_len, device="cpu", fewest=None):
    """Make a mask: padding left or right, but for `fewest` keys in a row; rows without keys; or one for each query."""
    places = torch.arange(k_len, device=device)
    ends = torch.linspace(0, k_len, batch + 1)[1:].int().tolist()
    ends[0] = fewest or ends[0]
    if kind == "left":
        return torch.stack([places >= k_len - n for n in ends])
    if kind == "right":
        return torch.stack([places < n for n in reversed(ends)])
    if kind == "nothing":
        return torch.zeros(batch, k_len, dtype=torch.bool, device=device)
    if kind == "square":
        return (torch.rand(1, 1, q_len, k_len, generator=generator(5)) > 0.6).to(device)
    if kind == "rows":
        return (torch.rand(batch, 1, 1, k_len, generator=generator(6)) > 0.6).to(device)
    if kind == "additive":
        return random(batch, 1, q_len, k_len, seed=5, scale=2.0, device=device)
    return None


def eager(q, k, v, cos=None, sin=None, mask=None, causal=False, query_offset=None):
    """Attention as one would first write it, in the dtype of q."""
    q_len, k_len = q.shape[1], k.shape[1]
    start = query_offset if query_offset is not None else (k_len - q_len if causal else 0)
    if cos is not None:

        def rotate(x, rows):
            c, s, r = cos[:, rows, None], sin[:, rows, None], cos.shape[-1]
            half = torch.cat((-x[..., r // 2 : r], x[..., : r // 2]), -1)
            return torch.cat(((x[..., :r] * c + half * s).to(x.dtype), x[..., r:]), -1)

        q, k, v = rotate(q, slice(start, start + q_len)), rotate(k, slice(None)), rotate(v, slice(None))
    scores = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    allowed = torch.ones(1, 1, q_len, k_len, dtype=torch.bool)
    if mask is not None:
        allowed = allowed & (mask[:, None, None] if mask.ndim == 2 else mask)
    if causal:
        allowed = allowed & (torch.arange(k_len) <= start + torch.arange(q_len)[:, None])
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def attend(backend, *qkv, **options):
    with clvp_fast.backend(backend):
        return rotary_attention(*qkv, **options)


def check(backend, qkv, baseline=None, **options):
    actual = rotary_attention(*qkv, **options)
    assert actual.is_contiguous() and actual.dtype == qkv[2].dtype
    reference = attend("reference", *map(wide, qkv), **{name: wide(x) for name, x in options.items()})
    if baseline is None:
        kernel = backend.name in ("cpu", *TRITON)
        baseline = attend("torch", *qkv, **options).clone() if kernel else eager(*qkv, **options)
    assert_within_budget(actual, reference, baseline, times=backend.times(actual.dtype))
    return actual


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("mask", [None, "left", "right", "nothing", "square"])
@pytest.mark.parametrize("causal", [False, True])
@on("default", types="dtype")
def test_torch_path_against_reference(backend, dtype, rotary, mask, causal):
    for q_len, k_len in ((1, 1), (1, 33), (2, 33), (7, 33), (33, 33)):
        q, k, v = queries_keys_values(B, q_len, k_len, H, D, seed=k_len + q_len, dtype=dtype)
        check(
            backend,
            (q, k, v),
            mask=make_mask(mask, B, q_len, k_len, fewest=1),
            causal=causal,
            **(frequencies(k_len) if rotary else {}),
        )


@pytest.mark.parametrize(
    "D, R",
    [(64, 32), (64, 0), (64, 64), (32, 32), (32, 0), (80, 32), (80, 0), (96, 32), (96, 96), (128, 32), (128, 0)]
    + [(128, 128), (64, 2), (64, 20), (40, 32), (48, 16), (48, 32), (8, 4), (24, 24), (1, 0), (120, 66)]
    + [(88, 64), (128, 96)],
)
@on("cpu", *TRITON, types="dtype", served="rotary_attention")
def test_geometries(backend, dtype, D, R):
    """Whole tiles of keys, and one that the diagonal and the end cut."""
    qkv, angles = inputs(18, 100, D, R, B=1, dtype=dtype, device=backend.device)
    check(backend, qkv, causal=True, **angles)


LENGTHS = ((1, 1), (1, 65), (17, 150), (65, 65))


def check_masks(backend, dtype, mask, causal):
    """Also take queries from the first place on, which end the loop over keys early if it is causal."""
    for q_len, k_len, offset in (*((*each, None) for each in LENGTHS), (1, 65, 0), (17, 150, 0)):
        qkv, angles = inputs(
            q_len, k_len, 32, 16, B=2, H=1, seed=q_len + k_len, dtype=dtype, angle_batch=2, device=backend.device
        )
        options = dict(mask=make_mask(mask, 2, q_len, k_len, backend.device), causal=causal, query_offset=offset)
        check(backend, qkv, **options, **angles)


MASKS = pytest.mark.parametrize("mask", [None, "left", "right", "nothing", "square", "rows", "additive"])


@pytest.mark.parametrize("causal", [False, True])
@MASKS
@on(*TRITON, types="dtype", among=(torch.float32,))
def test_masks_and_lengths(backend, dtype, mask, causal):
    check_masks(backend, dtype, mask, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "left", "right", "nothing"])
@on("cpu", types="dtype", served="rotary_attention")
def test_masks_of_keys_and_lengths_on_a_cpu(backend, dtype, mask, causal):
    check_masks(backend, dtype, mask, causal)


@pytest.mark.parametrize("causal", [False, True])
@MASKS
@on("gpu", types="dtype", among=HALF_TYPES)
def test_masks_and_lengths_in_half_types(backend, dtype, mask, causal):
    check_masks(backend, dtype, mask, causal)


# Masks are read alike in every type.
@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@MASKS
@on("interpreted", types="dtype", among=HALF_TYPES)
def test_masks_and_lengths_in_float16(backend, dtype, mask, causal):
    check_masks(backend, dtype, mask, causal)


@pytest.mark.parametrize("q_len, k_len", [(128, 128), (129, 127), (63, 200), (260, 260)])
@on("cpu", *TRITON, served="rotary_attention")
def test_tiles_and_their_ends(backend, q_len, k_len):
    for causal in (False, True)[: 1 + (q_len <= k_len)]:
        qkv, _ = inputs(q_len, k_len, R=0, B=1, H=1, device=backend.device)
        check(backend, qkv, causal=causal)


@on(*PLAIN, types="dtype", among=HALF_TYPES)
def test_float32_angles_rotate_in_float32(backend, dtype):
    """Seen through one key, whose value comes out as it was rotated: rounded once."""
    q, k, v = queries_keys_values(200, 1, 1, H, D, seed=0, dtype=dtype)
    turn = frequencies(1, batch=200)
    out = rotary_attention(q, k, v, **turn)
    exact = eager(*(x.double() for x in (q, k, v)), **{name: x.double() for name, x in turn.items()})
    assert (out == exact.to(dtype)).double().mean() > 0.999


@on("cpu", *TRITON, types="dtype", among=HALF_TYPES, served="rotary_attention")
def test_rotation_is_rounded_once(backend, dtype):
    """Seen through one key, whose value comes out as it was rotated; then the same code over many keys."""
    qkv, angles = inputs(1, 1, 128, 128, B=12, H=1, dtype=dtype, angle_batch=12, device=backend.device)
    out = rotary_attention(*qkv, **angles)
    exact = attend("reference", *map(wide, qkv), **{name: wide(x) for name, x in angles.items()})
    assert (out == exact.to(dtype)).double().mean() > 0.999
    check(backend, qkv, **{name: x.to(dtype) for name, x in angles.items()})
    qkv, angles = inputs(1, 100, 128, 128, B=2, H=1, dtype=dtype, angle_batch=2, device=backend.device)
    for kind in (torch.float32, dtype):
        check(backend, qkv, **{name: x.to(kind) for name, x in angles.items()})


@on(*PLAIN)
def test_angles_that_both_halves_share(backend):
    q, k, v = queries_keys_values(2, 4, 9, H, D, seed=3, dtype=torch.float64)
    angles = random(2, 9, R // 2, seed=0, dtype=torch.float64)
    twice = {"cos": torch.cat((angles, angles), -1).cos(), "sin": torch.cat((angles, angles), -1).sin()}
    once = {"cos": angles[:, :, None].cos(), "sin": angles[:, :, None].sin()}
    expected = eager(q, k, v, causal=True, **twice)
    for turn in (once, twice):
        out = rotary_attention(q, k, v, causal=True, **turn)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = rotary_attention_weights(q, k, v, causal=True, **once)[1]
    torch.testing.assert_close(weights, rotary_attention_weights(q, k, v, causal=True, **twice)[1])


@pytest.mark.parametrize("D, R", [(64, 32), (40, 20), (32, 32)])
@on("cpu", *TRITON, types="dtype", served="rotary_attention")
def test_angles_that_both_halves_share_in_a_kernel(backend, dtype, D, R):
    qkv, angles = inputs(20, 70, D, R // 2, dtype=dtype, angle_batch=2, device=backend.device)
    twice = {name: torch.cat((x, x), -1) for name, x in angles.items()}
    once = {name: strided(x[:, :, None]) for name, x in angles.items()}
    out = check(backend, qkv, causal=True, **once)
    assert torch.equal(out, rotary_attention(*qkv, causal=True, **twice))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [0, 4, 12])
@on("default")
def test_query_offset_picks_rows_of_the_whole(backend, causal, offset):
    q, k, v = queries_keys_values(2, 20, 20, H, D, seed=9)
    whole = rotary_attention(q, k, v, causal=causal, **frequencies(20))
    part = rotary_attention(q[:, offset : offset + 8], k, v, causal=causal, query_offset=offset, **frequencies(20))
    torch.testing.assert_close(part, whole[:, offset : offset + 8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@on("cpu", *TRITON, served="rotary_attention")
def test_query_offset(backend, causal):
    qkv, angles = inputs(90, 90, B=1, device=backend.device)
    whole = rotary_attention(*qkv, causal=causal, **angles)
    for offset, q_len in ((0, 1), (89, 1), (3, 40)):
        part = (qkv[0][:, offset : offset + q_len], *qkv[1:])
        out = check(backend, part, causal=causal, query_offset=offset, **angles)
        torch.testing.assert_close(out, whole[:, offset : offset + q_len], rtol=1e-5, atol=1e-5)


@on(*PLAIN, types="dtype", among=THREE)
def test_query_without_keys_gets_the_mean_of_all_values(backend, dtype):
    q, k, v = queries_keys_values(2, 6, 6, H, D, seed=4, dtype=dtype)
    mask = torch.tensor([[True] * 6, [False] * 6])
    out = rotary_attention(q * 20, k, v, mask=mask)
    expected = v[1].double().mean(0).expand(6, H, D)
    torch.testing.assert_close(out[1].double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@on("cpu", types="dtype", served="rotary_attention")
def test_query_without_keys_gets_the_mean_on_a_cpu(backend, dtype):
    (q, k, v), _ = inputs(200, 200, 32, R=0, H=1, dtype=dtype)
    mask = make_mask("left", 2, 200, 200)
    out = rotary_attention(q * 20, k, v, mask=mask, causal=True)
    expected = v[0].double().mean(0).expand(100, 1, 32)
    assert not mask[0, :100].any()
    torch.testing.assert_close(out[0, :100].double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("additive", [False, True])
@on(*TRITON, types="dtype")
def test_query_without_keys_gets_the_mean_where_the_loop_ends_early(backend, dtype, additive):
    """Average all values, also those after it, where causality ends the loop over keys early."""
    (q, k, v), _ = inputs(200, 200, 32, R=0, H=1, dtype=dtype, device=backend.device)
    mask = make_mask("left", 2, 200, 200, backend.device)
    assert not mask[0, :100].any()
    if additive:
        mask = torch.zeros(2, 1, 1, 200, device=backend.device).masked_fill_(
            ~mask[:, None, None], torch.finfo(torch.float32).min
        )
    out = rotary_attention(q * 20, k, v, mask=mask, causal=True)
    expected = v[0].double().mean(0).expand(100, 1, 32)
    torch.testing.assert_close(out[0, :100].double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("q_len", [1, 17])
@on(*TRITON, types="dtype")
def test_additive_mask_equals_boolean_where_queries_have_no_keys(backend, dtype, q_len):
    """Let queries of the first places weigh the keys after them too, in rotated attention."""
    qkv, angles = inputs(q_len, 150, 32, 16, B=2, H=1, dtype=dtype, angle_batch=2, device=backend.device)
    allowed = make_mask("left", 2, q_len, 150, backend.device)[:, None, None].expand(2, 1, q_len, 150)
    options = dict(causal=True, query_offset=0, **angles)
    expected = check(backend, qkv, mask=allowed, **options)
    added = torch.zeros(allowed.shape, device=backend.device).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    out = rotary_attention(*qkv, mask=added, **options)
    torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@on("default")
def test_additive_mask_equals_boolean(backend):
    q, k, v = queries_keys_values(2, 6, 6, H, D, seed=4)
    allowed = torch.rand(2, 1, 6, 6, generator=generator(0)) > 0.4
    added = torch.zeros(2, 1, 6, 6).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    for causal in (False, True):
        expected = rotary_attention(q, k, v, mask=allowed, causal=causal)
        torch.testing.assert_close(rotary_attention(q, k, v, mask=added, causal=causal), expected, rtol=1e-5, atol=1e-5)


@on("cpu", *TRITON, types="dtype", served="rotary_attention")
def test_extreme_scores(backend, dtype):
    """Hold scores of thousands to float32's: some CPUs' torch rounds them to bfloat16, and takes other keys."""

    def check_scores(*qkv, **options):
        baseline = attend("torch", *(x.float() for x in qkv), **options).to(dtype, copy=True)
        check(backend, qkv, baseline, **options)

    (q, k, v), _ = inputs(20, 70, R=0, dtype=dtype, device=backend.device)
    check_scores(q * 80, k * 50, v)
    q[:], k[:] = 40, 30  # one score for all keys
    check_scores(q, k, v)
    check_scores(q, -k, v, mask=make_mask("right", 2, 20, 70, backend.device))


def ragged(lengths, dtype=torch.float32):
    q, k, v = (x[0] for x in queries_keys_values(1, sum(lengths), sum(lengths), H, D, seed=1, dtype=dtype))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return (q, k, v), {"cu_seqlens": bounds, "max_seqlen": max(lengths)}


def ragged_inputs(lengths, D=64, R=32, dtype=torch.float32, device="cpu"):
    tokens = sum(lengths)
    q, k, v = (x[0] for x in queries_keys_values(1, tokens, tokens, 1, D, seed=1, dtype=dtype, device=device))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return (q, k, v), bounds, inputs(1, max(lengths), D, R, device=device)[1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@on(*PLAIN, types="dtype")
def test_ragged_sequences_attend_each_to_itself(backend, dtype, rotary, causal):
    lengths = (5, 0, 17, 1, 33)
    qkv, bounds = ragged(lengths, dtype)
    turn = frequencies(33) if rotary else {}
    out = rotary_attention(*qkv, causal=causal, **bounds, **turn)
    assert out.shape == qkv[0].shape and out.dtype == dtype
    start = 0
    for length in lengths:
        alone = [x[None, start : start + length] for x in qkv]
        own = {name: x[:, :length] for name, x in turn.items()}
        if length:
            wide = {name: x.double() for name, x in own.items()}
            expected = eager(*(x.double() for x in alone), causal=causal, **wide)[0]
            baseline = eager(*alone, causal=causal, **own)[0]
            assert_within_budget(out[start : start + length].clone(), expected, baseline)
        start += length


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D, R", [(32, 16), (40, 0)])
@on("cpu", *TRITON, types="dtype", served="rotary_attention")
def test_ragged_sequences(backend, dtype, D, R, causal):
    qkv, bounds, angles = ragged_inputs((0, 1, 17, 130, 64), D, R, dtype, device=backend.device)
    check(backend, qkv, cu_seqlens=bounds, max_seqlen=130, causal=causal, **angles)
    packed = torch.stack(qkv, 1)
    out = rotary_attention(*packed.unbind(1), cu_seqlens=bounds, max_seqlen=130, causal=causal, **angles)
    assert torch.equal(out, rotary_attention(*qkv, cu_seqlens=bounds, max_seqlen=130, causal=causal, **angles))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers(dtype, masked):
    config = ClvpEncoderConfig(hidden_size=80, num_attention_heads=H, projection_dim=128, attention_dropout=0.0)
    torch.manual_seed(0)
    theirs = ClvpSelfAttention(config).eval().to(dtype)
    hidden = random(B, 9, 80, seed=1, dtype=dtype, scale=4.0)
    position = ClvpRotaryPositionalEmbedding(config)(hidden)
    mask = make_mask("left", B, 9, 9, fewest=1) if masked else None
    added = (
        None
        if mask is None
        else torch.zeros(B, 1, 9, 9, dtype=dtype).masked_fill(~mask[:, None, None], torch.finfo(dtype).min)
    )
    places = torch.arange(9).expand(B, 9)
    with torch.no_grad():
        expected, expected_weights = theirs(
            hidden,
            rotary_pos_emb=position,
            attention_mask=None if added is None else added.to(dtype),
            position_ids=places,
        )
        q, k, v = (p(hidden).view(B, 9, H, 40) for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj))
        options = {"cos": position.cos(), "sin": position.sin(), "mask": mask}
        out, weights = rotary_attention_weights(q, k, v, **options)
        plain = rotary_attention(q, k, v, **options)
        tolerance = {"rtol": 0, "atol": 5e-6 if dtype == torch.float32 else 1e-12}
        torch.testing.assert_close(theirs.out_proj(out.flatten(2)), expected, **tolerance)
        torch.testing.assert_close(weights, expected_weights, **tolerance)
        torch.testing.assert_close(theirs.out_proj(plain.flatten(2)), expected, **tolerance)
