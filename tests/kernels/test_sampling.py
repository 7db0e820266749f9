"""`sample` as a kernel: token for token the reference, ties included; its distribution; its state and memory.

The interpreter takes 20 ms for a row and 0.2 s for a threshold, whatever the vocabulary: few rows, but every token of
them is compared.
"""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import sampling
from clvp_fast.ops.sampling import sample
from clvp_fast.ops.sampling_torch import philox, row_scores
from tests.kernels.device import DEVICE, DTYPES
from tests.kit import random, strided

STOP, PAD = 3, 96
ROWS = 3 if DEVICE == "cpu" else 512
TORTOISE = {"temperature": 0.8, "top_p": 0.8, "repetition_penalty": 2.0}
ALL = {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.3}
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 0.01},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.6},
    {"typical_p": 0.01},
    {"repetition_penalty": 2.0},
    {"repetition_penalty": 0.5},
    {"top_k": 20, "typical_p": 0.5},
    TORTOISE,
    ALL,
]


def state(count, vocab_size, seen=()):
    """An empty state in which the tokens `seen` are marked in every row."""
    bitmap = torch.zeros(count, -(-vocab_size // 32), dtype=torch.int32)
    for token in seen:
        bitmap[:, token // 32] |= torch.tensor(1, dtype=torch.int32) << (token % 32)
    empty = torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.bool)
    return tuple(x.to(DEVICE) for x in (bitmap, *empty))


def draw(logits, states=None, **settings):
    given = {"seed": 2**63 + 12345, "candidate": torch.arange(len(logits), device=DEVICE), "step": 7}
    given |= {"stop_token": STOP, "pad_token": PAD} | settings
    return sample(logits, *(states or state(*logits.shape)), **given)


def check(logits, seen=(), **settings):
    """Tokens and states are the reference's."""
    ours, theirs = (state(*logits.shape, seen) for _ in range(2))
    tokens = draw(logits, ours, **settings)
    with clvp_fast.backend("reference"):
        expected = draw(logits, theirs, **settings)
    assert torch.equal(tokens, expected)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(mine, wanted)
    return tokens


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_of_the_reference(settings):
    logits = random(ROWS, 97, seed=1, scale=2.0, device=DEVICE)
    check(logits, [1, 31, 32, 63, 96], **settings)


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 33, 64, 130, 144, 145, 300, 1025, 8194])
@pytest.mark.parametrize("settings", [TORTOISE, ALL], ids=["tortoise", "all"])
def test_vocabularies(vocab_size, settings):
    """Powers of two, a little above one (two tiles), and others."""
    logits = random(2, vocab_size, seed=2, scale=2.0, device=DEVICE)
    logits[:, -1] += 4.0  # the last token is drawn often enough
    check(logits, [0, vocab_size - 1], **settings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    logits = random(ROWS, 97, seed=3, scale=3.0, dtype=dtype, device=DEVICE)
    assert torch.equal(check(logits, [5, 6], **TORTOISE), draw(logits.float(), state(ROWS, 97, [5, 6]), **TORTOISE))


TIED = [{"top_p": p} for p in (0.71, 0.33, 0.09, 0.0)] + [{"top_k": 7}, {"typical_p": 0.4}, {"top_k": 9, "top_p": 0.57}]


@pytest.mark.parametrize("settings", TIED, ids=str)
def test_ties_are_broken_as_a_stable_sort_does(settings):
    """Logits of a few values: of equal ones top-p keeps the last tokens, top-k and typical-p all."""
    logits = (random(ROWS, 130, seed=4, scale=1.5) * 1.5).round() / 1.5
    logits[:, 128] = logits[:, 5] = logits[:, 60] = 1.0
    logits[:2, 7] = logits[:2, 70] = logits[1, 128] = 6.0
    check(logits.to(DEVICE), **settings)


@pytest.mark.parametrize("top_p", [0.0, 1e-7, 0.0049, 0.305, 0.705])
def test_equal_logits(top_p):
    """Every token is a tie: 1 - top_p of them go, the first ones; one stays."""
    logits = torch.full((4, 100), -2.5, device=DEVICE)
    tokens = check(logits, top_p=torch.full((4,), top_p, device=DEVICE))
    assert tokens.min() >= (99 if top_p < 0.01 else 100 - round(100 * top_p + 0.5))


def test_a_mass_exactly_at_the_bound_is_removed():
    """Weights 1/2, 1/2 and 1, of which top-p 1/2 keeps the last alone."""
    logits = torch.tensor([[0.0, -0.6931472, -torch.inf, -0.6931472]], device=DEVICE).expand(6, -1)
    assert check(logits, top_p=0.5).tolist() == [0] * 6


@pytest.mark.parametrize("vocab_size", [97, 130])
def test_greedy(vocab_size):
    logits = random(5, vocab_size, seed=5, scale=2.0, device=DEVICE)
    logits[0, 7:9] = 50.0  # equal ones: the first
    logits[1, -2] = 50.0
    logits[2, 0] = logits[2, -1] = 50.0
    logits[3] = -torch.inf
    logits[3, 33] = -1e30
    seen = list(range(1, vocab_size - 1, 3))
    tokens = check(logits, seen, repetition_penalty=3.0, temperature=0.5, top_k=2, do_sample=False)
    assert tokens[0] == (8 if 7 in seen else 7) and tokens[1] == vocab_size - 2 and tokens[2] == 0 and tokens[3] == 33


@pytest.mark.parametrize("settings", [{}, TORTOISE, ALL], ids=["none", "tortoise", "all"])
def test_some_rows_are_greedy(settings):
    """They take the first of the largest penalised scores, and no other setting of theirs has a say."""
    logits, seen = random(7, 130, seed=12, scale=2.0, device=DEVICE), [1, 31, 32, 129]
    logits[0, 7:9] = logits[2, 128] = logits[2, 60] = 50.0
    flags = torch.zeros(7, 3, dtype=torch.bool, device=DEVICE)
    flags[:, 0], flags[:, 2] = True, True
    flags[1::2, 1] = True
    sampled = flags[:, 1]  # at a stride
    columns = {}
    for name, value in (NEUTRAL | settings).items():
        dtype = torch.int64 if name == "top_k" else torch.float64
        columns[name] = torch.full((7,), value, dtype=dtype, device=DEVICE)
    if settings:
        columns["temperature"][~sampled] = 1e-44  # which would make all of them infinite
        columns["top_k"][~sampled] = 1
    tokens = check(logits, seen, do_sample=sampled, **columns)
    penalty = settings.get("repetition_penalty", 1.0)
    greedy = draw(logits, state(7, 130, seen), do_sample=False, repetition_penalty=penalty)
    drawn = draw(logits, state(7, 130, seen), **settings)
    assert torch.equal(tokens, torch.where(sampled, drawn, greedy))
    assert tokens[0] == 7 and tokens[2] == 60 and (drawn != greedy)[sampled].any()


def test_each_row_has_its_settings():
    """A row gives what it gives alone, neutral parameters among them."""
    rows = SETTINGS[:2] + SETTINGS[5:6] + SETTINGS[7:8] + SETTINGS[9:10] + [TORTOISE]
    logits, seen = random(len(rows), 130, seed=6, scale=2.0, device=DEVICE), [1, 31, 32, 129]
    settings = {}
    for name, value in NEUTRAL.items():
        dtype = torch.int64 if name == "top_k" else torch.float64 if name == "top_p" else torch.float32
        column = torch.tensor([row.get(name, value) for row in rows], device=DEVICE).to(dtype)
        settings[name] = torch.stack((column, column * 0), 1)[:, 0]  # at a stride
    together = check(logits, seen, **settings)
    for n, row in enumerate(rows):
        alone = draw(logits[n : n + 1], state(1, 130, seen), candidate=n, **row)
        assert alone[0] == together[n]


def test_the_draw_depends_on_row_and_numbers_alone():
    logits, rows = random(17, 97, seed=7, device=DEVICE), torch.arange(17, device=DEVICE)
    whole = draw(logits, candidate=rows, step=rows * 3, top_p=0.9)
    assert torch.equal(draw(logits, candidate=rows), draw(logits, candidate=rows))
    for n in (0, 11, 16):
        alone = draw(logits[n : n + 1], candidate=rows[n : n + 1], step=rows[n : n + 1] * 3, top_p=0.9)
        assert alone[0] == whole[n]


def test_philox_of_all_64_bits():
    """Over equal logits the token is the random number itself, scaled."""
    seeds = [0, 1, 2**63 + 12345, 2**64 - 1, 5 << 32]
    candidates, steps = [0, 2**33 + 7, 3, 2**62, 9 << 32], [0, 1, 2**40 + 1, 2**32 - 1, 2**32]
    numbers = [
        torch.tensor([x - 2**64 if x >= 2**63 else x for x in values], device=DEVICE)
        for values in (seeds, candidates, steps)
    ]
    given = dict(zip(("seed", "candidate", "step"), numbers, strict=True))
    tokens = draw(torch.zeros(5, 4096, device=DEVICE), **given)
    for token, seed, candidate, step in zip(tokens.tolist(), seeds, candidates, steps, strict=True):
        words = (step & 0xFFFFFFFF, step >> 32, candidate & 0xFFFFFFFF, candidate >> 32)
        assert token == philox(words, (seed & 0xFFFFFFFF, seed >> 32))[0] >> 20


@pytest.mark.parametrize("settings", SETTINGS if DEVICE == "cuda" else [{"temperature": 1.3, "min_p": 0.02}], ids=str)
def test_distribution_and_forbidden_tokens(settings):
    """Chi-squared against the reference's exact probabilities; nothing outside their support."""
    count, vocab_size = (300, 8) if DEVICE == "cpu" else (20000, 40)
    logits = random(1, vocab_size, seed=8, scale=1.5, device=DEVICE)
    logits[0, 4] = -torch.inf
    parameters = ((NEUTRAL | settings)[name] for name in ("temperature", "top_k", "top_p", "typical_p", "min_p"))
    scores = row_scores(logits[0].clone(), *parameters)
    exact = scores.double().softmax(-1).cpu()
    tokens = draw(logits.expand(count, -1), **settings).cpu()
    drawn = torch.bincount(tokens, minlength=vocab_size).double()
    assert drawn[exact == 0].sum() == 0
    expected = exact * count
    common = expected >= 5
    if (~common).any():  # the rare ones together
        drawn = torch.cat((drawn[common], drawn[~common].sum()[None]))
        expected = torch.cat((expected[common], expected[~common].sum()[None]))
    statistic = ((drawn - expected).square() / expected.clamp(min=1e-9)).sum().item()
    degrees = max(int((expected > 0).sum()) - 1, 1)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 5


def test_extreme_logits():
    logits = random(4, 97, seed=9, device=DEVICE)
    logits[0] *= 1e4
    logits[1] -= 1e4
    logits[2, :90] = -torch.inf
    logits[3] = torch.linspace(-300, 300, 97)
    check(logits, [3, 90], **TORTOISE)
    check(logits, [3, 90], typical_p=0.7, repetition_penalty=1.2)
    check(torch.stack((logits[2], -logits[2].nan_to_num(neginf=0.0))), top_k=30)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_without_an_answer_stay_inside():
    """NaN, or nothing but -inf: some token, nothing written elsewhere, the neighbours undisturbed."""
    logits = random(4, 97, seed=10, device=DEVICE)
    logits[1], logits[2, 50], logits[3] = -torch.inf, torch.nan, torch.nan
    for settings in ({}, {"do_sample": False}, ALL):
        states = state(4, 97)
        tokens = draw(logits, states, **settings)
        assert ((tokens >= 0) & (tokens < 97)).all()
        assert tokens[0] == draw(logits[:1], **settings)[0] and states[1].tolist() == [1] * 4


def test_state_is_updated_in_place():
    wanted = [0, 31, 32, 63, STOP, 95, 64, 50]
    logits = torch.full((8, 97), -50.0, device=DEVICE)
    logits[torch.arange(8), torch.tensor(wanted)] = 50.0
    seen, lengths, done = state(8, 97, [5])
    lengths += 4
    done[6:] = True
    before = seen.clone()
    wide = torch.full((8, 9), 2**30, dtype=torch.int32, device=DEVICE)
    wide[:, 1:9:2] = seen
    seen, pair = wide[:, 1:9:2], torch.full((8, 3), 9, device=DEVICE)
    pair[:, 1], lengths = lengths, pair[:, 1]
    flags = torch.ones(8, 2, dtype=torch.bool, device=DEVICE)
    flags[:, 0], done = done, flags[:, 0]
    tokens = draw(strided(logits), (seen, lengths, done), min_p=0.1, repetition_penalty=1.1)
    assert tokens.tolist() == [*wanted[:6], PAD, PAD]
    assert lengths.tolist() == [5] * 6 + [4] * 2
    assert done.tolist() == [False] * 4 + [True, False, True, True]
    for n in range(8):
        bits = {32 * w + b for w in range(4) for b in range(32) if int(seen[n, w]) >> b & 1}
        assert bits == ({5, wanted[n]} if n < 6 else {5})
    assert torch.equal(seen[6:], before[6:])
    assert (wide[:, ::2] == 2**30).all() and (pair[:, ::2] == 9).all() and flags[:, 1].all()


def test_memory_around_the_row_and_the_results():
    logits, marked = random(3, 130, seed=11, scale=2.0, device=DEVICE), list(range(40, 120))
    numbers = torch.arange(3, device=DEVICE)
    expected = draw(logits, state(3, 130, marked), seed=1, step=2, top_k=9, repetition_penalty=4.0)
    buffer = torch.full((7,), -5, device=DEVICE)
    seen, lengths, done = state(3, 130, marked)
    seen = seen.T.contiguous().T
    parameters = (None, torch.full((3,), 9, device=DEVICE), None, None, None, torch.full((3,), 4.0, device=DEVICE))
    fixed = torch.full_like(numbers, 1), numbers, torch.full_like(numbers, 2)
    states = (seen, lengths, done)
    sampling.sample(strided(logits), *states, *parameters, *fixed, STOP, PAD, True, None, out=buffer[2:5])
    assert torch.equal(buffer[2:5], expected) and (buffer[:2] == -5).all() and (buffer[5:] == -5).all()


def test_registered():
    logits, rows = random(1, 97, seed=0, device=DEVICE), torch.arange(1, device=DEVICE)
    op = torch.ops.clvp_fast.sample.default
    floats = [torch.full((1,), x, dtype=torch.float64, device=DEVICE) for x in (0.8, 0.9, 0.8, 0.01, 1.5)]
    args = (logits, *state(1, 97, [4]), floats[0], rows + 3, *floats[1:], rows, rows, rows, STOP, PAD, True)
    torch.library.opcheck(op, (*args, None))
    torch.library.opcheck(op, (*args, rows > 0))
    torch.library.opcheck(op, (logits, *state(1, 97), *[None] * 6, rows, rows, rows, STOP, PAD, False, None))
    assert draw(logits[:0], state(0, 97)).shape == (0,)
    rows = random(3, 97, seed=0, device=DEVICE)
    assert torch.equal(draw(rows.T.contiguous().T), draw(rows))


def test_what_is_not_served_is_named():
    for logits, message in (
        (torch.zeros(2, 97, dtype=torch.float64, device=DEVICE), "float32, float16 or bfloat16, not torch.float64"),
        (torch.zeros(1, 16385, device=DEVICE), "1 to 16384 tokens, not 16385"),
    ):
        with clvp_fast.backend("triton"), pytest.raises(RuntimeError, match=message):
            draw(logits)
