"""Configurations: transformers' fields, defaults and JSON, both ways."""

import json

import pytest
import transformers

import clvp_fast
from tests.models.clvp.builders import SHAPES, composite_config

PARTS = ["ClvpEncoderConfig", "ClvpDecoderConfig"]

CHANGES = {
    "ClvpEncoderConfig": {
        "vocab_size": 77,
        "hidden_act": "relu",
        "summary_type": "last",
        "pad_token_id": 3,
        "dropout": 0,
        "eos_token_id": [0, 4],
        "id2label": {0: "a", 1: "b", 2: "c"},
        "something_else": [1, {"deep": None}],
        "output_attentions": True,
        "dtype": "bfloat16",
    },
    "ClvpDecoderConfig": {
        "n_inner": 99,
        "summary_activation": "tanh",
        "use_cache": False,
        "decoder_fixing_codes": [1, 2, 3, 4],
        "bos_token_id": None,
        "architectures": ["ClvpForCausalLM"],
        "something_else": "kept",
        "return_dict": False,
    },
}


def documents(config, folder) -> list:
    """Return every JSON that a configuration can make."""
    config.save_pretrained(folder)
    saved = (folder / "config.json").read_text()
    return [config.to_dict(), config.to_diff_dict(), config.to_json_string(), json.loads(saved), saved]


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_parts(name, changed, tmp_path):
    fields = CHANGES[name] if changed else {}
    configs = [getattr(package, name)(**fields) for package in (transformers, clvp_fast)]
    stock, ours = (documents(config, tmp_path) for config in configs)
    assert ours == stock
    assert not changed or ours[0]["something_else"] == fields["something_else"]


@pytest.mark.parametrize("shape", SHAPES)
def test_composite(shape, tmp_path):
    stock, ours = (composite_config(package, shape) for package in (transformers, clvp_fast))
    for config in (stock, ours):
        config.logit_scale_init_value = 1.5
        config.something_else = "kept"
    assert documents(ours, tmp_path) == documents(stock, tmp_path)


def test_defaults_differ_in_the_speech_vocabulary_alone(tmp_path):
    """Give the speech encoder the 8192 rows of every checkpoint; transformers gives it 256 against 8194 codes."""
    stock, ours = transformers.ClvpConfig().to_dict(), clvp_fast.ClvpConfig().to_dict()
    assert (stock["speech_config"].pop("vocab_size"), ours["speech_config"].pop("vocab_size")) == (256, 8192)
    assert ours == stock
    # A speech configuration that was given is taken as it is.
    assert clvp_fast.ClvpConfig(speech_config={}).speech_config.vocab_size == 256


@pytest.mark.parametrize("shape", SHAPES)
def test_files_are_read_both_ways(shape, tmp_path):
    for writer, reader in ((transformers, clvp_fast), (clvp_fast, transformers)):
        written = composite_config(writer, shape)
        written.save_pretrained(tmp_path)
        assert reader.ClvpConfig.from_pretrained(tmp_path).to_dict() == written.to_dict()
        for part in ("text_config", "speech_config"):
            read = reader.ClvpEncoderConfig.from_pretrained(tmp_path, config_type=part).to_dict()
            same = writer.ClvpEncoderConfig.from_pretrained(tmp_path, config_type=part).to_dict()
            assert read == same and read["vocab_size"] == getattr(written, part).vocab_size
        decoder = reader.ClvpDecoderConfig.from_pretrained(tmp_path)
        assert decoder.max_position_embeddings == 80


def test_unknown_side_is_refused(tmp_path):
    clvp_fast.ClvpConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config_type"):
        clvp_fast.ClvpEncoderConfig.from_pretrained(tmp_path, config_type="decoder_config")


def test_from_sub_model_configs():
    """Documented, and gone from transformers 5."""
    parts = [
        clvp_fast.ClvpEncoderConfig(hidden_size=96),
        clvp_fast.ClvpEncoderConfig(hidden_size=192, vocab_size=300),
        clvp_fast.ClvpDecoderConfig(n_inner=50),
    ]
    config = clvp_fast.ClvpConfig.from_sub_model_configs(*parts, projection_dim=12)
    text, speech, decoder = (part.to_dict() for part in parts)
    expected = transformers.ClvpConfig(
        text_config=text, speech_config=speech, decoder_config=decoder, projection_dim=12
    )
    assert config.to_dict() == expected.to_dict()
    assert config.text_config is not parts[0]


@pytest.mark.parametrize("package", [transformers, clvp_fast])
def test_parts_may_be_objects_or_dictionaries(package):
    as_object = package.ClvpConfig(text_config=package.ClvpEncoderConfig(hidden_size=96))
    as_dict = package.ClvpConfig(text_config={"hidden_size": 96})
    assert as_object.to_dict() == as_dict.to_dict()
    assert isinstance(as_dict.text_config, package.ClvpEncoderConfig)


def test_own_options_are_written_only_where_set(tmp_path):
    config = composite_config(clvp_fast)
    assert "pool_padding" not in json.dumps(config.to_dict()) and "contiguous" not in json.dumps(config.to_dict())
    config.text_config.pool_padding = False
    config.decoder_config.contiguous_positions = True
    config.save_pretrained(tmp_path)
    read = clvp_fast.ClvpConfig.from_pretrained(tmp_path)
    assert read.text_config.pool_padding is False and read.decoder_config.contiguous_positions is True
    # transformers carries what it does not know along.
    transformers.ClvpConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert clvp_fast.ClvpConfig.from_pretrained(tmp_path).decoder_config.contiguous_positions is True
