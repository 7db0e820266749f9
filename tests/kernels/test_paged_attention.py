"""The kernels of paged attention: against float64 on pages dealt at random, full of poison, in any company."""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import paged_attention as kernels
from clvp_fast.ops import paged_attention_decode, paged_prefill
from clvp_fast.ops.paged_attention import FLOAT8, decode_reference, prefill_reference
from tests.kit import Guarded, PagePool, assert_within_budget, random, strided
from tests.kit.device import DEVICE, DTYPES, times

LENGTHS = [0, 1, 15, 16, 17, 33, 5, -1, 31, -3]  # own tokens before the step: page ± 1, none, inactive slots
PREFIX_LENS = [17, 1, 16, 0, 40]
PREFIX_INDEX = [0, 4, 4, -1, 0, 2, 3, 0, 1, -1]


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def step(
    dtype=torch.float32, lengths=LENGTHS, prefix_lens=PREFIX_LENS, index=PREFIX_INDEX, heads=2, dim=32, page=16, seed=0
):
    """A decode step's arguments (without prefixes if `prefix_lens` is None), in the order of the schema."""
    pool = PagePool(100, page, heads, dim, seed=seed, dtype=dtype, device=DEVICE)
    own = pool.store([max(n, 0) for n in lengths], room=1)
    n = len(lengths)
    q = random(n, heads, dim, seed=seed + 70, dtype=dtype, scale=2.0, device=DEVICE)
    new = [random(n, heads, dim, seed=seed + 71 + i, dtype=dtype, device=DEVICE) for i in range(2)]
    prefix = [None, None, None]
    if prefix_lens is not None:
        prefix = [pool.store(prefix_lens).table, ints(prefix_lens), ints(index[:n])]
    return [q, *new, pool.k, pool.v, own.table, ints(lengths), *prefix, dim**-0.5]


def ragged(dtype=torch.float32, sequences=(16, 0, 1, 33, 15, 17), heads=2, dim=32, page=16, seed=0):
    total = sum(sequences)
    pool = PagePool(200, page, heads, dim, seed=seed, dtype=dtype, device=DEVICE)
    table = pool.store([0] * len(sequences), room=max(sequences, default=0)).table
    q = random(total, heads, dim, seed=seed + 50, dtype=dtype, scale=2.0, device=DEVICE)
    k, v = (random(total, heads, dim, seed=seed + 51 + i, dtype=dtype, device=DEVICE) for i in range(2))
    return [q, k, v, ints([0, *sequences]).cumsum(0).int(), pool.k, pool.v, table, dim**-0.5]


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


def check(call, reference, args, pages_at, rows=slice(None), **options):
    """The result within the budget, and the pages written exactly as the reference writes them."""
    torch_args, exact = copied(args), copied(args, wide=True)
    expected = reference(*exact)
    with clvp_fast.backend("torch"):
        baseline = call(torch_args, **options)
    out = call(args, **options)
    assert_within_budget(out[rows], expected[rows], baseline[rows], times=times(out.dtype))
    for i in pages_at:
        assert torch.equal(args[i], exact[i].to(args[i].dtype))
    return out


def check_decode(args, **options):
    active = args[6] >= 0
    out = check(decode, decode_reference, args, (3, 4), active, **options)
    assert (out[~active] == 0).all()
    return out


def check_prefill(args):
    return check(prefill, prefill_reference, args, (4, 5))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype, prefix):
    check_decode(step(dtype, prefix_lens=PREFIX_LENS if prefix else None))


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_widths_and_pages_of_32(dtype, dim):
    check_decode(step(dtype, [31, 32, 33, 64], [65, 32], [1, 0, -1, 1], heads=1, dim=dim, page=32))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_in_parts(dtype, prefix, monkeypatch):
    """Keys of one candidate in several programs: parts that are full, begun, empty, or hold the new token alone."""
    monkeypatch.setattr(kernels, "SPLIT", 64)
    lengths = [150, 63, 64, 65, 127, 128, 0, -1]
    check_decode(step(dtype, lengths, [129, 64, 0] if prefix else None, [0, 1, 2, -1, 0, 0, 1, 0], heads=1))


def test_decode_in_the_parts_that_ship():
    assert kernels.parts(608, 416) == 5 and kernels.parts(256, 0) == 1 and kernels.parts(0, 16) == 2
    check_decode(step(lengths=[300, 255, 256], prefix_lens=[260], index=[0, 0, -1], heads=1))


def test_decode_of_more_candidates_than_a_tile():
    """Requests in any order, on both sides of the border between two tiles of 16 candidates."""
    index = [2, 0, 1, 1, -1, 0, 2, 2, 0, 1, 0, 0, -1, 2, 1, 0, 0, 2, 1]
    check_decode(step(lengths=[i % 3 - (i == 5) * 9 for i in range(19)], prefix_lens=[5, 33, 17], index=index, heads=1))


@pytest.mark.skipif(DEVICE == "cpu", reason="too many programs for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_many_programs_at_once(dtype):
    """The decoder's own shape: parts of a candidate end on different multiprocessors, in any order."""
    candidates, heads, dim, page, own, prompt = 256, 16, 64, 16, 38, 26
    dealt = torch.randperm(candidates * own + 4 * prompt, device=DEVICE).int()
    shape = len(dealt), page, heads, dim
    pages = [random(*shape, seed=i, dtype=dtype, device=DEVICE) for i in range(2)]
    rows = [random(candidates, heads, dim, seed=2 + i, dtype=dtype, device=DEVICE) for i in range(3)]
    lengths = torch.randint(-5, own * page, (candidates,), device=DEVICE).clamp(-1).int()
    prefix = (
        dealt[: 4 * prompt].view(4, prompt),
        ints([60, 410, 0, 257]),
        ints([i * 7 % 5 - 1 for i in range(candidates)]),
    )
    args = [2 * rows[0], *rows[1:], *pages, dealt[4 * prompt :].view(candidates, own), lengths, *prefix, dim**-0.5]
    first = check_decode(copied(args))
    for _ in range(50):
        assert torch.equal(decode(copied(args)), first)


def launch(args, parts_of=kernels.parts):
    """The launcher itself, on guarded results and poisoned workspaces."""
    q, k_pages, block_table, prefix_table = args[0], args[3], args[5], args[7]
    own, prefix = (0 if table is None else table.shape[1] * k_pages.shape[1] for table in (block_table, prefix_table))
    guarded = Guarded(*q.shape, dtype=q.dtype, device=DEVICE)
    room = q.shape[0] * q.shape[1] * parts_of(own, prefix)
    partial = Guarded(room, q.shape[2] + 2, dtype=torch.float32, device=DEVICE)
    arrivals = torch.zeros(q.shape[:2], dtype=torch.int32, device=DEVICE)
    kernels.paged_attention_decode(*args, None, None, out=guarded.tensor, partial=partial.tensor, arrivals=arrivals)
    guarded.check()
    assert not arrivals.any(), "the counters are not back at zero"
    around = torch.cat((partial._buffer[:2], partial._buffer[-2:]))
    assert around.isnan().all(), "the workspace is written outside its rows"
    return guarded.tensor


def poison_unused(args):
    """NaN in every slot that holds no token, and wild table entries where no page is in use."""
    k_pages, v_pages, table, lengths, prefix_table, prefix_lens = args[3:9]
    used = torch.zeros(k_pages.shape[:2], dtype=torch.bool, device=DEVICE)
    for owner_table, owner_lengths, room in ((table, lengths, 1), (prefix_table, prefix_lens, 0)):
        for row, length in enumerate(owner_lengths.tolist()):
            for place in range(length):
                used[owner_table[row, place // 16], place % 16] = True
            owner_table[row, -(-max(length + room, 0) // 16) :] = 2**30
    for pages in (k_pages, v_pages):
        pages[~used] = float("nan")


@pytest.mark.parametrize("split", [256, 64])
def test_decode_reads_and_writes_nothing_else(split, monkeypatch):
    monkeypatch.setattr(kernels, "SPLIT", split)
    args = step(lengths=LENGTHS[:-1] + [70], heads=1)
    expected = decode(copied(args))
    poison_unused(args)
    assert torch.equal(launch(args), expected)


def test_decode_of_strided_arguments():
    args = step(lengths=LENGTHS[3:8])
    expected = decode(copied(args))
    given = [strided(x) if isinstance(x, torch.Tensor) else x for x in args]
    assert torch.equal(decode(given), expected)
    some = [strided(x) if i in (0, 2, 7) else x for i, x in enumerate(copied(args))]
    assert torch.equal(decode(some), expected)
    scattered = [
        x.transpose(0, -1).contiguous().transpose(0, -1) if i in (0, 1, 2, 5, 7) else x for i, x in enumerate(args)
    ]
    assert scattered[0].stride(-1) != 1 and torch.equal(decode(scattered), expected)


@pytest.mark.parametrize("call", [decode, prefill])
def test_extreme_scores(call):
    """Scores of ±1e4 and constant rows: no overflow, and the weight goes where it belongs."""
    args = step(heads=1) if call is decode else ragged(heads=1)
    args[0] *= 1e4
    args[0][3:5] = 0.0
    reference = (decode_reference if call is decode else prefill_reference)(*copied(args, wide=True))
    torch.testing.assert_close(call(args).double(), reference, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_candidate_has_the_same_bits_alone_and_in_any_company(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "SPLIT", 64)
    lengths = [70, 3, -1, 64, 0, 128, 17, 5, 1, 33, 2, 15, 16, 40, 0, 63, 65]
    index = [0, 1, 0, 2, 0, 1, 1, -1, 2, 0, 0, 1, 2, 0, 1, 0, 2]
    args = step(dtype, lengths, [65, 7, 64], index, heads=1)
    whole = decode(copied(args))
    assert torch.equal(decode(copied(args)), whole), "twice the same input"
    rows_at = (0, 1, 2, 5, 6, 9)
    for rows in ([16], [3], [5, 16, 2, 0, 11, 9]):
        part = [x[rows] if i in rows_at else x for i, x in enumerate(copied(args))]
        assert torch.equal(decode(part), whole[rows])


def test_a_request_that_is_not_a_number_spoils_no_other():
    args = step(lengths=[3, 4, 5, 20], prefix_lens=[17, 20], index=[0, 1, 0, 1], heads=1)
    expected = decode(copied(args))
    args[3][args[7][0, 1].long(), 0] = float("nan")
    args[4][args[7][0, 0].long(), 3] = float("inf")
    args[0][1] = float("nan")
    out = decode(args)
    assert torch.equal(out[3], expected[3]) and not torch.isfinite(out[:3]).all(-1).any()


def test_what_does_not_exist_is_left_out():
    """Pages, requests and lengths out of range touch no memory, and no other candidate."""
    args = step(lengths=[20, 20, 20, 20, 20, 20], prefix_lens=[20, 1000, 5], index=[0, 0, 7, -9, 1, 2], heads=1)
    expected, before = decode(copied(args)), args[3].clone()
    guarded = []
    for i in (3, 4):
        guarded.append(Guarded(*args[i].shape, dtype=torch.float32, device=DEVICE))
        guarded[-1].tensor.copy_(args[i])
        args[i] = guarded[-1].tensor
    table, lengths, prefix_table = args[5], args[6], args[7]
    table[0, 1] = 2**30  # where the new token belongs
    table[1, 0] = -1
    lengths[2] = 2**30  # past the table: its new token has no place
    lengths[3] = table.shape[1] * 16
    prefix_table[2, 0] = 100
    written = table[[1, 4, 5], 1].long()
    out = decode(args)
    assert torch.isfinite(out).all()
    assert torch.equal(out[4], expected[4]) and not torch.equal(out[5], expected[5])
    changed = (args[3] != before).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(changed, written.sort().values)
    for memory in guarded:
        memory.check("pages")


def test_an_unknown_request_is_none():
    """Even where the memory around the tables would do as a prefix."""
    args = step(lengths=[3, 4, 5], prefix_lens=[20] * 9, index=[-1, 4, -1], heads=1)
    args[7], args[8] = args[7][3:6], args[8][3:6]
    args[9] = ints([-1, 1, -1])
    expected = decode(copied(args))
    args[9] = ints([-3, 1, 3])
    assert torch.equal(decode(args), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill(dtype):
    check_prefill(ragged(dtype))


@pytest.mark.parametrize("dim, page", [(64, 16), (80, 32), (96, 32), (128, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_of_several_tiles(dtype, dim, page):
    check_prefill(ragged(dtype, (63, 64, 130, 0, 0, 65), heads=1, dim=dim, page=page))


def test_prefill_of_many_sequences():
    """More than one round of the search for a program's sequence."""
    check_prefill(ragged(sequences=[0] * 120 + [2, 0, 1] + [0] * 20 + [3, 0], heads=1))


def test_prefill_writes_all_of_the_result_and_its_own_slots_alone():
    args = ragged()
    exact = copied(args, wide=True)
    expected = prefill_reference(*exact)
    given = [strided(x) if isinstance(x, torch.Tensor) and i != 1 else x for i, x in enumerate(args)]
    out = Guarded(*args[0].shape, dtype=torch.float32, device=DEVICE)
    kernels.paged_prefill(*given, None, None, out=out.tensor)
    out.check()
    assert torch.equal(given[4].double(), exact[4]) and torch.equal(given[5].double(), exact[5])
    assert_within_budget(out.tensor, expected, prefill(args))


def test_a_sequence_has_the_same_bits_alone_and_in_any_company():
    args = ragged(sequences=[5, 70, 0, 1, 66, *[2] * 12], heads=1)
    whole = prefill(copied(args))
    assert torch.equal(prefill(copied(args)), whole)
    bounds = args[3].tolist()
    for row in (1, 4):
        rows = slice(bounds[row], bounds[row + 1])
        alone = [*(x[rows] for x in args[:3]), ints([0, rows.stop - rows.start]), *args[4:6], args[6][row : row + 1]]
        assert torch.equal(prefill([*alone, args[-1]]), whole[rows])


def test_prefill_leaves_out_what_does_not_exist():
    args = ragged(sequences=[20, 40, 7, 20], heads=1)
    expected = prefill(copied(args))
    args[6] = args[6][:, :2].contiguous()  # 32 slots for 40 tokens; what follows is the next row's page
    args[6][0, 1], args[6][3, 1] = 2**30, -1
    before, k, table = args[4].clone(), args[1], args[6].long()
    before[table[0, 0]], before[table[3, 0]] = k[:16], k[67:83]
    before[table[1, 0]], before[table[1, 1]] = k[20:36], k[36:52]
    before[table[2, 0], :7] = k[60:67]
    assert torch.equal(prefill(args), expected)
    assert torch.equal(args[4], before)


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
def test_prefill_with_wrong_bounds_writes_no_other_memory(bounds):
    args = ragged(sequences=[20, 40, 7, 20, 0], heads=1)
    args[3] = ints(bounds)
    memory = [torch.zeros(700, 1, 32, device=DEVICE) for _ in range(2)]
    results = [x[300:387] for x in memory]
    results[0].copy_(args[0])
    args[0] = results[0]
    kernels.paged_prefill(*args, None, None, out=results[1])
    for x in memory:
        assert not x[:300].any() and not x[387:].any()
    assert torch.isfinite(results[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_then_decode_is_attention_over_all(dtype):
    total, prompt, candidates, heads, dim = 26, 23, 3, 1, 32
    pool = PagePool(20, 16, heads, dim, seed=0, dtype=dtype, device=DEVICE)
    prompt_table = pool.store([0], room=prompt).table
    own = pool.store([0] * candidates, room=total - prompt).table
    q, k, v = (random(candidates, total, heads, dim, seed=i, scale=1.5, dtype=dtype, device=DEVICE) for i in range(3))
    q[:, :prompt], k[:, :prompt], v[:, :prompt] = q[:1, :prompt], k[:1, :prompt], v[:1, :prompt]
    bounds = ints([0, prompt])
    out = paged_prefill(q[0, :prompt], k[0, :prompt], v[0, :prompt], bounds, pool.k, pool.v, prompt_table)
    outputs = [out.expand(candidates, prompt, heads, dim)]
    for place in range(prompt, total):
        new = (x[:, place] for x in (q, k, v))
        prefix = dict(prefix_table=prompt_table, prefix_lens=bounds[1:], prefix_index=ints([0] * candidates))
        out = paged_attention_decode(*new, pool.k, pool.v, own, ints([place - prompt] * candidates), **prefix)
        outputs.append(out[:, None])
    with clvp_fast.backend("torch"):
        attend = clvp_fast.ops.rotary_attention
        reference, baseline = attend(q.double(), k.double(), v.double(), causal=True), attend(q, k, v, causal=True)
    assert_within_budget(torch.cat(outputs, 1), reference, baseline, times=times(q.dtype))


def float8(args, scales):
    """The same arguments with pages of float8. The interpreter rounds wrongly to that type (a carry into the exponent
    is lost), so there the new keys and values need no rounding."""
    args = list(args)
    new, pages = ((1, 2), (3, 4)) if len(args) == 11 else ((1, 2), (4, 5))
    for i, j, scale in zip(new, pages, scales, strict=True):
        args[j] = (args[j].float() / scale[:, None]).clamp(-448, 448).to(FLOAT8)
        if DEVICE == "cpu":
            args[i] = ((args[i].float() / scale[:, None]).to(FLOAT8).float() * scale[:, None]).to(args[i].dtype)
        args[i][0, 0, :2] = 1e4  # more than a page can hold
    return args, pages


@pytest.mark.parametrize("call, reference", [(decode, decode_reference), (prefill, prefill_reference)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_pages(dtype, call, reference):
    scales = [torch.tensor(x, device=DEVICE) for x in ([0.25, 2.0], [0.5, 0.125])]
    options = dict(zip(("k_scale", "v_scale"), scales, strict=True))
    args, pages = float8(step(dtype) if call is decode else ragged(dtype), scales)
    exact = [args[i].clone() if i in pages else x for i, x in enumerate(copied(args, wide=True))]
    rows = args[6] >= 0 if call is decode else slice(None)
    torch_args, expected = copied(args), reference(*exact, *scales)
    with clvp_fast.backend("torch"):
        baseline = call(torch_args, **options)
    assert_within_budget(call(args, **options)[rows], expected[rows], baseline[rows], times=times(dtype))
    for i in pages:
        assert torch.equal(args[i].view(torch.uint8), exact[i].view(torch.uint8))
        assert torch.equal(torch_args[i].view(torch.uint8), exact[i].view(torch.uint8))


def test_nobody():
    args = step(lengths=[-1, -1])
    before = args[3].clone()
    assert not decode(args).any() and torch.equal(args[3], before)
    assert decode([x[:0] if i in (0, 1, 2, 5, 6, 9) else x for i, x in enumerate(args)]).shape == (0, 2, 32)
    assert prefill(ragged(sequences=[0, 0])).shape == (0, 2, 32)


def test_registered():
    args = step(lengths=[3, -1, 16], heads=1)
    arrivals = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.clvp_fast.paged_attention_decode.default
    torch.library.opcheck(op, (*args, None, None, arrivals), test_utils=checks)
    torch.library.opcheck(op, step(lengths=[3], prefix_lens=None, heads=1), test_utils=checks)
    torch.library.opcheck(
        torch.ops.clvp_fast.paged_prefill.default, ragged(sequences=[3, 17], heads=1), test_utils=checks
    )


def test_what_the_kernel_does_not_serve_is_said():
    args = step(heads=1)

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
