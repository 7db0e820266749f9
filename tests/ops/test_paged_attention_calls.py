"""Calls of paged attention, as torch's path takes them: unused slots, company, compiled graphs, errors, debug mode."""

import os
import subprocess
import sys

import pytest
import torch

from clvp_fast.ops import paged_attention_decode, paged_prefill
from clvp_fast.ops.paged_attention import FLOAT8
from tests.kit.backends import on
from tests.ops.test_paged_attention import PAGE, PLAIN, D, H, plain_ragged, plain_step


def test_decode_reads_no_unused_slot_even_if_it_is_not_a_number():
    args, options, _ = plain_step(torch.float32, True)
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


@on(*PLAIN)
def test_decode_of_nobody(backend):
    args, options, _ = plain_step(torch.float32, True, lengths=[-1, -1])
    before = args[3].clone()
    out = paged_attention_decode(*args, **options)
    assert torch.equal(out, torch.zeros(2, H, D)) and torch.equal(args[3], before)


def test_a_candidate_does_not_see_who_else_is_in_the_batch():
    args, options, seen = plain_step(torch.float32, True)
    whole = paged_attention_decode(*(x.clone() for x in args), **options)
    for row, _, _ in seen:
        part = (
            [x[row : row + 1] for x in args[:3]] + [x.clone() for x in args[3:5]] + [x[row : row + 1] for x in args[5:]]
        )
        alone = paged_attention_decode(*part, **options | {"prefix_index": options["prefix_index"][row : row + 1]})
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-6, atol=1e-6)


def test_registered_and_compiled():
    args, options, _ = plain_step(torch.float32, True)
    op = torch.ops.clvp_fast.paged_attention_decode.default
    torch.library.opcheck(op, (*args, *options.values(), D**-0.5))
    torch.library.opcheck(torch.ops.clvp_fast.paged_prefill.default, (*plain_ragged(torch.float32), D**-0.5))
    copies = [x.clone() for x in args]
    compiled = torch.compile(lambda *a: paged_attention_decode(*a, **options) * 2, fullgraph=True, backend="aot_eager")(
        *copies
    )
    torch.testing.assert_close(compiled, paged_attention_decode(*args, **options) * 2, rtol=0, atol=0)
    assert torch.equal(copies[3], args[3]) and torch.equal(copies[4], args[4])


def test_bad_arguments_are_named():
    args, options, _ = plain_step(torch.float32, True)

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
        paged_prefill(*(x[:4] if i == 3 else x for i, x in enumerate(plain_ragged(torch.float32))))


def test_scales_and_counters_are_checked():
    args, options, _ = plain_step(torch.float32, True)
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
        paged_prefill(*plain_ragged(torch.float32), v_scale=scale)


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
    args, options, _ = plain_step(torch.float32, True)
    tables = {"block_table": args[5], "seq_lens": args[6]} | options
    before = args[3].clone()
    tables[name][place] = value
    with pytest.raises(error, match=message):
        paged_attention_decode(*args, **options)
    assert torch.equal(args[3], before), "nothing is written before the check"


def test_debug_mode_looks_at_what_is_used_alone(debug):
    args, options, _ = plain_step(torch.float32, True)
    expected = paged_attention_decode(*(x.clone() for x in args), **options)
    for row, length in enumerate(args[6].tolist()):
        args[5][row, max(length, -1) // PAGE + 1 :] = 2**30
    options["prefix_index"][args[6] < 0] = 99
    options["prefix_table"][3] = -7  # a prefix of no tokens
    assert torch.equal(paged_attention_decode(*args, **options), expected)
    plain, _, _ = plain_step(torch.float32, False)
    assert paged_attention_decode(*plain).isfinite().all()


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([1, 16, 17, 50, 65, 82, 82], r"cu_seqlens\[0\] must be 0, not 1"),
        ([0, 16, 16, 17, 50, 65, 83], r"cu_seqlens\[6\] must be at most 82, not 83"),
        ([0, 16, 15, 17, 50, 65, 82], r"cu_seqlens\[2\] must be 16 or more, as the entry before it, not 15"),
        ([0, 82, 82, 82, 82, 82, 82], r"sequence 0 of cu_seqlens takes 82 slots, and block_table has 4 pages of 16"),
    ],
)
def test_debug_mode_of_prefill(debug, bounds, message):
    args = list(plain_ragged(torch.float32))
    assert paged_prefill(*args).isfinite().all()
    args[3] = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises((ValueError, IndexError), match=message):
        paged_prefill(*args)


def test_debug_mode_of_prefill_names_the_page(debug):
    args = list(plain_ragged(torch.float32))
    args[6][3, 2] = 40
    with pytest.raises(IndexError, match=r"block_table\[3, 2\] must be from 0 to 39, not 40"):
        paged_prefill(*args)
