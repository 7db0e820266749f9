"""Ranking by a copy of the speech encoder in another dtype: its scores, changes of weights, and its effect on ranks."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from clvp_fast import CandidateEngine, CandidateRequest, SamplingParams
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.engine.ranking import Ranker
from tests.engine.small_engine import make, request, sampling
from tests.engine.test_ranking import candidates, model_of
from tests.models.clvp.builders import texts

VOICE = Path(__file__).parents[2] / "examples/voice.flac"
# Of sentences that the checkpoint `demo` knows.
SENTENCES = (
    "The birch canoe slid on the smooth planks.",
    "Glue the sheet to the dark blue background.",
    "The juice of lemons makes fine punch.",
    "The box was thrown beside the parked truck.",
)


def embeds_of(ranker: Ranker) -> torch.Tensor:
    return ranker.rank(texts(1)[0], candidates([5, 1, 33, 17])).speech_embeds


@pytest.mark.parametrize("mode", ["padded", "trimmed"])
@pytest.mark.parametrize("own, other", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_speech_side_alone_has_the_dtype(mode, own, other):
    """Find the bits of a model that was cast, and the model's own where there is nothing to cast."""
    model = model_of(dtype=own)
    settings = dict(mode=mode, pad_to=40)
    plain = Ranker(model, **settings).rank(texts(1)[0], candidates())
    found = Ranker(model, **settings, dtype=other).rank(texts(1)[0], candidates())
    cast = Ranker(copy.deepcopy(model).to(other), **settings).rank(texts(1)[0], candidates())
    assert torch.equal(found.speech_embeds, cast.speech_embeds)
    assert not torch.equal(found.speech_embeds, plain.speech_embeds)
    assert torch.equal(found.text_embeds, plain.text_embeds) and not torch.equal(found.text_embeds, cast.text_embeds)
    assert {parameter.dtype for parameter in model.parameters()} == {own}
    assert torch.equal(embeds_of(Ranker(model, **settings, dtype=own)), embeds_of(Ranker(model, **settings)))


def test_scores_of_fixed_codes_have_the_dtype():
    model = model_of()
    rows = torch.stack(candidates([12] * 3))
    found = Ranker(model, dtype=torch.bfloat16).score_fixed(texts(1)[0], rows)
    exact, half = (Ranker(each).score_fixed(texts(1)[0], rows) for each in (model, copy.deepcopy(model).bfloat16()))
    assert 0 < (found - exact).abs().max() < 0.05 and not torch.equal(found, half)  # whose text is another


@torch.no_grad()
def written(weight):
    weight.mul_(-1)


def moved(weight):
    weight.data = -weight.data


@pytest.mark.parametrize("change", [written, moved])
def test_changed_weights_are_copied_anew(change):
    model = model_of()
    ranker = Ranker(model, dtype=torch.bfloat16)
    before = embeds_of(ranker)
    change(model.speech_encoder_model.layers[0].self_attn.v_proj.weight)
    after = embeds_of(ranker)
    assert torch.equal(after, embeds_of(Ranker(model, dtype=torch.bfloat16))) and not torch.equal(after, before)


def test_a_write_through_data_is_seen_after_refresh(parts):
    model, processor = copy.deepcopy(parts[0]), parts[1]
    engine = make((model, processor), score_dtype=torch.bfloat16)

    def found():
        (result,) = engine.generate(request(1), sampling(1))
        return result.speech_embeds

    before = found()
    model.speech_encoder_model.layers[0].self_attn.v_proj.weight.data.mul_(-1)
    assert np.array_equal(found(), before)
    engine.refresh()
    after = found()
    assert not np.array_equal(after, before)
    (anew,) = make((model, processor), score_dtype=torch.bfloat16).generate(request(1), sampling(1))
    assert np.array_equal(after, anew.speech_embeds)


def test_the_engine_draws_the_same_codes(parts):
    (plain,) = make(parts).generate(request(1), sampling(1))
    (found,) = make(parts, score_dtype=torch.bfloat16).generate(request(1), sampling(1))
    assert np.array_equal(found.codes, plain.codes) and np.array_equal(found.text_embeds, plain.text_embeds)
    assert 0 < np.abs(found.scores - plain.scores).max() < 0.05


def test_bad_input(parts):
    with pytest.raises(ValueError, match=r"scored in torch.float32, torch.bfloat16, torch.float16, not torch.int8"):
        Ranker(model_of(), dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^score_dtype=torch.bfloat16 is how the model's own encoders score"):
        make(parts, scorer=Ranker(parts[0]), score_dtype=torch.bfloat16)


def test_a_hook_on_the_encoder_is_told():
    """Refuse what the copy would not run, at its making and later."""
    model = model_of()
    ranker = Ranker(model, dtype=torch.bfloat16)
    model.speech_encoder_model.layers[1].mlp.register_forward_hook(lambda *_: None)
    for rank in (lambda: embeds_of(ranker), lambda: Ranker(model, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"module layers\.1\.mlp has hooks"):
            rank()


def test_ranks_of_a_trained_checkpoint():
    """Compare ranks and best candidates in bfloat16 with float32's; docs/ranking.md says how equal they are."""
    checkpoint = load_checkpoint("demo", device="cpu")
    engine = CandidateEngine(checkpoint.model, checkpoint.processor)
    settings = SamplingParams(num_candidates=8, max_new_tokens=engine.max_new_tokens, seed=1)
    half = Ranker(checkpoint.model, dtype=torch.bfloat16, pad_to=engine.max_new_tokens + 1)
    requests = [CandidateRequest(text=text, audio=VOICE, id=text) for text in SENTENCES]
    correlations, lost, spreads = [], [], []
    for result in engine.generate(requests, settings):
        ids = checkpoint.tokenizer(result.request.id)["input_ids"]
        rows = [codes[:length] for codes, length in zip(result.codes, result.lengths, strict=True)]
        scores = half.rank(ids, rows).scores.numpy()
        places = [np.argsort(np.argsort(one)) for one in (scores, result.scores)]
        correlations.append(np.corrcoef(places)[0, 1])
        lost.append(result.scores.max() - result.scores[scores.argmax()])
        spreads.append(result.scores.std())
        assert not np.array_equal(scores, result.scores)
    assert np.mean(correlations) > 0.98
    assert max(lost) < 0.05 * min(spreads)  # another best candidate would be one of nearly the same score
