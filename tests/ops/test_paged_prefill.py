"""Prefill of pages on every backend: ragged sequences, stores, and no other memory."""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import paged_prefill as kernels
from clvp_fast.ops import paged_prefill
from clvp_fast.ops.paged_attention import FLOAT8, prefill_reference
from tests.kit import Guarded, assert_within_budget, strided
from tests.kit.backends import TRITON, on
from tests.ops.test_paged_attention import (
    PAGE,
    PLAIN,
    SEQUENCES,
    attend,
    check,
    check_float8,
    copied,
    ints,
    plain_ragged,
    prefill,
    ragged,
)
from tests.ops.test_paged_attention_memory import check_extreme_scores


def causal(q, k, v, bounds):
    """Attend from each token to itself and its sequence before, in the dtype of q."""
    out = []
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        out += [attend(q[i], k[start : i + 1], v[start : i + 1]) for i in range(start, end)]
    return torch.stack(out)


def check_prefill(backend, args):
    if backend.name == "cpu":
        with clvp_fast.backend(None):
            assert clvp_fast.explain("paged_prefill", "cpu")[0].backend == "kernel"
    return check(backend, prefill, prefill_reference, args, (4, 5))


@on(*PLAIN, types="dtype")
def test_prefill_in_torch(backend, dtype):
    args = plain_ragged(dtype)
    q, k, v, bounds, k_pages, v_pages, table = args
    expected_pages = [k_pages.clone(), v_pages.clone()]
    for row, (start, length) in enumerate(zip(bounds.tolist(), SEQUENCES, strict=False)):
        for place in range(length):
            slot = table[row, place // PAGE], place % PAGE
            expected_pages[0][slot], expected_pages[1][slot] = k[start + place], v[start + place]
    out = paged_prefill(*args)
    reference = causal(q.double(), k.double(), v.double(), bounds)
    assert_within_budget(out, reference, causal(q, k, v, bounds))
    assert torch.equal(k_pages, expected_pages[0]) and torch.equal(v_pages, expected_pages[1])


@on("cpu", *TRITON, types="dtype")
def test_prefill(backend, dtype):
    check_prefill(backend, ragged(dtype, device=backend.device))


@pytest.mark.parametrize("dim, page", [(64, 16), (80, 32), (96, 32), (128, 32)])
@on("cpu", *TRITON, types="dtype")
def test_prefill_of_several_tiles(backend, dtype, dim, page):
    check_prefill(backend, ragged(dtype, (63, 64, 130, 0, 0, 65), heads=1, dim=dim, page=page, device=backend.device))


@on("cpu", *TRITON)
def test_prefill_of_many_sequences(backend):
    """More than one round of the search for a program's sequence."""
    check_prefill(backend, ragged(sequences=[0] * 120 + [2, 0, 1] + [0] * 20 + [3, 0], heads=1, device=backend.device))


@on(*PLAIN)
def test_prefill_into_float8_pages(backend):
    args, wide = list(plain_ragged(torch.float32)), list(plain_ragged(torch.float32))
    scales = torch.tensor([0.02, 0.3, 1.0]), torch.tensor([0.5, 0.011, 2.0])
    expected = paged_prefill(*wide)
    args[4:6] = (torch.zeros_like(x).to(FLOAT8) for x in args[4:6])
    out = paged_prefill(*args, k_scale=scales[0], v_scale=scales[1])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # the attention takes k and v as they are
    bounds, table = args[3].tolist(), args[6]
    for row, (start, length) in enumerate(zip(bounds, SEQUENCES, strict=False)):
        for place in range(length):
            for source, target, scale in ((1, 4, scales[0]), (2, 5, scales[1])):
                stored = args[target][table[row, place // PAGE], place % PAGE]
                assert torch.equal(stored.float(), (args[source][start + place] / scale[:, None]).to(FLOAT8).float())


@pytest.mark.parametrize("last", [82, 40, 0])
@on(*TRITON)
def test_rows_behind_the_last_sequence_are_left_alone(backend, last):
    """Read nothing of them, and write nothing for them."""
    args = list(ragged(device=backend.device))
    args[3] = args[3].clamp(max=last)
    exact = copied(args, wide=True)
    expected = prefill_reference(*exact)
    for x in args[:3]:
        x[last:] = torch.nan
    out = torch.full_like(args[0], 7.0)
    kernels.paged_prefill(*args, None, None, out=out)
    assert (out[last:] == 7).all() and len(out) == 82
    assert torch.equal(args[4].double(), exact[4]) and torch.equal(args[5].double(), exact[5])
    torch.testing.assert_close(out[:last], expected[:last].float(), rtol=1e-4, atol=1e-4)


@on(*TRITON)
def test_prefill_writes_all_of_the_result_and_its_own_slots_alone(backend):
    args = ragged(device=backend.device)
    exact = copied(args, wide=True)
    expected = prefill_reference(*exact)
    given = [strided(x) if isinstance(x, torch.Tensor) and i != 1 else x for i, x in enumerate(args)]
    out = Guarded(*args[0].shape, dtype=torch.float32, device=backend.device)
    kernels.paged_prefill(*given, None, None, out=out.tensor)
    out.check()
    assert torch.equal(given[4].double(), exact[4]) and torch.equal(given[5].double(), exact[5])
    assert_within_budget(out.tensor, expected, prefill(args))


@on("cpu", *TRITON)
def test_a_sequence_has_the_same_bits_alone_and_in_any_company(backend):
    args = ragged(sequences=[5, 70, 0, 1, 66, *[2] * 12], heads=1, device=backend.device)
    whole = prefill(copied(args))
    assert torch.equal(prefill(copied(args)), whole)
    bounds = args[3].tolist()
    for row in (1, 4):
        rows = slice(bounds[row], bounds[row + 1])
        alone = [
            *(x[rows] for x in args[:3]),
            ints([0, rows.stop - rows.start], device=backend.device),
            *args[4:6],
            args[6][row : row + 1],
        ]
        assert torch.equal(prefill([*alone, args[-1]]), whole[rows])


@on("cpu", *TRITON)
def test_prefill_leaves_out_what_does_not_exist(backend):
    args = ragged(sequences=[64, 72, 7, 20], heads=1, device=backend.device)
    expected = prefill(copied(args))
    args[6] = args[6][:, :4].contiguous()  # 64 slots for 72 tokens; what follows is the next row's page
    args[6][0], args[6][3, 1] = len(args[4]), -1
    before, k, table = args[4].clone(), args[1], args[6].long()
    before[table[1]] = k[64:128].unflatten(0, (4, 16))
    before[table[2, 0], :7], before[table[3, 0]] = k[136:143], k[143:159]
    assert torch.equal(prefill(args), expected)
    assert torch.equal(args[4], before)


@on("cpu")
def test_a_row_has_the_same_bits_whatever_follows_it(backend):
    """Cut a sequence within a vector of queries, within an item of work and at its end."""
    args = ragged(sequences=[300], dim=48, page=7)
    whole = prefill(copied(args))
    for rows in (1, 37, 128, 129, 299):
        start = [*(x[:rows] for x in args[:3]), ints([0, rows]), *args[4:]]
        assert torch.equal(prefill(copied(start)), whole[:rows])


@on("cpu", types="dtype")
def test_prefill_of_strided_rows_stores_in_its_own_slots_alone(backend, dtype):
    """Take queries, keys and values out of one product's result, and leave rows and slots of no sequence alone."""
    args = ragged(dtype, heads=2)
    packed = torch.stack(args[:3], dim=1).flatten(1)
    args[:3] = packed.unflatten(-1, (3, 2, -1)).unbind(1)
    args[3] = args[3].clamp(max=70)
    for x in args[:3]:
        x[70:] = torch.nan
    args[4:6] = (strided(x) for x in args[4:6])
    check(backend, prefill, prefill_reference, args, (4, 5), slice(70))


@on("cpu")
def test_the_same_prefill_on_any_number_of_threads(backend, monkeypatch):
    args = ragged(sequences=[5, 200, 0, 66])
    whole = prefill(copied(args))
    for threads in (1, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(prefill(copied(args)), whole)


@on("cpu")
def test_overlapping_sequences_are_left_out_on_a_cpu(backend):
    """Compute and store what begins behind the rows before it, and nothing else."""
    args = ragged(sequences=[20, 40, 7, 20], heads=1)
    args[3] = ints([0, 20, 10, 67, 90])
    k_pages = args[4].clone()
    table = args[6].long()
    k_pages[table[0, 0]], k_pages[table[0, 1], :4] = args[1][:16], args[1][16:20]
    out = prefill(args)
    assert torch.equal(args[4], k_pages)
    torch.testing.assert_close(out[:20], causal(*args[:3], ints([0, 20])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 20, 10, 67, 87, 87],
        [5, 20, 60, 67, 87, 87],
        [0, 20, 60, 67, 87, 1000],
        [-3, 20, 60, 67, 87, 87],
        [0, 87, 0, 87, 0, 87],
        [-640, -640, 5, 60, -640, 70],
    ],
)
@pytest.mark.racing
@on(*TRITON)
def test_prefill_with_wrong_bounds_writes_no_other_memory(backend, bounds):
    args = ragged(sequences=[20, 40, 7, 20, 0], heads=1, device=backend.device)
    args[3] = ints(bounds, device=backend.device)
    memory = [torch.zeros(700, 1, 32, device=backend.device) for _ in range(2)]
    results = [x[300:387] for x in memory]
    results[0].copy_(args[0])
    args[0] = results[0]
    kernels.paged_prefill(*args, None, None, out=results[1])
    for x in memory:
        assert not x[:300].any() and not x[387:].any()
    assert torch.isfinite(results[1]).all()


@on("cpu", *TRITON)
def test_extreme_scores_of_prefill(backend):
    check_extreme_scores(prefill, prefill_reference, ragged(heads=1, device=backend.device))


@on(*TRITON, types="dtype")
def test_float8_pages(backend, dtype):
    check_float8(backend, prefill, prefill_reference, ragged(dtype, device=backend.device))
