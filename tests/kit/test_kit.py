"""The kit rejects every planted bug, and accepts what is right."""

import pytest
import torch

import clvp_fast
from tests.kit import POISON, Guarded, PagePool, assert_within_budget, queries_keys_values, random, strided
from tests.kit.backends import BACKENDS
from tests.kit.operators import opcheck

BATCH, LENGTH, HEADS, DIM, WIDTH = 2, 9, 3, 16, 5


def attend(q, k, v, weight, bias, bug=None):
    """Causal attention and a linear layer, `[B, T, H, D]` → `[B, T, WIDTH]`, with a bug to plant."""
    length = q.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
    if bug == "ignore q":
        scores = torch.zeros_like(scores)
    if bug == "forget the scale":
        scores = scores * DIM**0.5
    forbidden = torch.ones(length, length, dtype=torch.bool).triu(2 if bug == "mask off by one" else 1)
    weights = scores.masked_fill(forbidden, -torch.inf).softmax(-1)
    if bug == "wrong cast":
        weights = weights.to(torch.float16).to(weights.dtype)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2) @ weight.T
    if bug != "drop the bias":
        out = out + bias
    if bug == "one NaN":
        out[-1, -1, -1] = POISON
    if bug == "skip the last row":
        out[:, -1] = 0
    if bug == "one wrong element":
        out[0, 3, 1] *= 1.01
    if bug == "slightly off everywhere":
        out = out * (1 + 3e-6)
    return out


@pytest.fixture
def inputs():
    q, k, v = queries_keys_values(BATCH, LENGTH, LENGTH, HEADS, DIM, seed=0)
    weight, bias = random(WIDTH, HEADS * DIM, seed=3, scale=0.2), random(WIDTH, seed=4)
    return q, k, v, weight, bias


def test_right_is_accepted(inputs):
    reference = attend(*(x.double() for x in inputs))
    assert_within_budget(attend(*inputs), reference, attend(*inputs).clone())
    low = [x.bfloat16() for x in inputs]
    assert_within_budget(attend(*low), attend(*(x.double() for x in low)), attend(*low).clone())


BUGS = [
    "drop the bias",
    "ignore q",
    "forget the scale",
    "mask off by one",
    "skip the last row",
    "one NaN",
    "wrong cast",
    "one wrong element",
    "slightly off everywhere",
]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_rejected(inputs, bug):
    reference = attend(*(x.double() for x in inputs))
    with pytest.raises(AssertionError):
        assert_within_budget(attend(*inputs, bug=bug), reference, attend(*inputs))


def test_infinity_wrong_shape_and_wrong_dtype_are_rejected():
    reference = random(4, 5, seed=0, dtype=torch.float64)
    baseline = reference.float()
    infinite = baseline.clone()
    infinite[0, 0] = torch.inf
    for actual, message in (
        (infinite, "finite"),
        (baseline[:3].clone(), "shape"),
        (baseline.double().clone(), "dtype"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_within_budget(actual, reference, baseline)


def test_one_storage_under_two_names_is_refused():
    reference = random(4, 5, seed=0, dtype=torch.float64)
    with pytest.raises(AssertionError, match="one storage"):
        assert_within_budget(reference.view(4, 5), reference)
    baseline = reference.float()
    with pytest.raises(AssertionError, match="one storage"):
        assert_within_budget(baseline[:], reference, baseline)


def test_reference_lost_in_the_tolerance_is_refused():
    reference = random(64, seed=0, dtype=torch.float64)
    noisy = (reference + random(64, seed=1, dtype=torch.float64, scale=0.1)).float()
    with pytest.raises(AssertionError, match="a wrong result could pass"):
        assert_within_budget(torch.zeros(64), reference, noisy)


def test_the_message_names_the_worst_place():
    reference = random(4, 5, seed=0, dtype=torch.float64)
    actual = reference.float()
    actual[2, 3] += 1
    with pytest.raises(AssertionError, match=r"\[2, 3\]"):
        assert_within_budget(actual, reference)


def test_stale_output_is_rejected():
    out = Guarded(4, 3, dtype=torch.float32)
    out.tensor[:3] = 1.0
    with pytest.raises(AssertionError, match="not written"):
        out.check()
    out.tensor[3] = 1.0
    out.check()


@pytest.mark.parametrize("row", [1, 6])
def test_writing_outside_is_rejected(row):
    out = Guarded(4, 3, dtype=torch.float32)
    out.tensor.fill_(1.0)
    out._buffer[row] = 0.0
    with pytest.raises(AssertionError, match="outside"):
        out.check()


def test_strided_views_are_equal_and_surrounded_by_poison():
    x = random(3, 4, 6, seed=0)
    view = strided(x)
    assert torch.equal(view, x) and not view.is_contiguous() and view.storage_offset() > 0
    overrun = view.as_strided((3, 4, 7), view.stride(), view.storage_offset())
    assert overrun[..., 6].isnan().all()


def gather(pool, stored, row, length, bug=None):
    """Row `row` of a page pool, `[length, num_heads, head_dim]`, with a bug to plant."""
    size = pool.k.shape[1]
    places = torch.arange(length + (bug == "read past the length"))
    table = torch.arange(stored.table.shape[1]) if bug == "identity page table" else stored.table[row].long()
    slots = places % size
    if bug == "off by one slot":
        slots = (slots + 1) % size
    return pool.k[table[places // size], slots]


@pytest.mark.parametrize("bug", [None, "identity page table", "read past the length", "off by one slot"])
def test_pages(bug):
    pool = PagePool(12, 4, HEADS, DIM, seed=0)
    lengths = [5, 0, 4, 1, 7]
    stored = pool.store(lengths, room=1)

    def sums(bug=None):
        return torch.stack([gather(pool, stored, row, n, bug).sum(0) for row, n in enumerate(lengths)])

    reference = torch.stack([k.double().sum(0) for k in stored.k])
    if bug is None:
        assert_within_budget(sums(), reference, torch.stack([k.sum(0) for k in stored.k]))
        return
    with pytest.raises(AssertionError):
        assert_within_budget(sums(bug), reference, sums())


def test_sequences_of_one_pool_share_no_page():
    pool = PagePool(20, 4, 1, 2, seed=1)
    first, second = pool.store([9, 3], room=1), pool.store([8, 0, 2])
    owned = [first.table[0, :3], first.table[1, :1], second.table[0, :2], second.table[2, :1]]
    pages = torch.cat(owned).tolist()
    assert len(set(pages)) == len(pages) and pages != sorted(pages)
    assert not set(pages) & {int(first.table[0, -1]), int(second.table[0, -1])}


@pytest.mark.parametrize(
    ("backend", "dtype", "why"),
    [
        ("interpreted", torch.float64, "float32, float16 or bfloat16, not torch.float64"),
        ("cpu", torch.float32, "no kernel"),
    ],
)
def test_an_operator_that_takes_torch_s_path_is_not_checked_as_a_kernel(backend, dtype, why):
    backend = next(each for each in BACKENDS if each.name == backend)
    x, norm = random(3, 8, seed=0, dtype=dtype), (random(8, seed=1, dtype=dtype), None, 1e-5)
    with clvp_fast.backend(backend.forced), pytest.raises(AssertionError, match=why):
        opcheck(backend, torch.ops.clvp_fast.double_layer_norm.default, (x, *norm, *norm))
