"""Memory and bits of the kernels of paged attention: what they read and write, in any company; what they do
not serve."""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import paged_attention as kernels
from clvp_fast.ops import paged_attention as op
from clvp_fast.ops.paged_attention import decode_reference
from tests.kit import Guarded, strided
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck
from tests.ops.test_paged_attention import (
    LENGTHS,
    PREFIX_INDEX,
    PREFIX_LENS,
    copied,
    decode,
    ints,
    prefill,
    ragged,
    step,
)


def launch(args, parts_of=kernels.parts):
    """Call the launcher itself, on guarded results and poisoned workspaces."""
    q, k_pages, block_table, prefix_table = args[0], args[3], args[5], args[7]
    own, prefix = (0 if table is None else table.shape[1] * k_pages.shape[1] for table in (block_table, prefix_table))
    guarded = Guarded(*q.shape, dtype=q.dtype, device=q.device)
    room = q.shape[0] * q.shape[1] * parts_of(own, prefix)
    partial = Guarded(room, q.shape[2] + 2, dtype=torch.float32, device=q.device)
    arrivals = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    kernels.paged_attention_decode(*args, None, None, out=guarded.tensor, partial=partial.tensor, arrivals=arrivals)
    guarded.check()
    assert not arrivals.any(), "the counters are not back at zero"
    around = torch.cat((partial._buffer[:2], partial._buffer[-2:]))
    assert around.isnan().all(), "the workspace is written outside its rows"
    return guarded.tensor


def poison_unused(args):
    """NaN in every slot that holds no token, and wild table entries where no page is in use."""
    k_pages, v_pages, table, lengths, prefix_table, prefix_lens = args[3:9]
    used = torch.zeros(k_pages.shape[:2], dtype=torch.bool, device=k_pages.device)
    for owner_table, owner_lengths, room in ((table, lengths, 1), (prefix_table, prefix_lens, 0)):
        for row, length in enumerate(owner_lengths.tolist()):
            for place in range(length):
                used[owner_table[row, place // 16], place % 16] = True
            owner_table[row, -(-max(length + room, 0) // 16) :] = 2**30
    for pages in (k_pages, v_pages):
        pages[~used] = float("nan")


@pytest.mark.parametrize("split", [256, 64])
@on(*TRITON)
def test_decode_reads_and_writes_nothing_else(backend, split, monkeypatch):
    monkeypatch.setattr(kernels, "SPLIT", split)
    args = step(lengths=LENGTHS[:-1] + [70], heads=1, device=backend.device)
    expected = decode(copied(args))
    poison_unused(args)
    assert torch.equal(launch(args), expected)


@on("cpu", *TRITON)
def test_decode_of_strided_arguments(backend):
    args = step(lengths=LENGTHS[3:8], device=backend.device)
    expected = decode(copied(args))
    given = [strided(x) if isinstance(x, torch.Tensor) else x for x in args]
    if backend.compiled:  # for other strides of the pages: threads hold other channels, and add them in another order
        torch.testing.assert_close(decode(given), expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(decode(given), expected)
    some = [strided(x) if i in (0, 2, 7) else x for i, x in enumerate(copied(args))]
    assert torch.equal(decode(some), expected)
    scattered = [
        x.transpose(0, -1).contiguous().transpose(0, -1) if i in (0, 1, 2, 5, 7) else x for i, x in enumerate(args)
    ]
    assert scattered[0].stride(-1) != 1 and torch.equal(decode(scattered), expected)


@on("cpu", *TRITON, types="dtype")
def test_a_candidate_has_the_same_bits_alone_and_in_any_company(backend, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "SPLIT", 64)
    lengths = [70, 3, -1, 64, 0, 128, 17, 5, 1, 33, 2, 15, 16, 40, 0, 63, 65]
    index = [0, 1, 0, 2, 0, 1, 1, -1, 2, 0, 0, 1, 2, 0, 1, 0, 2]
    args = step(dtype, lengths, [65, 7, 64], index, heads=1, device=backend.device)
    whole = decode(copied(args))
    assert torch.equal(decode(copied(args)), whole), "twice the same input"
    rows_at = (0, 1, 2, 5, 6, 9)
    for rows in ([16], [3], [5, 16, 2, 0, 11, 9]):
        part = [x[rows] if i in rows_at else x for i, x in enumerate(copied(args))]
        assert torch.equal(decode(part), whole[rows])


@on("cpu", *TRITON)
def test_a_request_that_is_not_a_number_spoils_no_other(backend):
    args = step(lengths=[3, 4, 5, 20], prefix_lens=[17, 20], index=[0, 1, 0, 1], heads=1, device=backend.device)
    expected = decode(copied(args))
    args[3][args[7][0, 1].long(), 0] = float("nan")
    args[4][args[7][0, 0].long(), 3] = float("inf")
    args[0][1] = float("nan")
    out = decode(args)
    assert torch.equal(out[3], expected[3]) and not torch.isfinite(out[:3]).all(-1).any()


@on("cpu", *TRITON)
def test_pages_and_requests_out_of_range_are_skipped(backend):
    """Use pages, requests and lengths out of range: no other memory or candidate is touched."""
    args = step(
        lengths=[20, 20, 20, 20, 20, 20],
        prefix_lens=[20, 1000, 5],
        index=[0, 0, 3, -9, 1, 2],
        heads=1,
        device=backend.device,
    )
    expected, before = decode(copied(args)), args[3].clone()
    guarded = []
    for i in (3, 4):
        guarded.append(Guarded(*args[i].shape, dtype=torch.float32, device=backend.device))
        guarded[-1].tensor.copy_(args[i])
        args[i] = guarded[-1].tensor
    table, lengths, prefix_table = args[5], args[6], args[7]
    table[0, 1] = len(before)  # where the new token belongs
    table[1, 0] = -1
    lengths[2] = 2**30  # past the table: its new token has no place
    lengths[3] = table.shape[1] * 16
    prefix_table[2, 0] = len(before)
    written = table[[1, 4, 5], 1].long()
    out = decode(args)
    assert torch.isfinite(out).all()
    assert torch.equal(out[4], expected[4]) and not torch.equal(out[5], expected[5])
    changed = (args[3] != before).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(changed, written.sort().values)
    for memory in guarded:
        memory.check("pages")


@on("cpu", *TRITON)
def test_nothing_is_read_behind_a_full_table(backend):
    """Fill the last row of the table of prefixes, and that of own pages up to the new token."""
    args = step(lengths=[3, 31], prefix_lens=[20, 32], index=[0, 1], heads=1, device=backend.device)
    expected = decode(copied(args))
    for i in (5, 7):
        assert args[i].shape == (2, 3)
        args[i] = args[i][:, :2].contiguous()
    assert torch.equal(decode(args), expected)


@on("cpu", *TRITON)
def test_any_page_may_be_the_first(backend):
    """Move pages round, so that the first holds stored tokens, the new one, or those of a prefix."""
    args = step(lengths=[20, 5], prefix_lens=[20], index=[0, -1], heads=1, device=backend.device)
    whole = copied(args)
    expected = decode(whole)
    for page in (args[5][0, 0], args[5][0, 1], args[7][0, 0]):
        moved = copied(args)
        for i in (3, 4):
            moved[i] = moved[i].roll(-page.item(), 0)
        for i in (5, 7):
            moved[i] = (moved[i] - page) % len(args[3])
        assert torch.equal(decode(moved), expected)
        assert all(torch.equal(moved[i], whole[i].roll(-page.item(), 0)) for i in (3, 4))


@on("cpu", *TRITON)
def test_an_unknown_request_is_none(backend):
    """Even where the memory around the tables would do as a prefix."""
    args = step(lengths=[3, 4, 5], prefix_lens=[20] * 9, index=[-1, 4, -1], heads=1, device=backend.device)
    args[7], args[8] = args[7][3:6], args[8][3:6]
    args[9] = ints([-1, 1, -1], device=backend.device)
    expected = decode(copied(args))
    args[9] = ints([-3, 1, 3], device=backend.device)
    assert torch.equal(decode(args), expected)


@on(*TRITON)
def test_nobody(backend):
    args = step(lengths=[-1, -1], device=backend.device)
    before = args[3].clone()
    assert not decode(args).any() and torch.equal(args[3], before)
    assert decode([x[:0] if i in (0, 1, 2, 5, 6, 9) else x for i, x in enumerate(args)]).shape == (0, 2, 32)
    assert prefill(ragged(sequences=[0, 0], device=backend.device)).shape == (0, 2, 32)


@on(*TRITON)
def test_registered(backend):
    args = step(lengths=[3, -1, 16], heads=1, device=backend.device)
    arrivals = torch.zeros(3, 1, dtype=torch.int32, device=backend.device)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.clvp_fast.paged_attention_decode.default
    opcheck(backend, op, (*args, None, None, arrivals), test_utils=checks)
    opcheck(backend, op, step(lengths=[3], prefix_lens=None, heads=1, device=backend.device), test_utils=checks)
    opcheck(
        backend,
        torch.ops.clvp_fast.paged_prefill.default,
        ragged(sequences=[3, 17], heads=1, device=backend.device),
        test_utils=checks,
    )


@on(*TRITON)
def test_unserved_arguments_are_named(backend):
    args = step(heads=1, device=backend.device)

    def changed(**values):
        places = {"q": 0, "k_new": 1, "v_new": 2, "k_pages": 3, "v_pages": 4}
        return [values.get(next((n for n, p in places.items() if p == i), None), x) for i, x in enumerate(args)]

    wide = {name: args[i].double() for i, name in enumerate(("q", "k_new", "v_new", "k_pages", "v_pages"))}
    narrow = {name: args[i][..., :16] for i, name in enumerate(("q", "k_new", "v_new", "k_pages", "v_pages"))}
    cases = [
        (changed(**wide), r"float32, float16 or bfloat16, not torch\.float64"),
        (
            changed(k_pages=args[3].half(), v_pages=args[4].half()),
            r"of the dtype of q, torch\.float32.* not of torch\.float16",
        ),
        (changed(**narrow), "head_dim 32, 64, 80, 96, 128, not 16"),
        (changed(k_pages=args[3][:, :8], v_pages=args[4][:, :8]), "page_size 16, 32, not 8"),
        (changed(v_pages=strided(args[4])), "k_pages and v_pages of the same strides"),
    ]
    for given, message in cases:
        with clvp_fast.backend("triton"), pytest.raises(RuntimeError, match=message):
            decode(given)


def check_extreme_scores(call, reference, args):
    """Check scores of ±1e4 and constant rows: no overflow, and the weight goes where it belongs."""
    args[0] *= 1e4
    args[0][3:5] = 0.0
    expected = reference(*copied(args, wide=True))
    torch.testing.assert_close(call(args).double(), expected, rtol=2e-3, atol=2e-3)


@on("cpu", *TRITON)
def test_extreme_scores(backend):
    check_extreme_scores(decode, decode_reference, step(heads=1, device=backend.device))


@on("cpu")
def test_the_same_bits_on_any_number_of_threads(backend, monkeypatch):
    args = step(
        lengths=[60 + 7 * i for i in range(9)],
        prefix_lens=PREFIX_LENS,
        index=PREFIX_INDEX,
        heads=4,
        dim=128,
        device=backend.device,
    )
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(decode(copied(args)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@on("cpu")
def test_reads_and_writes_nothing_else(backend, monkeypatch):
    args = step(lengths=[*LENGTHS[:-1], 70], heads=1, device=backend.device)
    expected = decode(copied(args))
    poison_unused(args)
    guarded = Guarded(*args[0].shape, dtype=torch.float32)
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: guarded.tensor)
    assert torch.equal(decode(args), expected)
    guarded.check()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda args: [x.half() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args],
            "float32 and bfloat16",
        ),
        (
            lambda args: [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args],
            "float32 and bfloat16",
        ),
        (lambda args: [*args[:4], strided(args[4]), *args[5:]], "the same strides"),
    ],
)
@on("cpu")
def test_unserved_calls_take_the_torch_path(backend, change, reason):
    args = change(step(device=backend.device))
    with clvp_fast.backend("torch"):
        expected = decode(copied(args))
    op._DECODE._warned.clear()
    with clvp_fast.backend(None), pytest.warns(UserWarning, match=reason):
        assert torch.equal(decode(args), expected)
