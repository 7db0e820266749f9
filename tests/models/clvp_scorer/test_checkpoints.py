"""Checkpoints of the scorer's classes: out of a full CLVP, of clvp2.pth, of their own and of each other."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import clvp_fast
from clvp_fast import convert_tortoise_scorer
from tests.models.clvp import tortoise_files as original
from tests.models.clvp.builders import SHAPES, assert_same, codes, composite_config, pair, texts

SIDES = {
    "CLVPTextModel": "text_encoder_model",
    "CLVPTextModelWithProjection": "text_encoder_model",
    "CLVPSpeechModel": "speech_encoder_model",
    "CLVPSpeechModelWithProjection": "speech_encoder_model",
}
CLASSES = ["CLVPModel", *SIDES]


def share(name: str, state: dict) -> dict:
    """Return the tensors of a full CLVP that a class holds."""
    prefixes = ("text_encoder_model.", "speech_encoder_model.", "logit_scale")
    if name != "CLVPModel":
        prefixes = (SIDES[name] + ".",)
    without = () if name == "CLVPModel" or name.endswith("Projection") else (f"{SIDES[name]}.projection.weight",)
    return {key: value for key, value in state.items() if key.startswith(prefixes) and key not in without}


def load(name: str, folder, **options):
    model, report = getattr(clvp_fast, name).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    assert not model.training
    return model


def assert_states(model, expected: dict) -> None:
    state = model.state_dict()
    assert sorted(state) == sorted(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_out_of_a_full_checkpoint_and_through_its_own(name, shape, tmp_path):
    stock, ours = pair(shape=shape)
    for writer in (stock, ours):
        folder = tmp_path / type(writer).__module__
        writer.save_pretrained(folder)
        model = load(name, folder)
        assert_states(model, share(name, stock.state_dict()))
        model.save_pretrained(folder / "own")
        assert set(load_file(folder / "own/model.safetensors")) == set(model.state_dict())
        again = load(name, folder / "own")
        assert_states(again, model.state_dict())
        assert again.config.to_json_string() == model.config.to_json_string()


@pytest.mark.parametrize("name", SIDES)
def test_a_side_out_of_the_scorer_and_out_of_an_encoder(name, tmp_path):
    stock, ours = pair()
    stock.save_pretrained(tmp_path / "full")
    load("CLVPModel", tmp_path / "full").save_pretrained(tmp_path / "scorer")
    getattr(stock, SIDES[name]).save_pretrained(tmp_path / "encoder")
    getattr(ours, SIDES[name]).save_pretrained(tmp_path / "ours")
    for folder in ("scorer", "encoder", "ours"):
        model = load(name, tmp_path / folder)
        assert_states(model, share(name, stock.state_dict()))
        assert model.config.vocab_size == getattr(stock, SIDES[name]).config.vocab_size


def test_the_text_model_with_and_without_projection(tmp_path):
    pair()[0].save_pretrained(tmp_path / "full")
    with_projection = load("CLVPTextModelWithProjection", tmp_path / "full")
    with_projection.save_pretrained(tmp_path / "with")
    assert_states(load("CLVPTextModel", tmp_path / "with"), share("CLVPTextModel", with_projection.state_dict()))


def test_shards_and_half_types(tmp_path):
    stock, _ = pair()
    stock.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_states(load("CLVPModel", tmp_path), share("CLVPModel", stock.state_dict()))
    half = load("CLVPModel", tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.text_encoder_model.rotary_pos_emb.inv_freq.dtype == torch.float32


@torch.no_grad()
def test_options_of_this_project_come_along(tmp_path):
    """Keep `pool_padding` of a full checkpoint in the scorer, through its own file too."""
    _, ours = pair()
    ours.config.text_config.pool_padding = False
    ours.save_pretrained(tmp_path / "full")
    scorer = load("CLVPModel", tmp_path / "full")
    scorer.save_pretrained(tmp_path / "scorer")
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    for model in (scorer, load("CLVPModel", tmp_path / "scorer")):
        assert_same(model.get_text_features(texts(1), mask), model.get_text_features(texts(1)[:, :4]))


def test_fields_that_a_full_configuration_leaves_out_are_its_own_defaults(tmp_path):
    """Read a file that omits the speech encoder's rows: a full CLVP then has 256, the scorer 8192."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clvp", "speech_config": {"hidden_size": 384}}))
    stock = transformers.ClvpConfig.from_pretrained(tmp_path)
    for config in (
        clvp_fast.CLVPConfig.from_pretrained(tmp_path).speech_config,
        clvp_fast.CLVPSpeechConfig.from_pretrained(tmp_path),
    ):
        assert (config.vocab_size, config.hidden_size) == (256, 384)
        assert (stock.speech_config.vocab_size, stock.speech_config.hidden_size) == (256, 384)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clvp_encoder"}))
    assert clvp_fast.CLVPSpeechConfig.from_pretrained(tmp_path).vocab_size == 256
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clvp_speech_model"}))
    assert clvp_fast.CLVPSpeechConfig.from_pretrained(tmp_path).vocab_size == 8192


@torch.no_grad()
def test_tortoise_file(tmp_path):
    state = original.clvp_state(dtype=torch.float64)
    torch.save(state, tmp_path / "clvp2.pth")
    model = convert_tortoise_scorer(tmp_path / "clvp2.pth")
    assert not model.training and model.dtype == model.config.dtype == torch.float64
    text = torch.nn.functional.pad(texts(1, 9), (0, 1))
    speech = codes(4, 12)
    expected = torch.cat([original.clvp_score(state, text, row[None]) for row in speech], 1)
    assert expected.std() > 0.01
    # The original's norms differ by their epsilon, as in the conversion of a full CLVP.
    torch.testing.assert_close(model(text, speech).logits_per_text, expected, rtol=0, atol=3e-4)

    full = clvp_fast.convert_tortoise_checkpoint(original.autoregressive_state(dtype=torch.float64), state)
    assert_states(model, share("CLVPModel", full.state_dict()))
    assert model.config.text_config.to_dict() | {"model_type": "clvp_encoder"} == full.config.text_config.to_dict()
    model = convert_tortoise_scorer(original.clvp_state())
    model.save_pretrained(tmp_path / "scorer")
    assert_states(load("CLVPModel", tmp_path / "scorer"), model.state_dict())
    half = convert_tortoise_scorer(state, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.text_encoder_model.rotary_pos_emb.inv_freq.dtype == torch.float32


def test_bad_tortoise_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        convert_tortoise_scorer(tmp_path / "clvp2.pth")
    with pytest.raises(ValueError, match=r"lacks to_text_latent\.weight.*: is it the right file"):
        convert_tortoise_scorer(original.autoregressive_state())
    with pytest.raises(ValueError, match="has more, which this kind"):
        convert_tortoise_scorer(original.clvp_state() | {"more": torch.zeros(1)})


@pytest.mark.parametrize("name", ["ClvpModelForConditionalGeneration", "ClvpModel", "ClvpForCausalLM", "ClvpEncoder"])
def test_a_scorers_checkpoint_is_not_taken_for_a_full_one(name, tmp_path):
    pair()[0].save_pretrained(tmp_path / "full")
    load("CLVPModel", tmp_path / "full").save_pretrained(tmp_path / "scorer")
    with pytest.raises(ValueError, match=r"holds the scorer CLVPModel, .*: load it with CLVPModel"):
        getattr(clvp_fast, name).from_pretrained(tmp_path / "scorer")


def test_a_decoders_checkpoint_is_not_taken_for_a_scorers(tmp_path):
    _, ours = pair()
    ours.speech_decoder_model.model.save_pretrained(tmp_path / "decoder")
    load("CLVPModel", _saved(ours, tmp_path)).save_pretrained(tmp_path / "scorer")
    load("CLVPTextModel", tmp_path / "scorer").save_pretrained(tmp_path / "text")
    for name, folder, kind in (
        ("CLVPModel", "decoder", "clvp_decoder"),
        ("CLVPModel", "text", "clvp_text_model"),
        ("CLVPSpeechModel", "text", "clvp_text_model"),
        ("CLVPTextModel", "decoder", "clvp_decoder"),
    ):
        message = f"{folder} is a checkpoint of model_type '{kind}', and {name.replace('Model', 'Config')} reads clvp, "
        with pytest.raises(ValueError, match=message + ".*Clvp... those of the full model"):
            getattr(clvp_fast, name).from_pretrained(tmp_path / folder)


def _saved(model, folder):
    model.save_pretrained(folder / "full")
    return folder / "full"


def test_a_configuration_of_the_other_case():
    with pytest.raises(TypeError, match=r"CLVPModel takes a CLVPConfig, not a ClvpConfig: CLVP\.\.\. are"):
        clvp_fast.CLVPModel(composite_config(clvp_fast))
    with pytest.raises(TypeError, match="CLVPTextModel takes a CLVPTextConfig, not a CLVPConfig"):
        clvp_fast.CLVPTextModel(clvp_fast.CLVPConfig())
    with pytest.raises(TypeError, match="takes a CLVPSpeechConfig, not a CLVPTextConfig"):
        clvp_fast.CLVPSpeechModel(clvp_fast.CLVPTextConfig())
