"""`sample`: Philox against known answers, draws against transformers' processors, every backend's tokens and state
against the reference's, ties included. State, memory and errors are in test_sampling_state.py.

The interpreter takes 20 ms for a row and 0.2 s for a threshold, whatever the vocabulary: few rows there.
"""

import pytest
import torch

import clvp_fast
from clvp_fast.ops import sample
from clvp_fast.ops.sampling_torch import philox
from tests.kit import generator, random
from tests.kit.backends import TRITON, on
from tests.kit.processors import processors

STOP, PAD, SEED, STEP = 3, 96, 2**63 + 12345, 7
KERNELS = ("cpu", *TRITON)
EVERY = ("reference", "torch", *KERNELS)
ROWS = {"interpreted": 3, "gpu": 512}  # elsewhere 64
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
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "repetition_penalty": 2.0},
    TORTOISE,
    ALL,
]


def state(count, vocab_size, seen=(), device="cpu"):
    """Make an empty state in which the tokens `seen` are marked in every row."""
    bitmap = torch.zeros(count, -(-vocab_size // 32), dtype=torch.int32)
    for token in seen:
        bitmap[:, token // 32] |= torch.tensor(1, dtype=torch.int32) << (token % 32)
    empty = torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.bool)
    return tuple(x.to(device) for x in (bitmap, *empty))


def marked(row):
    return {32 * w + b for w in range(len(row)) for b in range(32) if int(row[w]) >> b & 1}


def draw(logits, states=None, seen=(), **settings):
    given = {"seed": SEED, "candidate": torch.arange(len(logits), device=logits.device), "step": STEP}
    given |= {"stop_token": STOP, "pad_token": PAD} | settings
    return sample(logits, *(states or state(*logits.shape, seen, logits.device)), **given)


def check(logits, seen=(), done=(), **settings):
    """Check that tokens and states are the reference's."""
    ours, theirs = (state(*logits.shape, seen, logits.device) for _ in range(2))
    for states in (ours, theirs):
        states[2][list(done)] = True
    tokens = draw(logits, ours, **settings)
    with clvp_fast.backend("reference"):
        expected = draw(logits, theirs, **settings)
    assert torch.equal(tokens, expected)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(mine, wanted)
    return tokens


def processed(logits, seen, settings):
    """Return transformers' processed `[N, V]` logits after the tokens `seen`."""
    ids = torch.tensor([seen] * len(logits), dtype=torch.long).view(len(logits), len(seen))
    return processors(settings)(ids, logits.cpu())


def columns(rows, device, **dtypes):
    """Make a tensor for each setting, which has an element a row, at a stride."""
    found = {}
    for name, value in NEUTRAL.items():
        dtype = dtypes.get(name, torch.int64 if name == "top_k" else torch.float64)
        column = torch.tensor([row.get(name, value) for row in rows], device=device).to(dtype)
        found[name] = torch.stack((column, column * 0), 1)[:, 0]
    return found


def words(text):
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "answer"),  # the known answers of Random123
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    assert philox(words(counter), words(key)) == words(answer)
    tensors = philox(*(tuple(torch.tensor([w]) for w in words(text)) for text in (counter, key)))
    assert tuple(int(t) for t in tensors) == words(answer)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@on(*EVERY)
def test_draw_is_the_inverse_cdf_of_transformers_probabilities(backend, settings):
    """Token for token: the first whose cumulated probability exceeds the Philox number of (seed, candidate, step)."""
    seen = [1, 31, 32, 63, 96]
    logits = random(ROWS.get(backend.name, 64), 97, seed=1, scale=2.0, device=backend.device)
    tokens = check(logits, seen, **settings)
    if backend.compiled:  # each form also meets equal scores at its thresholds, and a row that is done
        check(logits.round(), seen, done=[0], **settings)
    cumulated = processed(logits, seen, settings).double().softmax(-1).cumsum(-1)
    for n in range(min(len(logits), 64)):
        word = philox((STEP, 0, n, 0), (SEED & 0xFFFFFFFF, SEED >> 32))[0]
        expected = (cumulated[n] > (word + 0.5) / 2**32 * cumulated[n, -1]).nonzero()[0, 0]
        assert tokens[n] == expected


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@on("torch", "cpu")
def test_tokens_of_the_reference_over_more_of_them(backend, settings):
    check(random(60, 1025, seed=1, scale=2.0), [1, 31, 32, 63, 96], **settings)


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"temperature": 3.0}], ids=str)
@on("reference", "torch", "cpu", "gpu")
def test_the_likeliest_token_is_never_removed(backend, more, top_p):
    """Vary the settings and the place of the likeliest token."""
    logits = random(64, 97, seed=1, scale=0.1, device=backend.device)
    tokens = draw(logits, top_p=top_p, **more)
    rows = draw(logits, top_p=torch.full((64,), top_p, device=backend.device), **more)
    assert torch.equal(tokens, logits.argmax(1)) and torch.equal(rows, tokens)
    assert len(set(tokens.tolist())) > 20


def distribution(logits, count, seen, settings):
    """Return chi-squared against transformers' exact probabilities; no draw is outside their support."""
    exact = processed(logits, seen, settings)[0].double().softmax(-1)
    tokens = draw(logits.expand(count, -1), seen=seen, **settings).cpu()
    drawn = torch.bincount(tokens, minlength=logits.shape[1]).double()
    assert drawn[exact == 0].sum() == 0
    expected = exact * count
    common = expected >= 5
    if (~common).any():  # the rare ones together
        drawn = torch.cat((drawn[common], drawn[~common].sum()[None]))
        expected = torch.cat((expected[common], expected[~common].sum()[None]))
    statistic = ((drawn - expected).square() / expected.clamp(min=1e-9)).sum().item()
    degrees = max(int((expected > 0).sum()) - 1, 1)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 5


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@on("default", "cpu", "gpu")
def test_distribution_and_forbidden_tokens(backend, settings):
    logits = random(1, 40, seed=3, scale=1.5, device=backend.device)
    distribution(logits, 20000, [2, 5], settings)
    logits[0, 4] = -torch.inf
    distribution(logits[:, :8], 300, [], settings)


@on("interpreted")
def test_distribution_of_few(backend):
    logits = random(1, 8, seed=8, scale=1.5)
    logits[0, 4] = -torch.inf
    distribution(logits, 300, [], {"temperature": 1.3, "min_p": 0.02})


def check_vocabulary(backend, vocab_size, settings):
    """Make a row of different scores, one of few different scores, and one that is done."""
    logits = random(3, vocab_size, seed=2, scale=2.0, device=backend.device)
    logits[1] = logits[1].round()
    logits[:, -1] += 4.0  # the last token is drawn often enough
    check(logits, [0, vocab_size - 1], done=[2], **settings)


# Powers of two, a little above one (two tiles), and others.
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 33, 64, 130, 144, 145, 300, 1025, 8194])
@pytest.mark.parametrize("settings", [TORTOISE, ALL], ids=["tortoise", "all"])
@on(*TRITON)
def test_vocabularies(backend, vocab_size, settings):
    check_vocabulary(backend, vocab_size, settings)


# Around a vector, and more than a GPU's kernel serves.
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 33, 63, 64, 65, 300, 8194, 70000])
@pytest.mark.parametrize("settings", [TORTOISE, ALL], ids=["tortoise", "all"])
@on("cpu")
def test_vocabularies_of_vectors(backend, vocab_size, settings):
    check_vocabulary(backend, vocab_size, settings)


def check_dtype(backend, dtype):
    """Check that logits of a half type are processed in float32."""
    logits = random(ROWS.get(backend.name, 64), 97, seed=3, scale=3.0, dtype=dtype, device=backend.device)
    assert torch.equal(check(logits, [5, 6], **TORTOISE), draw(logits.float(), seen=[5, 6], **TORTOISE))


@on("default", *EVERY, types="dtype", among=(torch.float32, torch.float16, torch.bfloat16))
def test_dtypes(backend, dtype):
    check_dtype(backend, dtype)


@on("cpu")
def test_float16(backend):
    check_dtype(backend, torch.float16)


TIED = [{"top_p": p} for p in (0.71, 0.33, 0.09, 0.0)] + [{"top_k": 7}, {"typical_p": 0.4}, {"top_k": 9, "top_p": 0.57}]


@pytest.mark.parametrize("settings", TIED, ids=str)
@on("torch", *KERNELS)
def test_ties_are_broken_as_a_stable_sort_does(backend, settings):
    """Use few values of logits: of equal ones top-p keeps the last tokens, top-k and typical-p all."""
    logits = (random(ROWS.get(backend.name, 64), 130, seed=4, scale=1.5) * 1.5).round() / 1.5
    logits[:, 128] = logits[:, 5] = logits[:, 60] = 1.0
    logits[:2, 7] = logits[:2, 70] = logits[1, 128] = 6.0
    check(logits.to(backend.device), **settings)


@pytest.mark.parametrize("top_p", [0.0, 1e-7, 0.0049, 0.305, 0.705])
@on("torch", *KERNELS)
def test_equal_logits(backend, top_p):
    """Make every token a tie: 1 - top_p of them go, the first ones; one stays."""
    logits = torch.full((4, 100), -2.5, device=backend.device)
    tokens = check(logits, top_p=torch.full((4,), top_p, device=backend.device))
    assert tokens.min() >= (99 if top_p < 0.01 else 100 - round(100 * top_p + 0.5))


@on(*EVERY)
def test_a_mass_exactly_at_the_bound_is_removed(backend):
    """Use weights 1/2, 1/2 and 1, of which top-p 1/2 keeps the last alone."""
    logits = torch.tensor([[0.0, -0.6931472, -torch.inf, -0.6931472]], device=backend.device).expand(6, -1)
    assert check(logits, top_p=0.5).tolist() == [0] * 6


@pytest.mark.parametrize("vocab_size", [97, 130])
@on(*EVERY)
def test_greedy_is_transformers(backend, vocab_size):
    logits = random(5 if backend.name == "interpreted" else 30, vocab_size, seed=5, scale=2.0, device=backend.device)
    logits[0, 7:9] = 50.0  # equal ones: the first
    logits[1, -2] = 50.0
    logits[2, 0] = logits[2, -1] = 50.0
    logits[3] = -torch.inf
    logits[3, 33] = -1e30
    for first in (0, 1):
        seen = list(range(first, vocab_size - 1, 3))
        tokens = check(logits, seen, repetition_penalty=3.0, temperature=0.5, top_k=2, do_sample=False)
        assert tokens[0] == (8 if 7 in seen else 7) and tokens[1] == vocab_size - 2 and tokens[3] == 33
        assert tokens[2] == (vocab_size - 1 if 0 in seen else 0)
        assert torch.equal(tokens.cpu(), processed(logits, seen, {"repetition_penalty": 3.0}).argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [{}, TORTOISE, ALL, {"temperature": 1.5, "top_p": 0.8, "typical_p": 0.9, "repetition_penalty": 1.7}],
    ids=["none", "tortoise", "all", "typical"],
)
@on(*EVERY, types="dtype", among=(torch.float32, torch.bfloat16))
def test_greedy_rows_among_sampled_ones(backend, dtype, settings):
    """Take the first of the largest penalised scores in a greedy row; the others draw as without it."""
    count, seen = 7 if backend.name == "interpreted" else 40, [1, 31, 32, 129]
    logits = random(count, 130, seed=12, scale=2.0, device=backend.device).to(dtype)
    logits[0, 7:9] = logits[2, 128] = logits[2, 60] = 50.0
    flags = torch.zeros(count, 3, dtype=torch.bool, device=backend.device)
    flags[:, 0], flags[:, 2] = True, True
    flags[1::2, 1] = True
    sampled = flags[:, 1]  # at a stride
    given = columns([settings] * count, backend.device)
    if settings:
        given["temperature"][~sampled] = 1e-44  # which would make all of them infinite
        given["top_k"][~sampled] = 1
    states = state(count, 130, seen, backend.device)
    tokens = check(logits, seen, do_sample=sampled, **given)
    penalty = settings.get("repetition_penalty", 1.0)
    greedy = draw(logits, states, do_sample=False, repetition_penalty=penalty)
    drawn = draw(logits, seen=seen, **settings)
    assert torch.equal(tokens, torch.where(sampled, drawn, greedy))
    assert tokens[0] == 7 and tokens[2] == 60 and (drawn != greedy)[sampled].any()
    assert states[1].tolist() == [1] * count
    for row, token in zip(states[0], greedy.tolist(), strict=True):
        assert marked(row) == {*seen, token}


@on(*EVERY)
def test_each_row_has_its_settings(backend):
    """Get a row's own result beside rows with other paths and neutral parameters."""
    few = [SETTINGS[n] for n in (0, 1, 5, 7, 9, 14)] + [TORTOISE]
    rows = few if backend.name == "interpreted" else [row for row in SETTINGS for _ in range(4)]
    logits, seen = random(len(rows), 300, seed=6, scale=2.0, device=backend.device), [1, 31, 32, 255]
    logits[-1] = logits[-1].round()  # ties at the threshold
    singles = dict.fromkeys(("temperature", "typical_p", "min_p", "repetition_penalty"), torch.float32)
    for dtypes in (singles, {}):
        together = check(logits, seen, **columns(rows, backend.device, **dtypes), step=2**33)
        if dtypes and backend.name == "interpreted":
            continue
        for n, row in enumerate(rows):
            assert draw(logits[n : n + 1], seen=seen, candidate=n, step=2**33, **row)[0] == together[n]


@on("default", *EVERY)
def test_the_draw_depends_on_row_and_numbers_alone(backend):
    logits, rows = random(17, 97, seed=7, device=backend.device), torch.arange(17, device=backend.device)
    whole = draw(logits, candidate=rows, step=rows * 3, top_p=0.9)
    assert torch.equal(draw(logits, candidate=rows), draw(logits, candidate=rows))
    for n in (0, 11, 16):
        alone = draw(logits[n : n + 1], candidate=rows[n : n + 1], step=rows[n : n + 1] * 3, top_p=0.9)
        assert alone[0] == whole[n]


@on("default", "reference", "torch", "cpu", "gpu")
def test_other_numbers_give_other_tokens(backend):
    order, numbers = (x.to(backend.device) for x in (torch.randperm(50, generator=generator(0)), torch.arange(50)))
    logits = random(50, 97, seed=4, device=backend.device)
    given = {"top_p": 0.9, "seed": 11, "candidate": numbers, "step": numbers * 3}
    whole = draw(logits, **given)
    mixed = draw(logits[order], **given | {"candidate": numbers[order], "step": numbers[order] * 3})
    assert torch.equal(mixed, whole[order])
    for change in ({"seed": 12}, {"candidate": numbers + 1}, {"step": numbers * 3 + 1}):
        assert not torch.equal(draw(logits, **given | change), whole)


@on(*EVERY)
def test_philox_of_all_64_bits(backend):
    """Over equal logits the token is the random number itself, scaled."""
    seeds = [0, 1, 2**63 + 12345, 2**64 - 1, 5 << 32]
    candidates, steps = [0, 2**33 + 7, 3, 2**62, 9 << 32], [0, 1, 2**40 + 1, 2**32 - 1, 2**32]
    numbers = [
        torch.tensor([x - 2**64 if x >= 2**63 else x for x in values], device=backend.device)
        for values in (seeds, candidates, steps)
    ]
    given = dict(zip(("seed", "candidate", "step"), numbers, strict=True))
    tokens = draw(torch.zeros(5, 4096, device=backend.device), **given)
    for token, seed, candidate, step in zip(tokens.tolist(), seeds, candidates, steps, strict=True):
        words = (step & 0xFFFFFFFF, step >> 32, candidate & 0xFFFFFFFF, candidate >> 32)
        assert token == philox(words, (seed & 0xFFFFFFFF, seed >> 32))[0] >> 20
