"""Checkpoints: the same keys, strictly loaded both ways, sub-models out of a composite one, the same random start."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import clvp_fast
from tests.models.clvp.builders import SHAPES, clips, composite_config, pair, texts

CLASSES = ["ClvpModelForConditionalGeneration", "ClvpForCausalLM", "ClvpModel", "ClvpDecoder", "ClvpEncoder"]
COMPOSITE = CLASSES[0]


def assert_equal_states(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_keys_shapes_and_order(name, shape):
    stock, ours = pair(name, shape)
    assert_equal_states(ours.state_dict(), stock.state_dict())
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in stock.named_parameters()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_saved_by_either_loads_in_the_other(name, shape, tmp_path):
    stock, ours = pair(name, shape)
    with torch.no_grad():  # weights in the layout that running leaves behind
        if name == COMPOSITE:
            ours(texts(), clips())
        else:
            ours(texts())
    for writer, package in ((stock, clvp_fast), (ours, transformers), (ours, clvp_fast)):
        folder = tmp_path / f"{type(writer).__module__}-{package.__name__}"
        writer.save_pretrained(folder)
        read, report = getattr(package, name).from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert_equal_states(read.state_dict(), stock.state_dict())
        assert not read.training
    files = [load_file(folder / "model.safetensors") for folder in sorted(tmp_path.iterdir())]
    assert all(file.keys() == files[0].keys() for file in files)


@pytest.mark.parametrize("name", CLASSES)
def test_saved_files_are_the_same(name, tmp_path):
    stock, ours = pair(name)
    written = []
    for model, folder in ((stock, tmp_path / "stock"), (ours, tmp_path / "ours")):
        model.save_pretrained(folder)
        written.append(json.loads((folder / "config.json").read_text()))
    assert written[1] == written[0]
    names = [{path.name for path in folder.iterdir()} for folder in (tmp_path / "stock", tmp_path / "ours")]
    assert names[0] == names[1]


def test_shards(tmp_path):
    stock, ours = pair()
    for writer, package, folder in ((stock, clvp_fast, tmp_path / "a"), (ours, transformers, tmp_path / "b")):
        writer.save_pretrained(folder, max_shard_size="1MB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        read, report = getattr(package, COMPOSITE).from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert_equal_states(read.state_dict(), stock.state_dict())


@pytest.mark.parametrize("writer", ["stock", "ours"])
@pytest.mark.parametrize("name", CLASSES[1:])
def test_part_of_a_composite_checkpoint(name, writer, tmp_path):
    """Load a part, where transformers silently makes a random model."""
    stock, ours = pair(shape="heads32")
    (stock if writer == "stock" else ours).save_pretrained(tmp_path)
    decoder = stock.speech_decoder_model
    expected = {
        "ClvpForCausalLM": decoder,
        "ClvpModel": decoder.model,
        "ClvpDecoder": decoder.model.decoder,
        "ClvpEncoder": stock.text_encoder_model,
    }[name]
    read, report = getattr(clvp_fast, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_equal_states(read.state_dict(), expected.state_dict())
    assert not read.training
    read.save_pretrained(tmp_path / "part")
    again = getattr(transformers, name).from_pretrained(tmp_path / "part")
    assert_equal_states(again.state_dict(), expected.state_dict())
    if name == "ClvpEncoder":
        speech = clvp_fast.ClvpEncoder.from_pretrained(tmp_path, config_type="speech_config")
        assert_equal_states(speech.state_dict(), stock.speech_encoder_model.state_dict())
        assert speech.config.vocab_size == 300


def test_missing_extra_and_misshapen_tensors_are_reported(tmp_path):
    from safetensors.torch import save_file

    _, ours = pair()
    ours.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["surplus"] = torch.zeros(2)
    del weights["logit_scale"]
    key = "speech_decoder_model.lm_head.bias"
    weights[key] = torch.zeros(7)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = clvp_fast.ClvpModelForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert set(report["missing_keys"]) == {"logit_scale"}
    assert set(report["unexpected_keys"]) == {"surplus"}
    assert {found[0] for found in report["mismatched_keys"]} == {key}


@pytest.mark.parametrize("shape", SHAPES)
def test_constants_of_a_new_model(shape):
    """Compare gains, biases, the scale, rotary frequencies, which are not random."""
    stock, ours = (
        getattr(package, COMPOSITE)(composite_config(package, shape)) for package in (transformers, clvp_fast)
    )
    constant = {key: value for key, value in stock.state_dict().items() if value.numel() == 1 or not is_random(key)}
    assert any(key.endswith("inv_freq") for key in constant) == ("rotary_pos_emb" in str(stock))
    assert_equal_states({key: ours.state_dict()[key] for key in constant}, constant)


def is_random(key: str) -> bool:
    return key.endswith("weight") and "norm" not in key
