"""`convert`, then the other commands with what it wrote: original files to candidates."""

import json

import numpy as np
import pytest
import torch

from clvp_fast.demo import random_checkpoint
from tests.models.clvp import tortoise_files

TEXT = "hello there"


@pytest.fixture
def files(tmp_path):
    """Give the two original checkpoints, small, with a vocabulary and mel norms beside them."""
    folder = tmp_path / "original"
    folder.mkdir()
    torch.save(tortoise_files.autoregressive_state(), folder / "autoregressive.pth")
    torch.save(tortoise_files.clvp_state(), folder / "clvp2.pth")
    torch.save(torch.linspace(0.5, 2.0, tortoise_files.MELS), folder / "mel_norms.pth")
    vocabulary = json.loads((random_checkpoint() / "vocab.json").read_text())
    merges = (random_checkpoint() / "merges.txt").read_text().splitlines()[1:]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}))
    return folder


def convert(files, out) -> tuple:
    return ("convert", "--autoregressive", files / "autoregressive.pth", "--clvp", files / "clvp2.pth", "--out", out)


def test_original_files_to_candidates(cli, files, voice, tmp_path):
    outcome = cli(*convert(files, tmp_path / "checkpoint"))
    assert outcome.code == 0, outcome.err
    assert "note:" not in outcome.err
    assert f"wrote {tmp_path}/checkpoint/model.safetensors" in outcome.out

    at = ("--checkpoint", tmp_path / "checkpoint")
    outcome = cli("generate", TEXT, "--voice", voice, *at, "--out", tmp_path / "out", "--num-candidates", 3, "--json")
    assert outcome.code == 0, outcome.err
    assert "random weights" not in outcome.err
    document = json.loads(outcome.out)
    assert document["settings"]["max_new_tokens"] == 64  # a position each, the first of them the start token's
    outcome = cli("score", tmp_path / "out/codes.npz", TEXT, *at, "--json")
    assert outcome.code == 0, outcome.err
    np.testing.assert_allclose(
        [row["score"] for row in json.loads(outcome.out)["candidates"]],
        [row["score"] for row in document["candidates"]],
        rtol=1e-4,
        atol=1e-4,
    )
    assert cli("mel", voice, *at, "--out", tmp_path / "out").code == 0
    assert np.load(tmp_path / "out/voice.npy").shape[0] == tortoise_files.MELS


def test_missing_companion_files_are_noted(cli, files, voice, tmp_path, fails):
    (files / "tokenizer.json").unlink()
    (files / "mel_norms.pth").unlink()
    outcome = cli(*convert(files, tmp_path / "checkpoint"))
    assert outcome.code == 0
    assert "note: no tokenizer.json" in outcome.err and "note: no mel_norms.pth" in outcome.err
    sentence = fails(
        "generate", TEXT, "--voice", voice, "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "o"
    )
    assert sentence == (
        f"checkpoint {tmp_path}/checkpoint has no vocab.json: put it there, or give the folder of a whole checkpoint"
    )


@pytest.mark.parametrize("name", ["autoregressive.pth", "clvp2.pth"])
def test_damaged_and_missing_files(fails, files, tmp_path, name):
    whole = (files / name).read_bytes()
    (files / name).write_bytes(whole[: len(whole) // 2])
    assert name in fails(*convert(files, tmp_path / "checkpoint"))
    (files / name).unlink()
    assert name in fails(*convert(files, tmp_path / "checkpoint"))
    assert not (tmp_path / "checkpoint").exists()


def test_the_wrong_way_round(fails, files, tmp_path):
    (files / "autoregressive.pth").rename(files / "other.pth")
    (files / "clvp2.pth").rename(files / "autoregressive.pth")
    (files / "other.pth").rename(files / "clvp2.pth")
    assert "is it the right file of Tortoise" in fails(*convert(files, tmp_path / "checkpoint"))
