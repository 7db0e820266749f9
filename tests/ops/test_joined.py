"""Kernels that one call of the native library runs: what they compute, which are joined, and what is refused."""

import pytest
import torch

from clvp_fast import native
from clvp_fast.ops.binding import Scratch
from clvp_fast.ops.linear import bind_linear
from clvp_fast.ops.norm import bind_add_norm
from tests.kit import random
from tests.kit.isa import needs

pytestmark = needs("linear")


def chain(rows, count=5):
    """Bind a norm and a product of what it wrote, and so on; return the calls, and all that they write."""
    x, weight, scale = random(rows, 64, seed=1), random(64, 64, seed=2), random(64, seed=3)
    calls, written = [], []
    for _ in range(count):
        normed, out = torch.zeros(rows, 64), torch.zeros(rows, 64)
        calls.append(bind_add_norm((None, normed), Scratch(rows, "cpu"), x, weight=scale, eps=1e-5, kind="layer"))
        calls.append(bind_linear(out, Scratch(rows, "cpu"), normed, weight, always=True))
        written += [normed, out]
        x = out
    return calls, written


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_results_have_the_bits_of_single_calls(rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    calls, written = chain(rows)
    for call in calls:
        call()
    expected = [x.clone() for x in written]
    assert expected[-1].abs().min() > 0
    (together,) = native.joined(calls)
    assert isinstance(together, native.Joined) and list(together.kernels) == calls
    for _ in range(20):  # a thread that does not wait for the others is not always seen
        for x in written:
            x.fill_(torch.nan)
        together()
        assert all(map(torch.equal, written, expected))


def test_only_neighbours_with_as_many_threads_are_joined(monkeypatch):
    calls, written = chain(3, 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    others, _ = chain(3, 1)
    seen = []
    found = native.joined([*calls[:2], lambda: seen.append(written[1].clone()), *calls[2:], *others, print, print])
    shown = [type(call).__name__ for call in found]
    joined = "Joined"
    assert shown == [joined, "function", joined, joined, *2 * ["builtin_function_or_method"]]
    assert [len(call.kernels) for call in found if isinstance(call, native.Joined)] == [2, 2, 2]
    for call in found[:3]:
        call()
    assert torch.equal(seen[0], written[1]) and written[3].abs().min() > 0


def test_a_list_with_a_refused_call_computes_nothing():
    calls, written = chain(3, 2)
    (together,) = native.joined(calls)
    calls[-1].call.rows = -1
    with pytest.raises(RuntimeError, match="size, stride, floor or number of threads is out of range"):
        together()
    assert not any(x.any() for x in written)
