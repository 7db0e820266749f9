"""The scorer's classes compute what `ClvpEncoder`, transformers' and ours, computes."""

import pytest
import torch

import clvp_fast
from clvp_fast import backend
from tests.models.clvp.builders import SHAPES, assert_same, codes, gradients, padding, pair, texts

DTYPES = [torch.float32, torch.float64]
ASKED = dict(output_hidden_states=True, output_attentions=True)


def scorer_of(composite) -> clvp_fast.CLVPModel:
    """Make the scorer with the weights of a full CLVP, transformers' or ours."""
    parts = (clvp_fast.ClvpEncoderConfig.from_dict(composite.config.text_config.to_dict()),)
    parts += (clvp_fast.ClvpEncoderConfig.from_dict(composite.config.speech_config.to_dict()),)
    scorer = clvp_fast.CLVPModel(clvp_fast.CLVPConfig.from_text_speech_configs(*parts))
    found = scorer.load_state_dict(composite.state_dict(), strict=False)
    assert not found.missing_keys
    assert {key.split(".")[0] for key in found.unexpected_keys} == {"conditioning_encoder", "speech_decoder_model"}
    return scorer.to(composite.dtype).eval()


def inputs(side: str = "none"):
    return texts(3, 7), codes(2, 11), padding(3, 7, side), padding(2, 11, side)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_output(shape, side, dtype):
    stock, ours = pair(shape=shape, dtype=dtype)
    scorer = scorer_of(ours)
    input_ids, speech_ids, text_mask, speech_mask = inputs(side)
    found = scorer(input_ids, speech_ids, text_mask, speech_mask, **ASKED)
    for composite in (stock, ours):
        text = composite.text_encoder_model(input_ids, attention_mask=text_mask, **ASKED)
        speech = composite.speech_encoder_model(speech_ids, attention_mask=speech_mask, **ASKED)
        assert text.embeds.std(0).mean() > 0.01 and speech.embeds.std(0).mean() > 0.01
        cosines = torch.cosine_similarity(text.embeds[:, None], speech.embeds[None], dim=-1)
        assert cosines.std() > 1e-3
        assert_same(found.logits_per_text, cosines * composite.logit_scale.exp())
        assert_same(found.logits_per_speech, cosines.t() * composite.logit_scale.exp())
        for name, expected in (("text", text), ("speech", speech)):
            assert_same(found[f"{name}_embeds"], torch.nn.functional.normalize(expected.embeds))
            assert_same(dict(found[f"{name}_model_output"]), {k: v for k, v in expected.items() if k != "embeds"})
        assert_same(scorer.get_text_features(input_ids, text_mask), text.embeds)
        assert_same(scorer.get_speech_features(speech_ids, attention_mask=speech_mask), speech.embeds)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_sides_alone(shape, side):
    stock, _ = pair(shape=shape)
    scorer = scorer_of(stock)
    input_ids, speech_ids, text_mask, speech_mask = inputs(side)
    for name, ids, mask in (("Text", input_ids, text_mask), ("Speech", speech_ids, speech_mask)):
        part = f"{name.lower()}_encoder_model"
        expected = getattr(stock, part)(ids, attention_mask=mask, **ASKED)
        config = getattr(scorer.config, f"{name.lower()}_config")
        for suffix, first in (("", "last_hidden_state"), ("WithProjection", f"{name.lower()}_embeds")):
            model = getattr(clvp_fast, f"CLVP{name}Model{suffix}")(config).eval()
            ignored = model.load_state_dict(scorer.state_dict(), strict=False)
            assert not ignored.missing_keys
            found = model(ids, attention_mask=mask, **ASKED)
            second = "last_hidden_state" if suffix else "pooler_output"
            assert list(found) == [first, second, "hidden_states", "attentions"]
            renamed = {f"{name.lower()}_embeds": "embeds"}
            assert_same(dict(found), {key: expected[renamed.get(key, key)] for key in found})
            assert_same(model(ids, mask, return_dict=False), tuple(found.values())[:2])


@torch.no_grad()
def test_tuples_and_options_of_the_configuration():
    scorer = scorer_of(pair()[1])
    input_ids, speech_ids, *_ = inputs()
    found = scorer(input_ids, speech_ids)
    assert found.text_model_output.hidden_states is None and found.loss is None
    flat = (*list(found.values())[:4], found.text_model_output.to_tuple(), found.speech_model_output.to_tuple())
    assert_same(scorer(input_ids, speech_ids, return_dict=False), flat)
    scorer.config.return_dict = scorer.config.text_config.return_dict = False
    assert_same(scorer(input_ids, speech_ids), flat)
    scorer.config.return_dict = True
    scorer.config.output_hidden_states = True
    found = scorer(input_ids, speech_ids)
    assert len(found.speech_model_output.hidden_states) == 3
    assert scorer(input_ids, speech_ids, output_hidden_states=False).text_model_output.hidden_states is None


def test_loss_and_gradients():
    """Against transformers' encoders, joined here by the definition of the loss."""
    stock, _ = pair(dtype=torch.float64)
    scorer = scorer_of(stock)
    scorer.gradient_checkpointing_enable()
    scorer.train()  # dropout is 0 in these shapes: training mode recomputes the layers, and changes no number
    input_ids, speech_ids = texts(3, 7), codes(3, 11)
    loss = scorer(input_ids, speech_ids, return_loss=True).loss
    loss.backward()

    text, speech = stock.text_encoder_model(input_ids).embeds, stock.speech_encoder_model(speech_ids).embeds
    logits = torch.cosine_similarity(text[:, None], speech[None], dim=-1) * stock.logit_scale.exp()
    expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    expected.backward()
    assert_same(loss, expected)
    assert_same(gradients(scorer), {k: v for k, v in gradients(stock).items() if k in gradients(scorer)})
    with pytest.raises(ValueError, match="got 3 texts and 2 clips: give equally many"):
        scorer(input_ids, speech_ids[:2], return_loss=True)


@torch.no_grad()
def test_through_the_kernels():
    scorer = scorer_of(pair()[1])
    input_ids, speech_ids = texts(2, 3), codes(2, 4)
    expected = scorer(input_ids, speech_ids).logits_per_text
    with backend("kernel"):
        assert_same(scorer(input_ids, speech_ids).logits_per_text, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types(dtype):
    scorer = scorer_of(pair()[1])
    input_ids, speech_ids, *_ = inputs()
    exact = scorer(input_ids, speech_ids)
    found = scorer.to(dtype)(input_ids, speech_ids)
    assert found.logits_per_text.dtype == dtype
    assert (found.speech_embeds - exact.speech_embeds).norm() < 0.03 * exact.speech_embeds.norm()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(input_ids=None), r"input_ids is missing: give token ids \[batch, length\]"),
        (dict(speech_ids=None), "speech_ids is missing"),
        (
            dict(input_ids=[1, 2]),
            r"input_ids must be token ids \[batch, length\], .* got torch.int64 \[2\]",
        ),
        (dict(speech_ids=[[]]), r"speech_ids must be token ids .* got torch.float32 \[1, 0\]"),
        (dict(speech_ids=[[1.0]]), "got torch.float32"),
        (dict(input_ids=[[1, 256]]), "input_ids must lie from 0 to 255, got 1 to 256"),
        (dict(speech_ids=[[1, 300]]), "speech_ids must lie from 0 to 299, got 1 to 300"),
        (dict(speech_ids=[[-1, 3]]), "speech_ids must lie from 0 to 299, got -1 to 3"),
        (dict(text_attention_mask=[[1, 1]]), r"attention_mask must be \[batch, 3\]"),
    ],
)
def test_bad_input(changed, message):
    scorer = scorer_of(pair()[1])
    given = dict(input_ids=[[1, 2, 3]], speech_ids=[[1, 2]]) | changed
    with pytest.raises(ValueError, match=message):
        scorer(**{name: None if value is None else torch.tensor(value) for name, value in given.items()})
