"""Scores and embeddings of candidates, held against the drop-in's and against each candidate encoded alone."""

import pytest
import torch
import torch.nn.functional as F

from clvp_fast.engine.ranking import Ranker, Ranking
from tests.models.clvp.builders import SHAPES, START, STOP, assert_same, clips, codes, pair, texts

LENGTHS = [5, 1, 0, 33, 2, 17, 1]


def model_of(shape: str = "heads64", dtype: torch.dtype = torch.float32, stop_bias: float = 3.5):
    _, ours = pair(shape=shape, dtype=dtype)
    with torch.no_grad():
        ours.speech_decoder_model.lm_head.bias[STOP] = stop_bias
    return ours


def candidates(lengths=LENGTHS, seed: int = 2):
    return list(codes(1, sum(lengths), seed)[0].split(lengths))


def generated(model, max_new_tokens: int, candidates_per_text: int = 6, **settings):
    """Return the drop-in's output for one text, and its candidates as a decoder gives them."""
    torch.manual_seed(5)
    output = model.generate(
        texts(1),
        clips(1),
        do_sample=True,
        top_k=0,
        num_return_sequences=candidates_per_text,
        max_new_tokens=max_new_tokens,
        pad_to_max_mel_tokens=max_new_tokens + 1,
        return_dict_in_generate=True,
        use_engine=False,
        **settings,
    )
    rows = []
    for row in output.sequences[:, 1:]:
        stops = (row == STOP).nonzero()
        rows.append(row[: stops[0, 0]] if len(stops) else row)
    return output, rows


@torch.no_grad()
def alone(model, row):
    """Embed one sequence of codes: `[projection_dim]`, not normalised."""
    return model.speech_encoder_model(input_ids=row[None]).embeds[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_padded_is_what_generate_scores(shape):
    model = model_of(shape)
    output, rows = generated(model, 24)
    lengths = {len(row) for row in rows}
    assert len(lengths) > 3 and (output.sequences[:, 1:] < STOP).any()
    found = Ranker(model, max_tokens=50).rank(texts(1)[0], rows, mode="padded", pad_to=25)
    assert output.logits_per_text.std() > 1e-3
    assert_same(found.scores, output.logits_per_text[0], tolerance=2e-6)
    assert_same(found.text_embeds, output.text_embeds[0])
    assert_same(found.speech_embeds, output.speech_embeds)


def test_padded_with_candidates_that_stopped_at_once_and_that_never_stopped():
    """Score silence alone, and codes without the others' ending."""
    model = model_of()
    rows = candidates([0, 12, 11, 10, 9])
    found = Ranker(model).rank(texts(1)[0], rows, pad_to=13)
    sequences = torch.stack(
        [torch.cat([torch.tensor([START]), F.pad(row, (0, 12 - len(row)), value=STOP)]) for row in rows]
    )
    fixed = model.fix_speech_decoder_output(sequences)
    assert fixed[0].tolist() == [83] * 9 + [45, 45, 248] and fixed[1].tolist() == rows[1].tolist()
    expected = F.normalize(torch.stack([alone(model, row) for row in fixed]))
    assert_same(found.speech_embeds, expected)


@pytest.mark.parametrize("max_tokens", [1, 6, 40, 10_000])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_trimmed_is_each_candidate_alone(shape, max_tokens):
    model = model_of(shape)
    rows = candidates()
    found = Ranker(model, mode="trimmed", max_tokens=max_tokens).rank(texts(1)[0], rows)
    text = F.normalize(model.text_encoder_model(F.pad(texts(1), (0, 1), value=0)).embeds)[0]
    assert_same(found.text_embeds, text)
    for index, row in enumerate(rows):
        if not len(row):
            assert found.scores[index] == -torch.inf and not found.speech_embeds[index].any()
            continue
        embeds = F.normalize(alone(model, row), dim=0)
        assert_same(found.speech_embeds[index], embeds)
        assert_same(found.scores[index], embeds @ text * model.logit_scale.exp())
    assert found.scores[torch.tensor(LENGTHS) > 0].std() > 1e-3


def test_only_empty_candidates():
    model = model_of()
    found = Ranker(model, mode="trimmed").rank(texts(1)[0], [[], []])
    assert found.scores.tolist() == [-torch.inf] * 2 and found.speech_embeds.shape == (2, 128)
    assert found.top(2).tolist() == [0, 1]
    assert Ranker(model, pad_to=9).rank(texts(1)[0], [[], []]).scores.isfinite().all()


@pytest.mark.parametrize("mode", ["padded", "trimmed"])
def test_memory_is_bounded(mode, monkeypatch):
    """Encode at most `max_tokens` codes at a time, and every code once."""
    model = model_of()
    sizes = []
    table, embedding = model.speech_encoder_model.token_embedding.weight, torch.nn.functional.embedding

    def spied(ids, weight, *args):
        if weight is table:
            sizes.append(ids.numel())
        return embedding(ids, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "embedding", spied)
    lengths = [9, 1, 8, 8, 3, 30, 2]
    Ranker(model, mode=mode, pad_to=31, max_tokens=20).rank(texts(1)[0], candidates(lengths))
    assert sizes == ([30] * 7 if mode == "padded" else [18, 11, 30, 2])
    sizes.clear()
    Ranker(model, mode=mode, pad_to=31, max_tokens=60).rank(texts(1)[0], candidates(lengths))
    assert sizes == ([60, 60, 60, 30] if mode == "padded" else [59, 2])
    sizes.clear()
    Ranker(model, mode=mode, pad_to=31).rank(texts(1)[0], candidates([30] * 35))
    assert sizes == [1020, 30], "on a CPU"


@pytest.mark.parametrize("mode", ["padded", "trimmed"])
def test_several_texts_at_once(mode):
    model = model_of()
    ranker = Ranker(model, mode=mode, pad_to=40, max_tokens=45)
    questions = [texts(1, length, seed=length)[0] for length in (1, 9, 4)]
    answers = [candidates([3, 0, 8], 3), candidates([6], 4), candidates([1, 20], 5)]
    found = ranker.rank(questions, answers)
    assert [len(ranking.scores) for ranking in found] == [3, 1, 2]
    for ranking, text, rows in zip(found, questions, answers, strict=True):
        single = ranker.rank(text, rows)
        assert_same(vars(ranking), vars(single))
        for name, value in vars(ranker.score(None, text, rows, 39)).items():
            assert_same(value, getattr(single, name))


@pytest.mark.parametrize("mode", ["padded", "trimmed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype, mode):
    rows = candidates([5, 1, 33, 17])
    exact = Ranker(model_of(), mode=mode, pad_to=40).rank(texts(1)[0], rows)
    found = Ranker(model_of(dtype=dtype), mode=mode, pad_to=40).rank(texts(1)[0], rows)
    assert found.scores.dtype == found.speech_embeds.dtype == found.text_embeds.dtype == torch.float32
    for embeds in (found.speech_embeds, found.text_embeds):  # bfloat16 would be off by 1e-3
        assert (embeds.norm(dim=-1) - 1).abs().max() < 1e-6
    assert (found.scores - exact.scores).abs().max() < 0.05


@pytest.mark.parametrize("mode", ["padded", "trimmed"])
def test_forms_of_ids(mode):
    """Take arrays, lists and other integer types alike; a start token counts as the filling code."""
    model = model_of()
    ranker = Ranker(model, mode=mode, pad_to=40)
    rows = candidates([5, 1])
    expected = ranker.rank(texts(1)[0], rows)
    for text, given in (
        (texts(1)[0].numpy(), [row.numpy() for row in rows]),
        (texts(1)[0].tolist(), [row.tolist() for row in rows]),
        (texts(1)[0].int(), [row.to(torch.int16) for row in rows]),
    ):
        assert torch.equal(ranker.rank(text, given).scores, expected.scores)
    model.config.speech_config.vocab_size = START
    filled = rows[0].clone()
    filled[2] = 83
    rows[0][2] = START
    assert torch.equal(ranker.rank(texts(1)[0], rows).scores, ranker.rank(texts(1)[0], [filled, rows[1]]).scores)
    assert rows[0][2] == START


def test_top():
    scores = torch.tensor([1.0, float("nan"), 3.0, -torch.inf, 3.0, 2.0])
    ranking = Ranking(scores, torch.zeros(1), torch.zeros(6, 1))
    assert ranking.top(3).tolist() == [2, 4, 5]
    assert ranking.top(99).tolist() == [2, 4, 5, 0, 1, 3]  # NaN and -inf by place
    ties = Ranking(torch.arange(2000) % 2.0, torch.zeros(1), torch.zeros(2000, 1))
    assert ties.top(1000).tolist() == list(range(1, 2000, 2))
    with pytest.raises(ValueError, match="at least 1"):
        ranking.top(0)


@pytest.mark.parametrize(
    ("text", "rows", "settings", "message"),
    [
        ([], [[1]], {}, "text is empty"),
        ([[1, 2]], [[[1]], [[1]]], {}, "1 texts need as many lists of candidates, got 2"),
        (texts(1), [[1]], {}, r"a text must be a row of token ids, \[length\], got \[1, 7\]"),
        ([1, 256], [[1]], {}, "from 0 to 255, got 1 to 256"),
        ([1], [], {}, "at least one candidate"),
        ([1], [[1, -1]], {}, "from 0 to 299, got -1 to 1"),
        ([1], [[1, 300]], {}, "from 0 to 299, got 1 to 300"),
        ([1], [[1, STOP, STOP]], {}, "holds the stop token 293: cut it off"),
        ([1], [torch.tensor([[1]])], {}, "a candidate must be a row"),
        ([1], [torch.tensor([1.0])], {}, "whole numbers, not torch.float32"),
        ([1], [[True]], {}, "whole numbers, not torch.bool"),
        ([1], [[1] * 9], {"pad_to": 9}, "no room for a candidate of 9 codes: use 10 at least"),
        ([1], [[1]], {"pad_to": 1}, "pad_to must be at least 2"),
        ([1], [[1]], {"mode": "cut"}, "one of padded, trimmed, not 'cut'"),
    ],
)
def test_bad_input(text, rows, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Ranker(model_of()).rank(text, rows, **settings)


def test_bad_settings():
    model = model_of()
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        Ranker(model, max_tokens=0)
    with pytest.raises(ValueError, match="one of padded, trimmed"):
        Ranker(model, mode="both")
    with pytest.raises(ValueError, match="training mode"):
        Ranker(model.train()).rank([1], [[1]])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["padded", "trimmed"])
def test_nothing_waits_for_the_device(mode):
    model = model_of().to("cuda")
    ranker = Ranker(model, mode=mode, pad_to=40, max_tokens=45)
    expected = Ranker(model_of(), mode=mode, pad_to=40).rank(texts(1)[0], candidates())
    ranker.rank(texts(1)[0], candidates())  # compiles kernels, packs parameters
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ranker.rank(texts(1)[0], candidates())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same({name: value.cpu() for name, value in vars(found).items()}, vars(expected), tolerance=1e-3)
