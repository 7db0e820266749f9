"""Checkpoints that are not whole or not there: one clear sentence, exit code 1, and no file written."""

import json
import logging
import shutil

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file

from clvp_fast.cli import main
from clvp_fast.cli.report import quiet_transformers
from clvp_fast.demo import build_random
from tests.cli.conftest import ROOT, TEXT


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    build_random(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def checkpoint_fails(generate_fails, voice, folder):
    return lambda: generate_fails(TEXT, voice, "--checkpoint", folder)


@pytest.mark.parametrize(
    "name", ["config.json", "vocab.json", "merges.txt", "preprocessor_config.json", "model.safetensors"]
)
def test_missing_file(checkpoint_fails, folder, name):
    (folder / name).unlink()
    sentence = checkpoint_fails()
    assert str(folder) in sentence and name in sentence
    if name != "model.safetensors":
        assert sentence.endswith(": put it there, or give the folder of a whole checkpoint")


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_truncated_file(checkpoint_fails, folder, name, keep):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * keep)])
    sentence = checkpoint_fails()
    assert f"{folder}/{name} is damaged" in sentence


def test_superfluous_weights(checkpoint_fails, folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "both model.safetensors and model.safetensors.index.json" in checkpoint_fails()


def test_shards_that_do_not_match_the_index(checkpoint_fails, folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00002-of-00002.safetensors" in checkpoint_fails()
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00003-of-00002.safetensors")
    assert "holds model-00003-of-00002.safetensors" in checkpoint_fails()


NORM = "speech_decoder_model.final_norm.weight"


def test_missing_superfluous_and_misshapen_tensors(checkpoint_fails, folder):
    tensors = load_file(folder / "model.safetensors")

    def saved(**changed):
        save_file(
            {key: value for key, value in (tensors | changed).items() if value is not None},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )

    saved(**{NORM: None})
    assert f"lacks tensors: {NORM}" in checkpoint_fails()
    saved(extra=torch.ones(3))
    assert "holds tensors that CLVP does not have: extra" in checkpoint_fails()
    saved(**{NORM: torch.ones(7)})
    assert f"of another shape than its config.json says: {NORM} [7] instead of [128]" in checkpoint_fails()
    saved()
    assert main(["generate", TEXT, "--voice", str(ROOT / "examples/voice.flac"), "--checkpoint", str(folder),
                 "--out", str(folder / "out"), "--num-candidates", "1", "--max-new-tokens", "4"]) == 0  # fmt: skip


def test_vocabulary_larger_than_the_embedding(checkpoint_fails, folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["zzz"] = 300
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert "vocab.json numbers 301 tokens, and config.json has rows for 256" in checkpoint_fails()


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_attention_heads": 3}, {"vocab_size": 100}])
def test_configuration_that_cannot_be(checkpoint_fails, folder, change):
    config = json.loads((folder / "config.json").read_text())
    config["decoder_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    assert checkpoint_fails().startswith(f"checkpoint {folder} ")


def test_no_such_checkpoint(generate_fails, voice, tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        assert "there is no checkpoint folder" in generate_fails(TEXT, voice, "--checkpoint", name)
    (tmp_path / "clvp2.pth").write_bytes(b"x")
    assert "a checkpoint is a folder" in generate_fails(TEXT, voice, "--checkpoint", tmp_path / "clvp2.pth")


def test_hub_id_that_cannot_be_had(generate_fails, voice, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = generate_fails(TEXT, voice, "--checkpoint", "nobody/nothing-of-this-name")
    assert sentence == (
        "checkpoint nobody/nothing-of-this-name cannot be loaded: it is not in the cache, and the hub cannot be "
        "reached; download it first, or give a folder"
    )


def test_retries_of_the_hub_are_not_shown():
    hub_logging.set_verbosity_warning()
    quiet_transformers()
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
