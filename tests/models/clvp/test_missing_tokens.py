"""Configurations may lack start and end tokens: what needs one says so."""

import pytest

from clvp_fast import ClvpConfig, ClvpModelForConditionalGeneration
from tests.models.clvp.tiny import config_fields, tiny_inputs


def model_with(part: str, **tokens) -> ClvpModelForConditionalGeneration:
    fields = config_fields()
    fields[part] |= tokens
    return ClvpModelForConditionalGeneration(ClvpConfig(**fields)).eval()


@pytest.mark.parametrize("end", [None, [0, 1]])
def test_a_text_ends_with_one_token(end):
    model, (ids, features) = model_with("text_config", eos_token_id=end), tiny_inputs()
    message = r"the text encoder's eos_token_id, which ends a text, (is None: set it|names 2 tokens, not one)"
    for call in (model, model.generate, model.get_speech_features):
        with pytest.raises(ValueError, match=message):
            call(input_ids=ids, input_features=features)


@pytest.mark.parametrize("use_mask", [True, False])
def test_a_text_begins_with_a_token(use_mask):
    model, (ids, features) = model_with("text_config", bos_token_id=None), tiny_inputs()
    mask = {"attention_mask": ids.new_ones(ids.shape)} if use_mask else {}
    with pytest.raises(ValueError, match=r"the text encoder's bos_token_id, which .* begins with, is None: set it"):
        model.generate(ids, features, max_new_tokens=2, **mask)


@pytest.mark.parametrize("use_engine", [True, False])
def test_a_candidate_begins_with_a_start_token(use_engine):
    model, (ids, features) = model_with("decoder_config", bos_token_id=None), tiny_inputs()
    with pytest.raises(ValueError, match="a candidate begins with the decoder's bos_token_id, and that is None: set"):
        model.generate(ids, features, max_new_tokens=2, use_engine=use_engine)
