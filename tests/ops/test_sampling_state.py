"""`sample`: its state and memory, logits without an answer, threads, registration, errors."""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import sampling
from clvp_fast.ops import sample
from clvp_fast.ops.binding import Scratch
from clvp_fast.ops.sampling import _OPERATOR, Slots, bind_sample
from tests.kit import random, strided
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck
from tests.ops.test_sampling import ALL, EVERY, KERNELS, PAD, STOP, TORTOISE, check, draw, marked, state


@on("torch", *KERNELS)
def test_extreme_logits(backend):
    logits = random(4, 97, seed=9, device=backend.device)
    logits[0] *= 1e4
    logits[1] -= 1e4
    logits[2, :90] = -torch.inf
    logits[3] = torch.linspace(-300, 300, 97)
    check(logits, [3, 90], **TORTOISE)
    check(logits, [3, 90], typical_p=0.7, repetition_penalty=1.2)
    check(torch.stack((logits[2], -logits[2].nan_to_num(neginf=0.0))), top_k=30)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@on(*KERNELS)
def test_rows_without_an_answer_stay_inside(backend):
    """NaN, or nothing but -inf: some token, nothing written elsewhere, the neighbours undisturbed."""
    logits = random(4, 97, seed=10, device=backend.device)
    logits[1], logits[2, 50], logits[3] = -torch.inf, torch.nan, torch.nan
    for settings in ({}, {"do_sample": False}, ALL):
        states = state(4, 97, device=backend.device)
        tokens = draw(logits, states, **settings)
        assert ((tokens >= 0) & (tokens < 97)).all()
        assert tokens[0] == draw(logits[:1], **settings)[0] and states[1].tolist() == [1] * 4


@on(*EVERY)
def test_state_is_updated_in_place(backend):
    """Update state at strides, and nothing beside it."""
    device, wanted = backend.device, [0, 31, 32, 63, STOP, 95, 64, 50]
    logits = torch.full((8, 97), -50.0, device=device)
    logits[torch.arange(8), torch.tensor(wanted)] = 50.0
    seen, lengths, done = state(8, 97, [5], device)
    lengths += 4
    done[6:] = True
    before = seen.clone()
    wide = torch.full((8, 9), 2**30, dtype=torch.int32, device=device)
    wide[:, 1:9:2] = seen
    seen, pair = wide[:, 1:9:2], torch.full((8, 3), 9, device=device)
    pair[:, 1], lengths = lengths, pair[:, 1]
    flags = torch.ones(8, 2, dtype=torch.bool, device=device)
    flags[:, 0], done = done, flags[:, 0]
    tokens = draw(strided(logits), (seen, lengths, done), min_p=0.1, repetition_penalty=1.1)
    assert tokens.tolist() == [*wanted[:6], PAD, PAD]
    assert lengths.tolist() == [5] * 6 + [4] * 2
    assert done.tolist() == [False] * 4 + [True, False, True, True]
    for n in range(8):
        assert marked(seen[n]) == ({5, wanted[n]} if n < 6 else {5})
    assert torch.equal(seen[6:], before[6:])
    assert (wide[:, ::2] == 2**30).all() and (pair[:, ::2] == 9).all() and flags[:, 1].all()


def slots_of(device):
    """Return nine rows' tokens, and their slots: done, with another stop token, at their limits, and none of these."""
    wanted = [7, 0, 31, 96, 5, 5, 40, 41, 42]
    logits = torch.full((9, 97), -50.0)
    logits[torch.arange(9), torch.tensor(wanted)] = 50.0
    stop = torch.tensor([7, 1, 31, 8, 5, 6, 8, 8, 8])
    limit = torch.tensor([9, 9, 9, 9, 5, 5, 5, 6, 4])
    token = torch.full((9,), 77)
    seq_lens = torch.tensor([-1, 4, 4, -3, 4, 4, 4, 4, 4], dtype=torch.int32)
    return logits.to(device), Slots(*(x.to(device) for x in (stop, limit, token, seq_lens)))


@pytest.mark.parametrize("settings", [{}, TORTOISE, {"do_sample": False}], ids=["drawn", "tortoise", "greedy"])
@on(*EVERY)
def test_slots(backend, settings):
    """Take what is done from `seq_lens` alone, and leave what the next step begins with, and nothing beside it."""
    logits, slots = slots_of(backend.device)
    seen, lengths, _ = state(9, 97, [11], backend.device)
    lengths = lengths.long() + 4
    flags = torch.full((2, 9), 2, dtype=torch.int64, device=backend.device)
    flags[0] = torch.tensor([0, 1] * 4 + [1])
    done = flags[0].view(torch.bool)[::8]
    numbers = {name: torch.arange(9, device=backend.device) for name in ("seed", "candidate")}
    settings = {
        name: torch.full((9,), value, dtype=torch.float64, device=backend.device) if name != "do_sample" else value
        for name, value in settings.items()
    }
    out = torch.full((9,), -7, device=backend.device)
    bind_sample(
        out, Scratch(9, backend.device), logits, seen, lengths, done, **numbers, step=lengths, stop_token=0,
        pad_token=-1, **settings, slots=slots,
    )()  # fmt: skip
    assert out.tolist() == [-1, 0, 31, -1, 5, 5, 40, 41, 42]
    assert lengths.tolist() == [4, 5, 5, 4, 5, 5, 5, 5, 5]
    assert flags[0].tolist() == [1, 0, 1, 1, 1, 1, 1, 0, 1] and (flags[1] == 2).all()
    assert slots.token.tolist() == [0, 0, 31, 0, 5, 5, 40, 41, 42]
    assert slots.seq_lens.tolist() == [-1, 5, -1, -1, -1, -1, -1, 5, -1]
    for row, token in enumerate(out.tolist()):
        assert marked(seen[row]) == ({11, token} if token >= 0 else {11})


@on(*TRITON)
def test_memory_around_the_row_and_the_results(backend):
    device, tokens = backend.device, list(range(40, 120))
    logits, numbers = random(3, 130, seed=11, scale=2.0, device=device), torch.arange(3, device=device)
    expected = draw(logits, seen=tokens, seed=1, step=2, top_k=9, repetition_penalty=4.0)
    buffer = torch.full((7,), -5, device=device)
    seen, lengths, done = state(3, 130, tokens, device)
    seen = seen.T.contiguous().T
    parameters = (None, torch.full((3,), 9, device=device), None, None, None, torch.full((3,), 4.0, device=device))
    fixed = torch.full_like(numbers, 1), numbers, torch.full_like(numbers, 2)
    states = (seen, lengths, done)
    sampling.sample(strided(logits), *states, *parameters, *fixed, STOP, PAD, True, None, out=buffer[2:5])
    assert torch.equal(buffer[2:5], expected) and (buffer[:2] == -5).all() and (buffer[5:] == -5).all()


@on("default", *KERNELS)
def test_registered(backend):
    count, device = 6 if backend.name == "default" else 1, backend.device
    logits, rows = random(count, 97, seed=0, device=device), torch.arange(count, device=device)
    op = torch.ops.clvp_fast.sample.default
    floats = [torch.full((count,), x, dtype=torch.float64, device=device) for x in (0.8, 0.9, 0.8, 0.01, 1.5)]
    marks = state(count, 97, [4], device)
    args = (logits, *marks, floats[0], rows + 3, *floats[1:], rows, rows, rows, STOP, PAD, True)
    none = [None] * 4
    opcheck(backend, op, (*args, None, *none))
    opcheck(backend, op, (*args, rows > count // 2, *none))
    stored = torch.zeros(count, dtype=torch.int32, device=device)
    opcheck(backend, op, (*args, None, rows, rows, rows.clone(), stored))
    empty = state(count, 97, device=device)
    opcheck(backend, op, (logits, *empty, *[None] * 6, rows, rows, rows, STOP, PAD, False, None, *none))
    assert draw(logits[:0]).shape == (0,)
    rows = random(3, 97, seed=0, device=device)
    assert torch.equal(draw(rows.T.contiguous().T), draw(rows))


def test_compiled():
    logits, whole = random(6, 97, seed=0), torch.arange(6)
    given = {"top_p": 0.9, "repetition_penalty": 2.0, "seed": 3, "stop_token": STOP, "pad_token": PAD}
    given["do_sample"] = whole > 2

    def run(logits, *states, candidate, step):
        return sample(logits, *states, candidate=candidate, step=step, **given)

    ours, theirs = state(6, 97, [4]), state(6, 97, [4])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(logits, *ours, candidate=whole, step=whole), run(logits, *theirs, candidate=whole, step=whole)
    )
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


@on("cpu")
def test_threads_change_no_token(backend, monkeypatch):
    logits, drawn = random(9, 300, seed=3, scale=2.0), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        drawn.append(draw(logits, **ALL))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@on("cpu")
def test_float64_is_torch_s(backend):
    logits = random(3, 97, seed=4, dtype=torch.float64)
    _OPERATOR._warned.clear()
    with (
        clvp_fast.backend(None),
        pytest.warns(UserWarning, match="slower torch path: logits must be float32, float16 or bfloat16"),
    ):
        assert _OPERATOR.choose((logits, *state(3, 97))) is _OPERATOR.torch


@on(*TRITON)
def test_unserved_arguments_are_named(backend):
    for logits, message in (
        (torch.zeros(2, 97, dtype=torch.float64), "float32, float16 or bfloat16, not torch.float64"),
        (torch.zeros(1, 16385), "1 to 16384 tokens, not 16385"),
    ):
        with clvp_fast.backend("triton"), pytest.raises(RuntimeError, match=message):
            draw(logits.to(backend.device))


def test_bad_arguments_are_named():
    logits, (seen, lengths, done) = random(4, 97, seed=0), state(4, 97)
    good = {"seed": 0, "candidate": 0, "step": 0, "stop_token": STOP, "pad_token": PAD}
    cases = [
        ((logits[0], seen, lengths, done), {}, ValueError, "logits must have shape"),
        ((logits, seen[:, :3], lengths, done), {}, ValueError, r"seen must have shape \[4, 4\], not \[4, 3\]"),
        ((logits, seen.long(), lengths, done), {}, TypeError, "seen must be torch.int32"),
        ((logits, seen, lengths[1:], done), {}, ValueError, "lengths must have shape"),
        ((logits, seen, lengths, done.int()), {}, TypeError, "done must be torch.bool"),
        ((logits, seen, lengths, done.to("meta")), {}, ValueError, "done is on meta and logits on cpu"),
        (
            (logits, seen, lengths, done),
            {"temperature": 0.0},
            ValueError,
            r"temperature must be above 0 .*do_sample=False",
        ),
        ((logits, seen, lengths, done), {"top_k": 1.5}, ValueError, "top_k must be a whole number"),
        ((logits, seen, lengths, done), {"top_p": 1.1}, ValueError, "top_p must be from 0 to 1, not 1.1"),
        ((logits, seen, lengths, done), {"typical_p": 0}, ValueError, "typical_p must be above 0"),
        ((logits, seen, lengths, done), {"min_p": -1}, ValueError, "min_p must be from 0 to 1"),
        ((logits, seen, lengths, done), {"repetition_penalty": 0}, ValueError, "repetition_penalty must be above 0"),
        ((logits, seen, lengths, done), {"top_p": torch.ones(3)}, ValueError, "top_p must have shape"),
        ((logits, seen, lengths, done), {"step": torch.ones(4)}, TypeError, "step must be int64"),
        ((logits, seen, lengths, done), {"do_sample": torch.ones(4)}, TypeError, "do_sample must be torch.bool"),
        ((logits, seen, lengths, done), {"do_sample": done[1:]}, ValueError, r"do_sample must have shape \[4\]"),
        ((logits, seen, lengths, done), {"do_sample": done.to("meta")}, ValueError, "do_sample is on meta"),
    ]
    for given, change, error, message in cases:
        with pytest.raises(error, match=message):
            sample(*given, **good | change)
