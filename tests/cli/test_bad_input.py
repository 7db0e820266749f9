"""Bad input: one clear sentence, exit code 1, and no file written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from clvp_fast import ClvpFeatureExtractor, files
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.cli import main
from clvp_fast.demo import build_demo
from clvp_fast.engine.runner import Runner
from tests.cli.conftest import ROOT
from tests.kit.waiting import BOUND

TEXT = "The birch canoe slid on the smooth planks."
QUICK = ("--num-candidates", 2, "--max-new-tokens", 8)


@pytest.fixture
def generate_fails(fails, voice, tmp_path):
    """Runs `generate` with something bad, asserts that nothing was written, and returns the sentence."""

    def run(text=TEXT, clip=voice, *argv):
        sentence = fails("generate", text, "--voice", clip, "--out", tmp_path / "out", *QUICK, *argv)
        assert not (tmp_path / "out").exists()
        return sentence

    return run


@pytest.fixture
def write_clip(tmp_path):
    def write(samples, rate=22050, name="clip.wav"):
        soundfile.write(tmp_path / name, samples, rate, subtype="FLOAT")
        return tmp_path / name

    return write


# Text


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_empty_text(generate_fails, text):
    assert generate_fails(text) == "the text is empty; give the sentence that is to be said"


def test_text_over_the_limit(generate_fails):
    sentence = generate_fails("a b " * 150)
    assert sentence.startswith("the text is too long: ") and "this checkpoint takes 401" in sentence


@pytest.mark.parametrize("cleaning, text", [("transformers", "你好，世界"), ("tortoise", "😀 🎉"), ("tortoise", "{}")])
def test_text_of_unknown_characters(generate_fails, voice, cleaning, text):
    sentence = generate_fails(text, voice, "--text-cleaning", cleaning)
    assert sentence.startswith("nothing of the text ") and text in sentence


def test_unknown_characters_are_named(cli, voice, tmp_path):
    text = "A café costs $5, {really} 😀😀!"
    outcome = cli("generate", text, "--voice", voice, "--out", tmp_path, *QUICK)
    assert outcome.code == 0
    assert "characters that the checkpoint does not know were left out: { } 😀\n" in outcome.err


# Voice


def test_missing_voice(generate_fails, tmp_path):
    assert generate_fails(TEXT, tmp_path / "no.wav") == f"there is no recording at {tmp_path}/no.wav"


def test_unreadable_voice(generate_fails, tmp_path):
    (tmp_path / "clip.wav").write_text("not a sound")
    assert "cannot be read as a recording (WAV, FLAC, MP3 or OGG)" in generate_fails(TEXT, tmp_path / "clip.wav")
    assert f"{tmp_path}/clip.wav cannot be read as a recording" in generate_fails(TEXT, tmp_path), "one of a folder's"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/a.wav").symlink_to(tmp_path / "gone.wav")
    assert f"there is no recording at {tmp_path}/linked/a.wav" in generate_fails(TEXT, tmp_path / "linked")
    (tmp_path / "speakers" / "someone").mkdir(parents=True)
    shutil.copy(ROOT / "examples/voice.flac", tmp_path / "speakers" / "someone")
    assert "has no recordings in it" in generate_fails(TEXT, tmp_path / "speakers"), "those below are other speakers'"


def test_empty_nan_and_silent_voice(generate_fails, write_clip):
    assert "is empty" in generate_fails(TEXT, write_clip(np.zeros(0)))
    assert "NaN" in generate_fails(TEXT, write_clip(np.full(22050, np.nan)))
    assert "is silent" in generate_fails(TEXT, write_clip(np.zeros(22050)))
    late = np.zeros(8 * 22050)
    late[-22050:] = 0.5
    assert "its first 6 s are silent" in generate_fails(TEXT, write_clip(late))


def test_stereo_and_resampled_voice_is_noted(cli, write_clip, tmp_path):
    clip = write_clip(np.random.default_rng(0).normal(size=(16000, 2)) * 0.1, rate=16000)
    outcome = cli("generate", TEXT, "--voice", clip, "--out", tmp_path / "out", *QUICK)
    assert outcome.code == 0
    for remark in ("2 channels mixed down to one", "resampled from 16000 Hz to 22050 Hz"):
        assert f"note: {clip}: {remark}\n" in outcome.err


def test_wrong_sampling_rate_given_as_such():
    with pytest.raises(ValueError, match=r"22050.*16000|16000.*22050"):
        ClvpFeatureExtractor()(np.ones(16000, np.float32), sampling_rate=16000)


def test_mel_refuses_the_same(fails, write_clip, tmp_path):
    out = tmp_path / "out"
    assert "there is no recording" in fails("mel", tmp_path / "no.wav", "--out", out)
    assert "is silent" in fails("mel", write_clip(np.zeros(22050)), "--out", out)
    assert not out.exists()


# Numbers


def test_unequal_counts_of_texts_and_clips():
    model = load_checkpoint("demo").model
    ids = torch.full((2, 4), 20)
    with pytest.raises(ValueError, match=r"2 .*3 "):
        model.generate(ids, torch.randn(3, 80, 517), max_new_tokens=2)


def test_more_tokens_than_positions(fails, voice, tmp_path):
    sentence = fails("generate", TEXT, "--voice", voice, "--out", tmp_path / "out", "--max-new-tokens", 608)
    assert sentence == "--max-new-tokens 608: this checkpoint has positions for 607 speech tokens"


def test_greedy_candidates(fails, voice, tmp_path):
    sentence = fails("generate", TEXT, "--voice", voice, "--out", tmp_path / "out", "--greedy", "--num-candidates", 2)
    assert "--greedy gives one candidate" in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there(generate_fails, voice):
    assert "torch sees no CUDA device here" in generate_fails(TEXT, voice, "--device", "cuda")


# Codes


@pytest.mark.parametrize(
    "content, expected",
    [
        ([[1, 2], [3]], "every list of codes must have the same length"),
        ([], "codes must be whole numbers [candidates, length]"),
        ([[1.5, 2.0]], "codes must be whole numbers"),
        ([[1, 9000]], "codes must lie from 0 to 8193 for this checkpoint, got 1 to 9000"),
        ([[-1, 2]], "codes must lie from 0 to 8193"),
        ({"scores": [1]}, "has no array named 'codes'"),
    ],
)
def test_bad_codes(fails, tmp_path, content, expected):
    (tmp_path / "codes.json").write_text(json.dumps(content))
    assert expected in fails("score", tmp_path / "codes.json", TEXT)


def test_unreadable_codes(fails, tmp_path):
    assert "there is no file of codes" in fails("score", tmp_path / "no.npz", TEXT)
    for name in ("codes.npz", "codes.npy", "codes.json"):
        (tmp_path / name).write_text("{ not this")
        assert "cannot be read as .npz, .npy or .json" in fails("score", tmp_path / name, TEXT)
    np.savez(tmp_path / "other.npz", scores=np.ones(3))
    assert "has no array named 'codes'" in fails("score", tmp_path / "other.npz", TEXT)


# Checkpoint


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    build_demo(tmp_path / "checkpoint")
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


def test_too_little_memory_for_one_candidate(generate_fails, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr("clvp_fast.engine.runner.Runner.decode", full)
    assert generate_fails().startswith("there is too little memory for a single candidate; ")


def test_budget_too_small_for_one_candidate(generate_fails, voice):
    sentence = generate_fails(TEXT, voice, "--memory-fraction", 1e-6)
    assert sentence.startswith("one candidate of 8 tokens behind a prompt of ") and "may be used" in sentence


def test_memory_that_runs_out_on_the_way(cli, voice, tmp_path, monkeypatch):
    decode, calls = Runner.decode, []

    def full_at_first(self, num_slots):
        calls.append(num_slots)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return decode(self, num_slots)

    outcomes = []
    for name in ("whole", "halved"):
        outcomes.append(cli("generate", TEXT, "--voice", voice, "--out", tmp_path / name, *QUICK))
        assert outcomes[-1].code == 0, outcomes[-1].err
        monkeypatch.setattr(Runner, "decode", full_at_first)
    assert "memory ran out on the way: the rest was decoded 1 at a time" in outcomes[1].err
    whole, halved = (np.load(tmp_path / name / "codes.npz")["codes"] for name in ("whole", "halved"))
    np.testing.assert_array_equal(whole, halved)


def test_no_such_checkpoint(generate_fails, voice, tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        assert "there is no checkpoint folder" in generate_fails(TEXT, voice, "--checkpoint", name)
    (tmp_path / "clvp2.pth").write_bytes(b"x")
    assert "a checkpoint is a folder" in generate_fails(TEXT, voice, "--checkpoint", tmp_path / "clvp2.pth")


def test_hub_id_that_cannot_be_had(generate_fails, voice, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = generate_fails(TEXT, voice, "--checkpoint", "nobody/nothing-of-this-name")
    assert sentence.startswith("checkpoint nobody/nothing-of-this-name cannot be loaded: ")


# Output


@pytest.mark.parametrize("command", ["generate", "mel", "convert"])
def test_unwritable_folder(fails, voice, tmp_path, command):
    (tmp_path / "out").write_text("a file")
    argv = {
        "generate": ("generate", TEXT, "--voice", voice, *QUICK),
        "mel": ("mel", voice),
        "convert": ("convert", "--autoregressive", tmp_path / "a.pth", "--clvp", tmp_path / "c.pth"),
    }[command]
    sentence = fails(*argv, "--out", tmp_path / "out")
    assert sentence == (
        f"cannot write into {tmp_path}/out: a file stands where the folder should be; choose another folder"
    )
    assert (tmp_path / "out").read_text() == "a file"


def test_unwritable_place_for_the_voice(generate_fails, voice, tmp_path):
    (tmp_path / "a file").write_text("a file")
    sentence = generate_fails(TEXT, voice, "--save-voice", tmp_path / "a file" / "anna.safetensors")
    assert sentence.startswith(f"cannot write into {tmp_path}/a file: a file stands where the folder should be")
    sentence = generate_fails(TEXT, voice, "--save-voice", tmp_path)
    assert sentence == f"--save-voice needs a file, and {tmp_path} is a folder; name a file in it"
    saved = tmp_path / "voices" / "anna.safetensors"
    generate_fails("{}", voice, "--save-voice", saved)
    assert not saved.parent.exists(), "a text that fails saves no voice either"


def test_full_disk_keeps_the_old_results(cli, fails, voice, tmp_path, monkeypatch):
    argv = ("generate", TEXT, "--voice", voice, "--out", tmp_path, *QUICK)
    assert cli(*argv).code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        sentence = fails(*argv, "--seed", 5)
    assert sentence == f"cannot write into {tmp_path}: the disk is full; free some space or choose another folder"
    with monkeypatch.context() as patch:
        patch.setattr("clvp_fast.cli.results.draw_candidates", full)
        assert "the disk is full" in fails(*argv, "--seed", 5)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_cache_that_cannot_be_written(cli, voice, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("CLVP_FAST_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=f"for this run alone: cannot write into {tmp_path}/cache: "):
        outcome = cli("generate", TEXT, "--voice", voice, "--out", tmp_path / "out", *QUICK)
    assert outcome.code == 0
    assert (tmp_path / "out/codes.npz").exists()


def test_interrupt_in_process(cli, voice, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("clvp_fast.cli.results.draw_candidates", interrupt)
    outcome = cli("generate", TEXT, "--voice", voice, "--out", tmp_path / "out", *QUICK)
    assert outcome.code == 130
    assert outcome.err.endswith("clvp-fast: interrupted; nothing was written\n")
    assert not (tmp_path / "out").exists()


def test_ctrl_c(voice, tmp_path):
    command = [
        sys.executable,
        "-m",
        "clvp_fast",
        "generate",
        TEXT,
        "--voice",
        str(voice),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(
        [*command, "--num-candidates", "4000", "--batch-size", "8"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        noted = process.stderr.readline()  # decoding is about to begin
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    assert "random weights" in noted
    assert process.returncode == 130
    assert rest.endswith("clvp-fast: interrupted; nothing was written\n") and "Traceback" not in rest
    assert not (tmp_path / "out").exists()


def test_debug_shows_where(voice, tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["mel", str(tmp_path / "no.wav"), "--out", str(tmp_path / "out"), "--debug"])
