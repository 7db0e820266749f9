"""`sample`: Philox against known answers, processors and draws against transformers', both paths against each other."""

import pytest
import torch

import clvp_fast
from clvp_fast.ops import sample
from clvp_fast.ops.sampling_torch import philox
from tests.kit import generator, random
from tests.kit.processors import processors

STOP, PAD = 3, 96
BACKENDS = ["torch", "reference"]
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.8},
    {"top_p": 0.01},
    {"min_p": 0.1},
    {"typical_p": 0.6},
    {"typical_p": 0.01},
    {"repetition_penalty": 2.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "repetition_penalty": 2.0},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.3},
]


def state(count, vocab_size, seen=()):
    """An empty state in which the tokens `seen` are marked in every row."""
    bitmap = torch.zeros(count, -(-vocab_size // 32), dtype=torch.int32)
    for token in seen:
        bitmap[:, token // 32] |= torch.tensor(1, dtype=torch.int32) << (token % 32)
    return bitmap, torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.bool)


def processed(logits, seen, settings):
    """What transformers makes of `[N, V]` logits after the tokens `seen`."""
    ids = torch.tensor([seen] * len(logits), dtype=torch.long).view(len(logits), len(seen))
    return processors(settings)(ids, logits)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draw_is_the_inverse_cdf_of_transformers_probabilities(settings, backend):
    """Token for token: the first whose cumulated probability exceeds the Philox number of (seed, candidate, step)."""
    count, vocab_size, seen, seed = 64, 97, [1, 31, 32, 63, 96], 2**63 + 12345
    logits = random(count, vocab_size, seed=1, scale=2.0)
    rows = torch.arange(count)
    with clvp_fast.backend(backend):
        tokens = sample(
            logits,
            *state(count, vocab_size, seen),
            seed=seed,
            candidate=rows,
            step=7,
            stop_token=STOP,
            pad_token=PAD,
            **settings,
        )
    cumulated = processed(logits, seen, settings).double().softmax(-1).cumsum(-1)
    for n in range(count):
        word = philox((7, 0, n, 0), (seed & 0xFFFFFFFF, seed >> 32))[0]
        expected = (cumulated[n] > (word + 0.5) / 2**32 * cumulated[n, -1]).nonzero()[0, 0]
        assert tokens[n] == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_p", [0.0, 1e-9])
@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"temperature": 3.0}], ids=str)
def test_the_likeliest_token_is_never_removed(top_p, more, backend):
    """Whatever is drawn, and wherever the likeliest token stands."""
    logits = random(64, 97, seed=1, scale=0.1)
    given = {"seed": 3, "candidate": torch.arange(64), "step": 0, "stop_token": STOP, "pad_token": PAD}
    with clvp_fast.backend(backend):
        tokens = sample(logits, *state(64, 97), top_p=top_p, **given, **more)
        rows = sample(logits, *state(64, 97), top_p=torch.full((64,), top_p), **given, **more)
    assert torch.equal(tokens, logits.argmax(1)) and torch.equal(rows, tokens)
    assert len(set(tokens.tolist())) > 20


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_and_forbidden_tokens(settings):
    """Chi-squared over 20000 candidates against transformers' exact probabilities; nothing outside their support."""
    count, vocab_size, seen = 20000, 40, [2, 5]
    logits = random(1, vocab_size, seed=3, scale=1.5)
    exact = processed(logits, seen, settings)[0].double().softmax(-1)
    candidates = torch.arange(count)
    given = {"seed": 5, "step": 0, "stop_token": STOP, "pad_token": PAD}
    rows = logits.expand(count, -1)
    tokens = sample(rows, *state(count, vocab_size, seen), candidate=candidates, **given, **settings)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_of_each_row(backend):
    """A row with its own settings gives what it gives alone, with its neighbours' paths taken or not."""
    rows = [setting for setting in SETTINGS for _ in range(4)]
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    logits = random(len(rows), 300, seed=2, scale=2.0)
    settings = {
        name: torch.tensor(
            [row.get(name, value) for row in rows], dtype=torch.int64 if name == "top_k" else torch.float64
        )
        for name, value in neutral.items()
    }
    seen = [1, 31, 32, 255]
    candidates = torch.arange(len(rows)) * 1000
    given = {"seed": 1, "step": 2**33, "stop_token": STOP, "pad_token": PAD}
    with clvp_fast.backend(backend):
        together = sample(logits, *state(len(rows), 300, seen), candidate=candidates, **given, **settings)
        for n, row in enumerate(rows):
            alone = sample(logits[n : n + 1], *state(1, 300, seen), candidate=candidates[n : n + 1], **given, **row)
            assert alone[0] == together[n]


def test_draw_does_not_depend_on_the_batch():
    logits, order = random(50, 97, seed=4), torch.randperm(50, generator=generator(0))
    numbers = torch.arange(50)
    given = {"top_p": 0.9, "seed": 11, "stop_token": STOP, "pad_token": PAD}
    whole = sample(logits, *state(50, 97), candidate=numbers, step=numbers * 3, **given)
    mixed = sample(logits[order], *state(50, 97), candidate=numbers[order], step=numbers[order] * 3, **given)
    assert torch.equal(mixed, whole[order])
    for change in ({"seed": 12}, {"candidate": numbers + 1}, {"step": numbers * 3 + 1}):
        options = {"candidate": numbers, "step": numbers * 3} | given | change
        assert not torch.equal(sample(logits, *state(50, 97), **options), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_is_transformers(backend):
    logits, seen = random(30, 97, seed=5, scale=2.0), [int(t) for t in range(0, 97, 3)]
    logits[0, 7:9] = 50.0  # equal ones: the first
    with clvp_fast.backend(backend):
        tokens = sample(
            logits,
            *state(30, 97, seen),
            repetition_penalty=3.0,
            temperature=0.5,
            top_k=2,
            seed=0,
            candidate=0,
            step=0,
            stop_token=STOP,
            pad_token=PAD,
            do_sample=False,
        )
    assert torch.equal(tokens, processed(logits, seen, {"repetition_penalty": 3.0}).argmax(-1)) and tokens[0] == 7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_rows_among_sampled_ones(dtype, backend):
    """The first of the largest penalised scores, whatever the row's other parameters; the others draw as without."""
    count, seen = 40, [1, 31, 32, 96]
    logits = random(count, 97, seed=8, scale=2.0).to(dtype)
    logits[3, 40:60] = 50.0
    sampled = torch.arange(count) % 3 == 1
    given = {"seed": 3, "candidate": torch.arange(count), "step": 2, "stop_token": STOP, "pad_token": PAD}
    settings = {"top_p": 0.8, "repetition_penalty": 1.7, "typical_p": 0.9}
    temperature = torch.where(sampled, 1.5, 1e-44)
    with clvp_fast.backend(backend):
        drawn, greedy = (
            sample(logits, *state(count, 97, seen), do_sample=choice, temperature=1.5, **given, **settings)
            for choice in (True, False)
        )
        states = state(count, 97, seen)
        tokens = sample(logits, *states, do_sample=sampled, temperature=temperature, **given, **settings)
    assert torch.equal(tokens, torch.where(sampled, drawn, greedy))
    assert tokens[3] == 40 and (drawn != greedy)[sampled].any()
    assert states[1].tolist() == [1] * count
    for row, token in zip(states[0], tokens.tolist(), strict=True):
        assert {32 * w + b for w in range(4) for b in range(32) if int(row[w]) >> b & 1} == {*seen, token}


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_is_updated_in_place(backend):
    wanted = [0, 31, 32, 63, STOP, 95, 64, 50]
    logits = torch.full((8, 97), -50.0)
    logits[torch.arange(8), torch.tensor(wanted)] = 50.0
    seen, lengths, done = state(8, 97, [5])
    lengths += 4
    done[6:] = True
    before = seen.clone()
    with clvp_fast.backend(backend):
        tokens = sample(logits, seen, lengths, done, seed=0, candidate=0, step=0, stop_token=STOP, pad_token=PAD)
    assert tokens.tolist() == [*wanted[:6], PAD, PAD]
    assert lengths.tolist() == [5] * 6 + [4] * 2
    assert done.tolist() == [False] * 4 + [True, False, True, True]
    for n in range(8):
        bits = {32 * w + b for w in range(4) for b in range(32) if int(seen[n, w]) >> b & 1}
        assert bits == ({5, wanted[n]} if n < 6 else {5})
    assert torch.equal(seen[6:], before[6:])


def test_low_precision_logits_are_processed_in_float32():
    logits = random(40, 97, seed=6, scale=3.0, dtype=torch.bfloat16)
    given = {"top_p": 0.7, "candidate": torch.arange(40), "seed": 0, "step": 0, "stop_token": STOP, "pad_token": PAD}
    low, wide = (sample(x, *state(40, 97), **given) for x in (logits, logits.float()))
    assert torch.equal(low, wide)


def test_registered_and_compiled():
    logits = random(6, 97, seed=0)
    whole = torch.arange(6)
    op = torch.ops.clvp_fast.sample.default
    floats = [torch.full((6,), x, dtype=torch.float64) for x in (0.8, 0.9, 0.8, 0.01, 1.5)]
    parameters = [floats[0], whole + 3, *floats[1:]]
    args = (logits, *state(6, 97, [4]), *parameters, whole, whole, whole, STOP, PAD, True)
    torch.library.opcheck(op, (*args, None))
    torch.library.opcheck(op, (*args, whole > 2))
    torch.library.opcheck(op, (logits, *state(6, 97), *[None] * 6, whole, whole, whole, STOP, PAD, False, None))
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
