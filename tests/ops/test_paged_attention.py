"""Paged attention: against contiguous attention in float64, on pages dealt at random and full of poison."""

import os
import subprocess
import sys

import pytest
import torch

import clvp_fast
from clvp_fast.ops import paged_attention_decode, paged_prefill
from clvp_fast.ops.paged_attention import FLOAT8
from tests.kit import PagePool, assert_within_budget, random

H, D, PAGE = 3, 32, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LENGTHS = [0, 1, 15, 16, 17, 33, 5, -1, 31, -3]  # own tokens before the step: page ± 1, none, inactive slots
PREFIX_LENS = [17, 1, 16, 0, 40]
PREFIX_INDEX = [0, 4, 4, -1, 0, 2, 3, 0, 1, -1]


def attend(q, k, v):
    """One query `[H, D]` over k, v `[keys, H, D]`, in the dtype of q."""
    weights = torch.einsum("hd,khd->hk", q * D**-0.5, k).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, v)


def step(dtype, prefix, seed=0, lengths=LENGTHS):
    """A decode step: its arguments, and each active candidate's (row, k, v) to attend to."""
    pool = PagePool(60, PAGE, H, D, seed=seed, dtype=dtype)
    own = pool.store([max(n, 0) for n in lengths], room=1)
    prompts = pool.store(PREFIX_LENS)
    n = len(lengths)
    q = random(n, H, D, seed=seed + 70, dtype=dtype, scale=2.0)
    new = [random(n, H, D, seed=seed + 71 + i, dtype=dtype) for i in range(2)]
    options = {}
    if prefix:
        options = {
            "prefix_table": prompts.table,
            "prefix_lens": torch.tensor(PREFIX_LENS, dtype=torch.int32),
            "prefix_index": torch.tensor(PREFIX_INDEX[:n], dtype=torch.int32),
        }
    seen = []
    for row, length in enumerate(lengths):
        request = PREFIX_INDEX[row] if prefix else -1
        parts = [
            [*([stored_prefix[request]] if request >= 0 else []), stored_own[row], x[row : row + 1]]
            for stored_prefix, stored_own, x in ((prompts.k, own.k, new[0]), (prompts.v, own.v, new[1]))
        ]
        if length >= 0:
            seen.append((row, *(torch.cat(part) for part in parts)))
    args = [q, *new, pool.k, pool.v, own.table, torch.tensor(lengths, dtype=torch.int32)]
    return args, options, seen


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype, prefix, backend):
    args, options, seen = step(dtype, prefix)
    q, k_new, v_new, k_pages, v_pages, table, _ = args
    expected_pages = [k_pages.clone(), v_pages.clone()]
    for row, length in enumerate(LENGTHS):
        if length >= 0:
            place = table[row, length // PAGE], length % PAGE
            expected_pages[0][place], expected_pages[1][place] = k_new[row], v_new[row]
    with clvp_fast.backend(backend):
        out = paged_attention_decode(*args, **options)
    rows = [row for row, _, _ in seen]
    reference = torch.stack([attend(q[row].double(), k.double(), v.double()) for row, k, v in seen])
    assert_within_budget(out[rows], reference, torch.stack([attend(q[row], k, v) for row, k, v in seen]))
    inactive = [row for row, length in enumerate(LENGTHS) if length < 0]
    assert torch.equal(out[inactive], torch.zeros(len(inactive), H, D, dtype=dtype))
    assert torch.equal(k_pages, expected_pages[0]) and torch.equal(v_pages, expected_pages[1])


def test_decode_reads_no_unused_slot_even_if_it_is_not_a_number():
    args, options, _ = step(torch.float32, True)
    expected = paged_attention_decode(*(x.clone() for x in args), **options)
    table, lengths = args[5], args[6]
    used = torch.zeros(args[3].shape[:2], dtype=torch.bool)
    for owner_table, owner_lengths in ((table, lengths), (options["prefix_table"], options["prefix_lens"])):
        for row, length in enumerate(owner_lengths.tolist()):
            for place in range(length):
                used[owner_table[row, place // PAGE], place % PAGE] = True
    for pages in args[3:5]:
        pages[~used] = float("nan")
    for row, length in enumerate(lengths.tolist()):
        table[row, max(length, -1) // PAGE + 1 :] = 2**30  # what is not read need not exist
    assert torch.equal(paged_attention_decode(*args, **options), expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_decode_of_nobody(backend):
    args, options, _ = step(torch.float32, True, lengths=[-1, -1])
    before = args[3].clone()
    with clvp_fast.backend(backend):
        out = paged_attention_decode(*args, **options)
    assert torch.equal(out, torch.zeros(2, H, D)) and torch.equal(args[3], before)


def test_a_candidate_does_not_see_who_else_is_in_the_batch():
    args, options, seen = step(torch.float32, True)
    whole = paged_attention_decode(*(x.clone() for x in args), **options)
    for row, _, _ in seen:
        part = (
            [x[row : row + 1] for x in args[:3]] + [x.clone() for x in args[3:5]] + [x[row : row + 1] for x in args[5:]]
        )
        alone = paged_attention_decode(*part, **options | {"prefix_index": options["prefix_index"][row : row + 1]})
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-6, atol=1e-6)


SEQUENCES = [16, 0, 1, 33, 15, 17]


def ragged(dtype, seed=0):
    total = sum(SEQUENCES)
    pool = PagePool(40, PAGE, H, D, seed=seed, dtype=dtype)
    table = pool.store([0] * len(SEQUENCES), room=max(SEQUENCES)).table
    q = random(total, H, D, seed=seed + 50, dtype=dtype, scale=2.0)
    k, v = (random(total, H, D, seed=seed + 51 + i, dtype=dtype) for i in range(2))
    bounds = torch.tensor([0, *SEQUENCES]).cumsum(0).to(torch.int32)
    return q, k, v, bounds, pool.k, pool.v, table


def causal(q, k, v, bounds):
    """Each token's attention to itself and what stands before it in its sequence, in the dtype of q."""
    out = []
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        out += [attend(q[i], k[start : i + 1], v[start : i + 1]) for i in range(start, end)]
    return torch.stack(out)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill(dtype, backend):
    args = ragged(dtype)
    q, k, v, bounds, k_pages, v_pages, table = args
    expected_pages = [k_pages.clone(), v_pages.clone()]
    for row, (start, length) in enumerate(zip(bounds.tolist(), SEQUENCES, strict=False)):
        for place in range(length):
            slot = table[row, place // PAGE], place % PAGE
            expected_pages[0][slot], expected_pages[1][slot] = k[start + place], v[start + place]
    with clvp_fast.backend(backend):
        out = paged_prefill(*args)
    reference = causal(q.double(), k.double(), v.double(), bounds)
    assert_within_budget(out, reference, causal(q, k, v, bounds))
    assert torch.equal(k_pages, expected_pages[0]) and torch.equal(v_pages, expected_pages[1])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_prefill_then_decode_is_attention_over_all(backend):
    """The prompt's pages serve several candidates, which go on in pages of their own."""
    total, prompt, candidates = 40, 23, 3
    pool = PagePool(20, PAGE, H, D, seed=0)
    prompt_table = pool.store([0], room=prompt).table
    own = pool.store([0] * candidates, room=total - prompt).table
    q, k, v = (random(candidates, total, H, D, seed=i, scale=1.5) for i in range(3))
    q[:, :prompt], k[:, :prompt], v[:, :prompt] = q[:1, :prompt], k[:1, :prompt], v[:1, :prompt]
    bounds = torch.tensor([0, prompt], dtype=torch.int32)
    with clvp_fast.backend(backend):
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


def test_registered_and_compiled():
    args, options, _ = step(torch.float32, True)
    op = torch.ops.clvp_fast.paged_attention_decode.default
    torch.library.opcheck(op, (*args, *options.values(), D**-0.5))
    torch.library.opcheck(torch.ops.clvp_fast.paged_prefill.default, (*ragged(torch.float32), D**-0.5))
    copies = [x.clone() for x in args]
    compiled = torch.compile(lambda *a: paged_attention_decode(*a, **options) * 2, fullgraph=True, backend="aot_eager")(
        *copies
    )
    torch.testing.assert_close(compiled, paged_attention_decode(*args, **options) * 2, rtol=0, atol=0)
    assert torch.equal(copies[3], args[3]) and torch.equal(copies[4], args[4])


def test_bad_arguments_are_named():
    args, options, _ = step(torch.float32, True)

    def changed(place, value):
        return [value if i == place else x for i, x in enumerate(args)]

    cases = [
        (changed(0, args[0][0]), options, ValueError, "q must have shape"),
        (changed(1, args[1][:2]), options, ValueError, "k_new must have shape"),
        (changed(2, args[2].double()), options, TypeError, "v_new must have the dtype of q"),
        (changed(3, args[3][..., :8]), options, ValueError, r"k_pages must have shape \[num_pages, page_size, 3, 32\]"),
        (changed(4, args[4].half()), options, TypeError, "v_pages must have the dtype of k_pages"),
        (changed(5, args[5].long()), options, TypeError, "block_table must be int32"),
        (changed(6, args[6][:3]), options, ValueError, r"seq_lens must have shape \[10\], not \[3\]"),
        (args, {"prefix_lens": options["prefix_lens"]}, ValueError, "together"),
        (args, options | {"prefix_lens": options["prefix_lens"][1:]}, ValueError, "prefix_lens must have shape"),
        (changed(0, args[0].clone().requires_grad_()), options, RuntimeError, r"under torch\.no_grad"),
    ]
    for given, given_options, error, message in cases:
        with pytest.raises(error, match=message):
            paged_attention_decode(*given, **given_options)
    with pytest.raises(ValueError, match="cu_seqlens must have shape"):
        paged_prefill(*(x[:4] if i == 3 else x for i, x in enumerate(ragged(torch.float32))))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_float8_pages_keep_what_the_type_can_hold(backend):
    """Stored is x / scale, rounded and clamped; read is stored * scale, so a step equals one over such pages."""
    args, options, _ = step(torch.float32, True)
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
    with clvp_fast.backend(backend):
        out = paged_attention_decode(*args, **options, k_scale=scales[0], v_scale=scales[1])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for place, scale in ((3, scales[0]), (4, scales[1])):
        assert torch.equal(args[place].float() * scale[:, None], wide[place])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_prefill_into_float8_pages(backend):
    args, wide = list(ragged(torch.float32)), list(ragged(torch.float32))
    scales = torch.tensor([0.02, 0.3, 1.0]), torch.tensor([0.5, 0.011, 2.0])
    expected = paged_prefill(*wide)
    args[4:6] = (torch.zeros_like(x).to(FLOAT8) for x in args[4:6])
    with clvp_fast.backend(backend):
        out = paged_prefill(*args, k_scale=scales[0], v_scale=scales[1])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # the attention takes k and v as they are
    bounds, table = args[3].tolist(), args[6]
    for row, (start, length) in enumerate(zip(bounds, SEQUENCES, strict=False)):
        for place in range(length):
            for source, target, scale in ((1, 4, scales[0]), (2, 5, scales[1])):
                stored = args[target][table[row, place // PAGE], place % PAGE]
                assert torch.equal(stored.float(), (args[source][start + place] / scale[:, None]).to(FLOAT8).float())


def test_scales_and_counters_are_checked():
    args, options, _ = step(torch.float32, True)
    scale = torch.ones(H)
    eighths = [*args[:3], args[3].to(FLOAT8), args[4].to(FLOAT8), *args[5:]]
    cases = [
        (args, {"k_scale": scale}, ValueError, "k_scale belongs to pages of torch.float8_e4m3fn: it is given"),
        (eighths, {"v_scale": scale}, ValueError, "k_scale belongs to .*: it is missing, and k_pages are torch.float8"),
        (eighths, {"k_scale": scale}, ValueError, "v_scale belongs to"),
        (eighths, {"k_scale": scale, "v_scale": scale[:1]}, ValueError, r"v_scale must have shape \[3\], not \[1\]"),
        (
            eighths,
            {"k_scale": scale.double(), "v_scale": scale},
            TypeError,
            "k_scale must be float32, not torch.float64",
        ),
        (args, {"arrivals": torch.zeros(10, H)}, TypeError, "arrivals must be int32"),
        (args, {"arrivals": torch.zeros(9, H).int()}, ValueError, r"arrivals must have shape \[10, 3\], not \[9, 3\]"),
        (args, {"arrivals": torch.zeros(H, 10).int().T}, ValueError, "arrivals must be contiguous"),
    ]
    for given, more, error, message in cases:
        with pytest.raises(error, match=message):
            paged_attention_decode(*given, **options, **more)
    with pytest.raises(ValueError, match="v_scale belongs to"):
        paged_prefill(*ragged(torch.float32), v_scale=scale)


def test_debug_mode_is_an_environment_variable():
    code = "from clvp_fast.ops import paged_attention; print(paged_attention._debug)"
    environment = os.environ | {"CLVP_FAST_DEBUG": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setattr("clvp_fast.ops.paged_attention._debug", True)


@pytest.mark.parametrize(
    "name, place, value, error, message",
    [
        ("block_table", (5, 2), 60, IndexError, r"block_table\[5, 2\] must be from 0 to 59, not 60"),
        ("block_table", (0, 0), -1, IndexError, r"block_table\[0, 0\] must be from 0 to 59, not -1"),
        ("seq_lens", (3,), 64, IndexError, r"seq_lens\[3\] = 64 takes 65 slots, and block_table has 4 pages of 16"),
        ("prefix_table", (4, 1), 99, IndexError, r"prefix_table\[4, 1\] must be from 0 to 59, not 99"),
        ("prefix_lens", (0,), 65, IndexError, r"prefix_lens\[0\] takes 65 slots, and prefix_table has 4 pages of 16"),
        ("prefix_lens", (2,), -2, ValueError, r"prefix_lens\[2\] must be 0 or more, not -2"),
        ("prefix_index", (8,), 5, IndexError, r"prefix_index\[8\] must be from -1 to 4, not 5"),
        ("prefix_index", (8,), -2, IndexError, r"prefix_index\[8\] must be from -1 to 4, not -2"),
    ],
)
def test_debug_mode_names_the_wrong_value(debug, name, place, value, error, message):
    args, options, _ = step(torch.float32, True)
    tables = {"block_table": args[5], "seq_lens": args[6]} | options
    before = args[3].clone()
    tables[name][place] = value
    with pytest.raises(error, match=message):
        paged_attention_decode(*args, **options)
    assert torch.equal(args[3], before), "nothing is written before the check"


def test_debug_mode_looks_at_what_is_used_alone(debug):
    args, options, _ = step(torch.float32, True)
    expected = paged_attention_decode(*(x.clone() for x in args), **options)
    for row, length in enumerate(args[6].tolist()):
        args[5][row, max(length, -1) // PAGE + 1 :] = 2**30
    options["prefix_index"][args[6] < 0] = 99
    options["prefix_table"][3] = -7  # a prefix of no tokens
    assert torch.equal(paged_attention_decode(*args, **options), expected)
    plain, _, _ = step(torch.float32, False)
    assert paged_attention_decode(*plain).isfinite().all()


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([1, 16, 17, 50, 65, 82, 82], r"cu_seqlens\[0\] must be 0, not 1"),
        ([0, 16, 16, 17, 50, 65, 81], r"cu_seqlens\[6\] must be 82, not 81"),
        ([0, 16, 15, 17, 50, 65, 82], r"cu_seqlens\[2\] must be 16 or more, as the entry before it, not 15"),
        ([0, 82, 82, 82, 82, 82, 82], r"sequence 0 of cu_seqlens takes 82 slots, and block_table has 4 pages of 16"),
    ],
)
def test_debug_mode_of_prefill(debug, bounds, message):
    args = list(ragged(torch.float32))
    assert paged_prefill(*args).isfinite().all()
    args[3] = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises((ValueError, IndexError), match=message):
        paged_prefill(*args)


def test_debug_mode_of_prefill_names_the_page(debug):
    args = list(ragged(torch.float32))
    args[6][3, 2] = 40
    with pytest.raises(IndexError, match=r"block_table\[3, 2\] must be from 0 to 39, not 40"):
        paged_prefill(*args)
