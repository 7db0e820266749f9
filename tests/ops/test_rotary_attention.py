"""`rotary_attention`: the torch path against the float64 reference, and both against transformers' own attention."""

import pytest
import torch
from transformers.models.clvp.configuration_clvp import ClvpEncoderConfig
from transformers.models.clvp.modeling_clvp import ClvpRotaryPositionalEmbedding, ClvpSelfAttention

import clvp_fast
from clvp_fast.ops import rotary_attention, rotary_attention_weights
from tests.kit import assert_within_budget, generator, queries_keys_values, random, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
B, H, D, R = 3, 2, 40, 32


def angles(length, batch=1, dtype=torch.float32, rotary_dim=R):
    frequencies = 10000 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    places = torch.arange(length)[None] + 7 * torch.arange(batch)[:, None]
    emb = (places[..., None] * frequencies).repeat(1, 1, 2)
    return {"cos": emb.cos().to(dtype), "sin": emb.sin().to(dtype)}


def make_mask(kind, q_len, k_len, seed=5):
    """Padding on either side: row 0 has none, row 1 some, row 2 all but one key (so that causal rows run empty)."""
    places = torch.arange(k_len)
    if kind == "left":
        return torch.stack([places >= n for n in (0, k_len // 3, k_len - 1)])
    if kind == "right":
        return torch.stack([places < n for n in (k_len, k_len - k_len // 3, 1)])
    if kind == "nothing":
        return torch.zeros(B, k_len, dtype=torch.bool)
    if kind == "square":
        return torch.rand(1, 1, q_len, k_len, generator=generator(seed)) > 0.5
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


def check(q, k, v, **options):
    doubled = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in options.items()
    }
    with clvp_fast.backend("reference"):
        reference = rotary_attention(q.double(), k.double(), v.double(), **doubled)
    actual = rotary_attention(q, k, v, **options)
    assert actual.is_contiguous() and actual.dtype == v.dtype
    assert_within_budget(actual, reference, eager(q, k, v, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("mask", [None, "left", "right", "nothing", "square"])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_path_against_reference(dtype, rotary, mask, causal):
    for q_len, k_len in ((1, 1), (1, 33), (2, 33), (7, 33), (33, 33)):
        q, k, v = queries_keys_values(B, q_len, k_len, H, D, seed=k_len + q_len, dtype=dtype)
        check(q, k, v, mask=make_mask(mask, q_len, k_len), causal=causal, **(angles(k_len) if rotary else {}))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_angles_rotate_in_float32(dtype, backend):
    """Seen through one key, whose value comes out as it was rotated: rounded once."""
    q, k, v = queries_keys_values(200, 1, 1, H, D, seed=0, dtype=dtype)
    turn = angles(1, batch=200)
    with clvp_fast.backend(backend):
        out = rotary_attention(q, k, v, **turn)
    exact = eager(*(x.double() for x in (q, k, v)), **{name: x.double() for name, x in turn.items()})
    assert (out == exact.to(dtype)).double().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_head_sizes_and_strided_inputs(dtype, head_dim):
    q, k, v = (strided(x) for x in queries_keys_values(2, 9, 9, 3, head_dim, seed=head_dim, dtype=dtype))
    mask = strided(make_mask("left", 9, 9)[:2])
    check(q, k, v, mask=mask, causal=True, **angles(9, batch=2))
    packed = random(2, 9, 3, 3, head_dim, seed=1, dtype=dtype)
    check(*packed.unbind(2), **angles(9, rotary_dim=head_dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_query_over_keys_stored_by_head(dtype):
    """The layout of a key-value cache, with room behind the keys that nobody may read."""
    q, k, v = queries_keys_values(5, 1, 50, H, D, seed=2, dtype=dtype)
    room = [torch.full((5, H, 64, D), float("nan"), dtype=dtype) for _ in range(2)]
    for buffer, x in zip(room, (k, v), strict=True):
        buffer[:, :, :50] = x.transpose(1, 2)
    k, v = (buffer[:, :, :50].transpose(1, 2) for buffer in room)
    check(q, k, v, causal=True)
    check(q, k, v, mask=torch.arange(50) >= torch.tensor([[0], [3], [49], [17], [25]]), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [0, 4, 12])
def test_query_offset_picks_rows_of_the_whole(causal, offset):
    q, k, v = queries_keys_values(2, 20, 20, H, D, seed=9)
    whole = rotary_attention(q, k, v, causal=causal, **angles(20))
    part = rotary_attention(q[:, offset : offset + 8], k, v, causal=causal, query_offset=offset, **angles(20))
    torch.testing.assert_close(part, whole[:, offset : offset + 8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_query_without_keys_gets_the_mean_of_all_values(backend, dtype):
    q, k, v = queries_keys_values(2, 6, 6, H, D, seed=4, dtype=dtype)
    mask = torch.tensor([[True] * 6, [False] * 6])
    with clvp_fast.backend(backend):
        out = rotary_attention(q * 20, k, v, mask=mask)
    expected = v[1].double().mean(0).expand(6, H, D)
    torch.testing.assert_close(out[1].double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_additive_mask_equals_boolean():
    q, k, v = queries_keys_values(2, 6, 6, H, D, seed=4)
    allowed = torch.rand(2, 1, 6, 6, generator=generator(0)) > 0.4
    added = torch.zeros(2, 1, 6, 6).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    for causal in (False, True):
        expected = rotary_attention(q, k, v, mask=allowed, causal=causal)
        torch.testing.assert_close(rotary_attention(q, k, v, mask=added, causal=causal), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers(dtype, masked):
    config = ClvpEncoderConfig(hidden_size=80, num_attention_heads=H, projection_dim=128, attention_dropout=0.0)
    torch.manual_seed(0)
    theirs = ClvpSelfAttention(config).eval().to(dtype)
    hidden = random(B, 9, 80, seed=1, dtype=dtype, scale=4.0)
    position = ClvpRotaryPositionalEmbedding(config)(hidden)
    mask = make_mask("left", 9, 9) if masked else None
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "left"])
def test_gradients(causal, mask):
    q, k, v = (x.requires_grad_() for x in queries_keys_values(B, 3, 5, H, 8, seed=3, dtype=torch.float64))
    options = {"mask": make_mask(mask, 3, 5), "causal": causal, **angles(5, dtype=torch.float64, rotary_dim=6)}
    assert torch.autograd.gradcheck(lambda *x: rotary_attention(*x, **options), (q, k, v))
    grad_out = random(B, 3, H, 8, seed=8, dtype=torch.float64)
    ours = torch.autograd.grad(rotary_attention(q, k, v, **options), (q, k, v), grad_out)
    with clvp_fast.backend("reference"):
        theirs = torch.autograd.grad(rotary_attention(q, k, v, **options), (q, k, v), grad_out)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_within_budget(mine, expected)


def test_gradients_under_an_additive_mask():
    """Rows that run empty included: each of their weights is 1 / keys, in the backward too."""
    q, k, v = (x.requires_grad_() for x in queries_keys_values(2, 4, 4, H, 8, seed=3, dtype=torch.float64))
    added = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    added[1] = torch.finfo(torch.float64).min
    grad_out = random(2, 4, H, 8, seed=8, dtype=torch.float64)
    grad_v = torch.autograd.grad(rotary_attention(q, k, v, mask=added), v, grad_out)[0]
    assert_within_budget(grad_v[1], grad_out[1].mean(0).expand(4, H, 8).clone())


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
    arguments = (q, k, v, *angles(9).values(), make_mask("left", 9, 9))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for actual, expected in zip(compiled(*arguments), run(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_angles_that_both_halves_share(backend):
    q, k, v = queries_keys_values(2, 4, 9, H, D, seed=3, dtype=torch.float64)
    angles = random(2, 9, R // 2, seed=0, dtype=torch.float64)
    twice = {"cos": torch.cat((angles, angles), -1).cos(), "sin": torch.cat((angles, angles), -1).sin()}
    once = {"cos": angles[:, :, None].cos(), "sin": angles[:, :, None].sin()}
    expected = eager(q, k, v, causal=True, **twice)
    with clvp_fast.backend(backend):
        for turn in (once, twice):
            out = rotary_attention(q, k, v, causal=True, **turn)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weights = rotary_attention_weights(q, k, v, causal=True, **once)[1]
    torch.testing.assert_close(weights, rotary_attention_weights(q, k, v, causal=True, **twice)[1])


def ragged(lengths, dtype=torch.float32):
    q, k, v = (x[0] for x in queries_keys_values(1, sum(lengths), sum(lengths), H, D, seed=1, dtype=dtype))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return (q, k, v), {"cu_seqlens": bounds, "max_seqlen": max(lengths)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_ragged_sequences_attend_each_to_itself(backend, rotary, causal, dtype):
    lengths = (5, 0, 17, 1, 33)
    qkv, bounds = ragged(lengths, dtype)
    turn = angles(33) if rotary else {}
    with clvp_fast.backend(backend):
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


def test_gradients_of_ragged_sequences():
    qkv, bounds = ragged((2, 0, 3), torch.float64)
    turn = angles(3, dtype=torch.float64)
    qkv = [x[..., :34].detach().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(lambda *x: rotary_attention(*x, causal=True, **bounds, **turn), qkv)


def test_compiles_ragged_sequences_whole():
    qkv, bounds = ragged((4, 1, 6))
    turn = angles(6)

    def run(q, k, v):
        return rotary_attention(q, k, v, causal=True, **bounds, **turn) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv), run(*qkv), rtol=1e-5, atol=1e-5)
    args = (*qkv, bounds["cu_seqlens"], 6, turn["cos"], turn["sin"], True, 0.2)
    torch.library.opcheck(torch.ops.clvp_fast.rotary_attention_ragged.default, args)


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
        ((q, k, v), angles(4), ValueError, r"cos must have shape \[1, 5, an even number of at most 40\]"),
        ((q, k, v), angles(5, batch=2), ValueError, r"cos must have shape \[1, 5"),
        ((q, k, v), {"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "together with cu_seqlens"),
        ((q, k, v), {"dropout_p": 0.1}, ValueError, "together with cu_seqlens"),
        ((q, k, v), {"query_offset": 1}, ValueError, "together with cu_seqlens"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            rotary_attention(*arguments, **{**bounds, **options})


def test_registered_operator():
    q, k, v = queries_keys_values(B, 3, 5, H, D, seed=3)
    options = angles(5)
    op = torch.ops.clvp_fast.rotary_attention.default
    for mask in (None, make_mask("left", 3, 5)):
        torch.library.opcheck(op, (q, k, v, options["cos"], options["sin"], mask, True, 2, D**-0.5))
    expected = rotary_attention(q, k, v, causal=True, **options)
    actual = op(q, k, v, options["cos"], options["sin"], None, True, 2, D**-0.5)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_bad_arguments_are_named():
    q, k, v = queries_keys_values(2, 3, 5, H, D, seed=0)
    cos, sin = angles(5).values()
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
