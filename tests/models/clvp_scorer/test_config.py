"""Configurations of the scorer: defaults, parts, files, random weights."""

import pytest
import torch

import clvp_fast
from clvp_fast import CLVPConfig, CLVPModel, CLVPSpeechConfig, CLVPTextConfig
from tests.models.clvp.builders import composite_config

SMALL = dict(hidden_size=64, intermediate_size=96, projection_dim=64, num_hidden_layers=2, num_attention_heads=2)


def test_defaults_are_those_of_the_encoders():
    encoder = clvp_fast.ClvpEncoderConfig().to_dict() | {"model_type": None}
    assert CLVPTextConfig().to_dict() | {"model_type": None} == encoder
    assert CLVPSpeechConfig().to_dict() | {"model_type": None} == encoder | {"vocab_size": 8192}
    config = CLVPConfig()
    assert (config.text_config.vocab_size, config.speech_config.vocab_size) == (256, 8192)
    assert (config.projection_dim, config.logit_scale_init_value) == (768, 2.6592)


def test_from_text_speech_configs():
    text, speech = CLVPTextConfig(**SMALL), CLVPSpeechConfig(**SMALL, num_channels=3)
    config = CLVPConfig.from_text_speech_configs(text, speech, logit_scale_init_value=1.5)
    assert type(config.text_config) is CLVPTextConfig and type(config.speech_config) is CLVPSpeechConfig
    assert config.text_config.to_dict() == text.to_dict() and config.text_config is not text
    assert config.speech_config.to_dict() == speech.to_dict()
    assert (config.projection_dim, config.logit_scale_init_value) == (64, 1.5)


def test_parts_of_the_full_model():
    """Make a `ClvpEncoderConfig` the class of its side, with its own defaults and extra fields."""
    full = composite_config(clvp_fast)
    full.text_config.pool_padding = False
    config = CLVPConfig(text_config=full.text_config, speech_config=clvp_fast.ClvpEncoderConfig(projection_dim=128))
    assert type(config.text_config) is CLVPTextConfig and config.text_config.pool_padding is False
    assert type(config.speech_config) is CLVPSpeechConfig and config.speech_config.vocab_size == 256


def test_files(tmp_path):
    text, speech = CLVPTextConfig(**SMALL), CLVPSpeechConfig(**SMALL, vocab_size=300)
    config = CLVPConfig.from_text_speech_configs(text, speech)
    config.save_pretrained(tmp_path)
    assert CLVPConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert CLVPTextConfig.from_pretrained(tmp_path).to_dict() == text.to_dict()
    assert CLVPSpeechConfig.from_pretrained(tmp_path).to_dict() == speech.to_dict()
    changed, unused = CLVPConfig.from_pretrained(
        tmp_path, logit_scale_init_value=2.0, other=1, return_unused_kwargs=True
    )
    assert changed.logit_scale_init_value == 2.0 and unused == {"other": 1}


def test_widths_that_do_not_fit():
    text, speech = CLVPTextConfig(**SMALL), CLVPSpeechConfig(**SMALL | {"projection_dim": 32})
    with pytest.raises(ValueError, match=r"is 64, 64 in text_config and 32 in speech_config: .* same width"):
        CLVPConfig.from_text_speech_configs(text, speech)
    with pytest.raises(ValueError, match="projection_dim is 7, 64 in text_config and 64 in speech_config"):
        CLVPConfig.from_text_speech_configs(text, CLVPSpeechConfig(**SMALL), projection_dim=7)


def test_random_weights_spread_as_those_of_the_full_model():
    full_config = composite_config(clvp_fast, initializer_factor=0.5)
    full_config.initializer_factor = 0.5
    config = CLVPConfig(
        text_config=full_config.text_config, speech_config=full_config.speech_config, initializer_factor=0.5
    )
    torch.manual_seed(0)
    found = CLVPModel(config).state_dict()
    expected = clvp_fast.ClvpModelForConditionalGeneration(full_config).state_dict()
    for name, value in found.items():
        if value.numel() < 1000:
            assert torch.equal(value, expected[name]), name  # norms, biases, frequencies, the scale
        else:
            assert abs(value.std() / expected[name].std() - 1) < 0.1, name
