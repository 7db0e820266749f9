"""Paged attention on every backend: against contiguous attention in float64, on pages dealt at random, full of
poison."""

import warnings

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import paged_attention as kernels
from clvp_fast.ops import paged_attention as op, paged_attention_decode, paged_prefill
from clvp_fast.ops.paged_attention import FLOAT8, decode_reference
from tests.kit import PagePool, assert_within_budget, random
from tests.kit.backends import TRITON, on

PLAIN = ("torch", "reference")
H, D, PAGE = 3, 32, 16
LENGTHS = [0, 1, 15, 16, 17, 33, 5, -1, 31, -3]  # own tokens before the step: page ± 1, none, inactive slots
PREFIX_LENS = [17, 1, 16, 0, 40]
PREFIX_INDEX = [0, 4, 4, -1, 0, 2, 3, 0, 1, -1]
SEQUENCES = [16, 0, 1, 33, 15, 17]


def attend(q, k, v):
    """Attend from one query `[H, D]` to k, v `[keys, H, D]`, in the dtype of q."""
    weights = torch.einsum("hd,khd->hk", q * D**-0.5, k).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, v)


def ints(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def deal(
    dtype=torch.float32,
    lengths=LENGTHS,
    prefix_lens=PREFIX_LENS,
    index=PREFIX_INDEX,
    heads=2,
    dim=32,
    page=16,
    seed=0,
    pages=100,
    device="cpu",
):
    """Make a decode step's arguments (without prefixes if `prefix_lens` is None), and its stored keys and values."""
    pool = PagePool(pages, page, heads, dim, seed=seed, dtype=dtype, device=device)
    own = pool.store([max(n, 0) for n in lengths], room=1)
    n = len(lengths)
    q = random(n, heads, dim, seed=seed + 70, dtype=dtype, scale=2.0, device=device)
    new = [random(n, heads, dim, seed=seed + 71 + i, dtype=dtype, device=device) for i in range(2)]
    prefix, prompts = [None, None, None], None
    if prefix_lens is not None:
        prompts = pool.store(prefix_lens)
        prefix = [prompts.table, ints(prefix_lens, device), ints(index[:n], device)]
    args = [q, *new, pool.k, pool.v, own.table, ints(lengths, device), *prefix, dim**-0.5]
    return args, own, prompts


def step(*settings, **more):
    return deal(*settings, **more)[0]


def plain_step(dtype, prefix, lengths=LENGTHS):
    """Make a step of three heads: its arguments, those of its prefix, and each active candidate's (row, k, v)."""
    args, own, prompts = deal(dtype, lengths, PREFIX_LENS if prefix else None, heads=H, pages=60)
    options = dict(zip(("prefix_table", "prefix_lens", "prefix_index"), args[7:10], strict=True)) if prefix else {}
    seen = []
    for row, length in enumerate(lengths):
        request = PREFIX_INDEX[row] if prefix else -1
        parts = [
            [*([stored[request]] if request >= 0 else []), mine[row], x[row : row + 1]]
            for stored, mine, x in (
                (prompts.k if prompts else None, own.k, args[1]),
                (prompts.v if prompts else None, own.v, args[2]),
            )
        ]
        if length >= 0:
            seen.append((row, *(torch.cat(part) for part in parts)))
    return args[:7], options, seen


def ragged(dtype=torch.float32, sequences=SEQUENCES, heads=2, dim=32, page=16, seed=0, pages=200, device="cpu"):
    total = sum(sequences)
    pool = PagePool(pages, page, heads, dim, seed=seed, dtype=dtype, device=device)
    table = pool.store([0] * len(sequences), room=max(sequences, default=0)).table
    q = random(total, heads, dim, seed=seed + 50, dtype=dtype, scale=2.0, device=device)
    k, v = (random(total, heads, dim, seed=seed + 51 + i, dtype=dtype, device=device) for i in range(2))
    return [q, k, v, ints([0, *sequences], device).cumsum(0).int(), pool.k, pool.v, table, dim**-0.5]


def plain_ragged(dtype):
    return ragged(dtype, heads=H, pages=40)[:-1]


def copied(args, wide=False):
    return [
        x if not isinstance(x, torch.Tensor) else x.double() if wide and x.is_floating_point() else x.clone()
        for x in args
    ]


def decode(args, **options):
    *tensors, prefix_table, prefix_lens, prefix_index, scale = args
    prefix = dict(prefix_table=prefix_table, prefix_lens=prefix_lens, prefix_index=prefix_index)
    return paged_attention_decode(*tensors, **prefix, scale=scale, **options)


def prefill(args, **options):
    return paged_prefill(*args[:-1], scale=args[-1], **options)


def check(backend, call, reference, args, pages_at, rows=slice(None), **options):
    """Check the result within the budget, and the pages exactly as the reference writes them."""
    torch_args, exact = copied(args), copied(args, wide=True)
    expected = reference(*exact)
    with clvp_fast.backend("torch"):
        baseline = call(torch_args, **options)
    out = call(args, **options)
    assert_within_budget(out[rows], expected[rows], baseline[rows], times=backend.times(out.dtype))
    for i in pages_at:
        assert torch.equal(args[i], exact[i].to(args[i].dtype))
    return out


def check_decode(backend, args, **options):
    if backend.name == "cpu":
        with clvp_fast.backend(None):
            assert clvp_fast.explain("paged_attention_decode", "cpu")[0].backend == "kernel"
    active = args[6] >= 0
    out = check(backend, decode, decode_reference, args, (3, 4), active, **options)
    assert (out[~active] == 0).all()
    return out


@pytest.mark.parametrize("prefix", [False, True])
@on(*PLAIN, types="dtype")
def test_decode_in_torch(backend, dtype, prefix):
    args, options, seen = plain_step(dtype, prefix)
    q, k_new, v_new, k_pages, v_pages, table, _ = args
    expected_pages = [k_pages.clone(), v_pages.clone()]
    for row, length in enumerate(LENGTHS):
        if length >= 0:
            place = table[row, length // PAGE], length % PAGE
            expected_pages[0][place], expected_pages[1][place] = k_new[row], v_new[row]
    out = paged_attention_decode(*args, **options)
    rows = [row for row, _, _ in seen]
    reference = torch.stack([attend(q[row].double(), k.double(), v.double()) for row, k, v in seen])
    assert_within_budget(out[rows], reference, torch.stack([attend(q[row], k, v) for row, k, v in seen]))
    inactive = [row for row, length in enumerate(LENGTHS) if length < 0]
    assert torch.equal(out[inactive], torch.zeros(len(inactive), H, D, dtype=dtype))
    assert torch.equal(k_pages, expected_pages[0]) and torch.equal(v_pages, expected_pages[1])


@pytest.mark.parametrize("prefix", [False, True])
@on("cpu", *TRITON, types="dtype")
def test_decode(backend, dtype, prefix):
    """Let own keys take longer than those of a prefix, whose programs are then not the last, and less long."""
    check_decode(backend, step(dtype, prefix_lens=PREFIX_LENS if prefix else None, device=backend.device))
    if prefix:
        check_decode(backend, step(dtype, [0, 3, 1], [9, 250], [1, 0, 1], device=backend.device))


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@on(*TRITON, types="dtype")
def test_decode_widths_and_pages_of_32(backend, dtype, dim):
    check_decode(
        backend,
        step(dtype, [31, 32, 33, 64], [65, 32], [1, 0, -1, 1], heads=1, dim=dim, page=32, device=backend.device),
    )
    check_decode(backend, step(dtype, [0, 40, -1], [250], [0, -1, 0], heads=1, dim=dim, page=32, device=backend.device))


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 128])
@on("cpu", types="dtype")
def test_widths_and_pages_of_other_sizes(backend, dtype, dim):
    check_decode(
        backend, step(dtype, [31, 32, 33, 150], [65, 32], [1, 0, -1, 1], dim=dim, page=32, device=backend.device)
    )
    check_decode(backend, step(dtype, [4, 5, 6], dim=dim, page=5, device=backend.device))


@pytest.mark.parametrize("dim", [16, 48, 64, 128])
@on("cpu", types="dtype")
def test_the_only_token_comes_back_bit_for_bit(backend, dtype, dim):
    args = step(dtype, [0, 0, 0], None, dim=dim, device=backend.device)
    assert torch.equal(decode(args), args[2])


@pytest.mark.parametrize("candidates", [1, 3, 4, 9])
@on("cpu")
def test_heads_that_the_items_of_a_candidate_do_not_divide(backend, candidates):
    check_decode(backend, step(lengths=[40] * candidates, prefix_lens=None, heads=5, device=backend.device))


@pytest.mark.parametrize("prefix", [False, True])
@on(*TRITON, types="dtype")
def test_decode_in_parts(backend, dtype, prefix, monkeypatch):
    """Split the keys of one candidate: parts that are full, begun, empty, or hold the new token alone."""
    monkeypatch.setattr(kernels, "SPLIT", 64)
    lengths = [150, 63, 64, 65, 127, 128, 0, -1]
    check_decode(
        backend,
        step(
            dtype, lengths, [129, 64, 0] if prefix else None, [0, 1, 2, -1, 0, 0, 1, 0], heads=1, device=backend.device
        ),
    )


@on(*TRITON)
def test_decode_in_the_parts_that_ship(backend):
    assert kernels.parts(608, 416) == 5 and kernels.parts(256, 0) == 1 and kernels.parts(0, 16) == 2
    check_decode(
        backend, step(lengths=[300, 255, 256], prefix_lens=[260], index=[0, 0, -1], heads=1, device=backend.device)
    )


@on(*TRITON)
def test_decode_of_more_candidates_than_a_tile(backend):
    """Mix requests in any order, on both sides of the border of two tiles of 16 candidates."""
    index = [2, 0, 1, 1, -1, 0, 2, 2, 0, 1, 0, 0, -1, 2, 1, 0, 0, 2, 1]
    check_decode(
        backend,
        step(
            lengths=[i % 3 - (i == 5) * 9 for i in range(19)],
            prefix_lens=[5, 33, 17],
            index=index,
            heads=1,
            device=backend.device,
        ),
    )


@on("gpu", types="dtype")
def test_decode_of_many_programs_at_once(backend, dtype):
    """Use the decoder's own shape: parts of a candidate end on different multiprocessors, in any order."""
    candidates, heads, dim, page, own, prompt = 256, 16, 64, 16, 38, 26
    dealt = torch.randperm(candidates * own + 4 * prompt, device=backend.device).int()
    shape = len(dealt), page, heads, dim
    pages = [random(*shape, seed=i, dtype=dtype, device=backend.device) for i in range(2)]
    rows = [random(candidates, heads, dim, seed=2 + i, dtype=dtype, device=backend.device) for i in range(3)]
    lengths = torch.randint(-5, own * page, (candidates,), device=backend.device).clamp(-1).int()
    prefix = (
        dealt[: 4 * prompt].view(4, prompt),
        ints([60, 410, 0, 257], device=backend.device),
        ints([i * 7 % 5 - 1 for i in range(candidates)], device=backend.device),
    )
    args = [2 * rows[0], *rows[1:], *pages, dealt[4 * prompt :].view(candidates, own), lengths, *prefix, dim**-0.5]
    first = check_decode(backend, copied(args))
    for _ in range(50):
        assert torch.equal(decode(copied(args)), first)


@pytest.mark.parametrize("dim", [24, 40, 144, 160, 256])
@on("cpu", types="dtype")
def test_widths_that_it_does_not_serve(backend, dtype, dim):
    """Take torch's path, and give a forced kernel's reason."""
    args = step(dtype, dim=dim, device=backend.device)
    exact = copied(args, wide=True)
    expected = decode_reference(*exact)
    with clvp_fast.backend("torch"):
        baseline = decode(copied(args))
    assert f"a multiple of 16 up to 128, not {dim}" in op._decode_why_not_cpu(*args)
    with clvp_fast.backend(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once, that the kernel does not serve
        out = decode(args)
    active = args[6] >= 0
    assert_within_budget(out[active], expected[active], baseline[active])
    assert torch.equal(out, baseline)


@on(*PLAIN)
def test_prefill_then_decode_is_attention_over_all_in_torch(backend):
    """Let several candidates share the prompt's pages, and go on in pages of their own."""
    total, prompt, candidates = 40, 23, 3
    pool = PagePool(20, PAGE, H, D, seed=0)
    prompt_table = pool.store([0], room=prompt).table
    own = pool.store([0] * candidates, room=total - prompt).table
    q, k, v = (random(candidates, total, H, D, seed=i, scale=1.5) for i in range(3))
    q[:, :prompt], k[:, :prompt], v[:, :prompt] = q[:1, :prompt], k[:1, :prompt], v[:1, :prompt]
    bounds = torch.tensor([0, prompt], dtype=torch.int32)
    outputs = [paged_prefill(q[0, :prompt], k[0, :prompt], v[0, :prompt], bounds, pool.k, pool.v, prompt_table)]
    outputs[0] = outputs[0].expand(candidates, prompt, H, D)
    for place in range(prompt, total):
        out = paged_attention_decode(
            *(x[:, place] for x in (q, k, v)),
            *(pool.k, pool.v, own),
            torch.full((candidates,), place - prompt, dtype=torch.int32),
            prefix_table=prompt_table,
            prefix_lens=bounds[1:],
            prefix_index=torch.zeros(candidates, dtype=torch.int32),
        )
        outputs.append(out[:, None])
    actual = torch.cat(outputs, 1)
    reference = clvp_fast.ops.rotary_attention(q.double(), k.double(), v.double(), causal=True)
    assert_within_budget(actual, reference, clvp_fast.ops.rotary_attention(q, k, v, causal=True))


@on(*TRITON, types="dtype")
def test_prefill_then_decode_is_attention_over_all(backend, dtype):
    total, prompt, candidates, heads, dim = 26, 23, 3, 1, 32
    pool = PagePool(20, 16, heads, dim, seed=0, dtype=dtype, device=backend.device)
    prompt_table = pool.store([0], room=prompt).table
    own = pool.store([0] * candidates, room=total - prompt).table
    q, k, v = (
        random(candidates, total, heads, dim, seed=i, scale=1.5, dtype=dtype, device=backend.device) for i in range(3)
    )
    q[:, :prompt], k[:, :prompt], v[:, :prompt] = q[:1, :prompt], k[:1, :prompt], v[:1, :prompt]
    bounds = ints([0, prompt], device=backend.device)
    out = paged_prefill(q[0, :prompt], k[0, :prompt], v[0, :prompt], bounds, pool.k, pool.v, prompt_table)
    outputs = [out.expand(candidates, prompt, heads, dim)]
    for place in range(prompt, total):
        new = (x[:, place] for x in (q, k, v))
        prefix = dict(
            prefix_table=prompt_table,
            prefix_lens=bounds[1:],
            prefix_index=ints([0] * candidates, device=backend.device),
        )
        out = paged_attention_decode(
            *new, pool.k, pool.v, own, ints([place - prompt] * candidates, device=backend.device), **prefix
        )
        outputs.append(out[:, None])
    with clvp_fast.backend("torch"):
        attend = clvp_fast.ops.rotary_attention
        reference, baseline = attend(q.double(), k.double(), v.double(), causal=True), attend(q, k, v, causal=True)
    assert_within_budget(torch.cat(outputs, 1), reference, baseline, times=backend.times(q.dtype))


@on(*PLAIN)
def test_float8_pages_keep_what_the_type_can_hold(backend):
    """Stored is x / scale, rounded and clamped; read is stored * scale, so a step equals one over such pages."""
    args, options, _ = plain_step(torch.float32, True)
    scales = torch.tensor([0.02, 0.3, 1.0]), torch.tensor([0.5, 0.011, 2.0])
    args[1][0, 0, :2] = torch.tensor([1e4, -1e4])
    wide, limit = list(args), 448 * scales[0][0]
    for place, scale in ((3, scales[0]), (4, scales[1])):
        args[place] = (args[place] / scale[:, None]).clamp(-448, 448).to(FLOAT8)
        wide[place] = args[place].float() * scale[:, None]
    for place, scale in ((1, scales[0]), (2, scales[1])):
        wide[place] = (args[place] / scale[:, None]).clamp(-448, 448).to(FLOAT8).float() * scale[:, None]
    assert wide[1][0, 0, :2].tolist() == [limit, -limit]
    expected = paged_attention_decode(*wide, **options)
    out = paged_attention_decode(*args, **options, k_scale=scales[0], v_scale=scales[1])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for place, scale in ((3, scales[0]), (4, scales[1])):
        assert torch.equal(args[place].float() * scale[:, None], wide[place])


def float8(args, scales):
    """Give the arguments pages of float8.

    The interpreter rounds wrongly to that type (a carry into the exponent is lost), so that there new keys and values
    need no rounding.
    """
    args = list(args)
    new, pages = ((1, 2), (3, 4)) if len(args) == 11 else ((1, 2), (4, 5))
    for i, j, scale in zip(new, pages, scales, strict=True):
        args[j] = (args[j].float() / scale[:, None]).clamp(-448, 448).to(FLOAT8)
        if scales[0].device.type == "cpu":
            args[i] = ((args[i].float() / scale[:, None]).to(FLOAT8).float() * scale[:, None]).to(args[i].dtype)
        args[i][0, 0, :2] = 1e4  # more than a page can hold
    return args, pages


def check_float8(backend, call, reference, args):
    scales = [torch.tensor(x, device=backend.device) for x in ([0.25, 2.0], [0.5, 0.125])]
    options = dict(zip(("k_scale", "v_scale"), scales, strict=True))
    args, pages = float8(args, scales)
    exact = [args[i].clone() if i in pages else x for i, x in enumerate(copied(args, wide=True))]
    rows = args[6] >= 0 if call is decode else slice(None)
    torch_args, expected = copied(args), reference(*exact, *scales)
    with clvp_fast.backend("torch"):
        baseline = call(torch_args, **options)
    assert_within_budget(
        call(args, **options)[rows], expected[rows], baseline[rows], times=backend.times(args[0].dtype)
    )
    for i in pages:
        assert torch.equal(args[i].view(torch.uint8), exact[i].view(torch.uint8))
        assert torch.equal(torch_args[i].view(torch.uint8), exact[i].view(torch.uint8))


@on(*TRITON, types="dtype")
def test_float8_pages(backend, dtype):
    check_float8(backend, decode, decode_reference, step(dtype, device=backend.device))
    step_of_long_prefix = step(dtype, [0, 3, 1], [9, 250], [1, 0, 1], device=backend.device)
    check_float8(backend, decode, decode_reference, step_of_long_prefix)
