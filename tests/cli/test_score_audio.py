"""`score --model clap`: recordings ranked against texts, as the model scores them."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import clvp_fast
from clvp_fast.audio import load_audio
from tests.models.clap.builders import randomize
from tests.models.clap.test_processing import tokenizer

TEXTS = ["a dog barks", "the sound of rain on a roof"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Give a small random CLAP with fusion, of clips of a second."""
    folder = tmp_path_factory.mktemp("clap")
    extractor = clvp_fast.ClapFeatureExtractor(max_length_s=1, frequency_max=20000)
    clvp_fast.ClapProcessor(extractor, tokenizer(tmp_path_factory.mktemp("vocabulary"))).save_pretrained(folder)
    text = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    audio = dict(patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[1, 2], hidden_size=32, spec_size=128)
    config = clvp_fast.ClapConfig(text_config=text, audio_config=audio | dict(enable_fusion=True), projection_dim=16)
    randomize(clvp_fast.ClapModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Give a folder of recordings of several rates and lengths, one of them in a folder of its own."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "more").mkdir()
    for seed, (name, rate, seconds) in enumerate(
        (("short.wav", 48000, 0.4), ("more/long.flac", 44100, 2.5), ("other.ogg", 16000, 1.0))
    ):
        noise = np.random.default_rng(seed).standard_normal(int(rate * seconds))
        tone = np.sin(2 * np.pi * 300 * (seed + 1) * np.arange(len(noise)) / rate)
        soundfile.write(folder / name, 0.3 * tone + 0.03 * noise, rate)
    return folder


def expected_scores(checkpoint, paths):
    """Return texts by recordings, each recording by itself through the classes."""
    model = clvp_fast.ClapModel.from_pretrained(checkpoint)
    processor = clvp_fast.ClapProcessor.from_pretrained(checkpoint)
    columns = []
    for path in paths:
        samples, _ = load_audio(path, 48000)
        inputs = processor(
            text=TEXTS, audio=samples, sampling_rate=48000, seed=0, return_tensors="pt", text_kwargs={"padding": True}
        )
        with torch.inference_mode():
            columns.append(model(**inputs).logits_per_audio[0])
    return torch.stack(columns, 1).numpy()


def test_scores_are_the_models(cli, checkpoint, recordings):
    paths = sorted(path for path in recordings.rglob("*.*"))
    outcome = cli(
        "score", "--model", "clap", "--checkpoint", checkpoint, "--audio", recordings, "--text", *TEXTS, "--json"
    )
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    scores = expected_scores(checkpoint, paths)
    assert scores.std() > 0.1
    assert [one["text"] for one in document["texts"]] == TEXTS and document["failed"] == []
    for one, row in zip(document["texts"], scores, strict=True):
        order = np.argsort(-row)
        assert [found["recording"] for found in one["recordings"]] == [str(paths[place]) for place in order]
        assert [found["rank"] for found in one["recordings"]] == [1, 2, 3]
        np.testing.assert_allclose([found["score"] for found in one["recordings"]], row[order], rtol=1e-4, atol=1e-4)


def test_table_and_order_of_files(cli, checkpoint, recordings):
    files = [recordings / "short.wav", recordings / "other.ogg"]
    call = ["score", "--model", "clap", "--checkpoint", checkpoint, "--text", "a dog [barks]", "--audio"]
    outcome = cli(*call, *files)
    assert outcome.code == 0 and "a dog [barks]" in outcome.out and "rank" in outcome.out
    one, other = (json.loads(cli(*call, *some, "--json").out)["texts"][0] for some in (files, files[::-1]))
    assert one == other  # nothing depends on what is beside a recording
    assert len(json.loads(cli(*call, *files, files[0], "--json").out)["texts"][0]["recordings"]) == 2


def test_changes_of_recordings_are_noted(cli, checkpoint, recordings):
    """Note changes once a kind on stderr, and by recording in the document."""
    call = ["score", "--model", "clap", "--checkpoint", checkpoint, "--text", "rain", "--json", "--audio"]
    outcome = cli(*call, recordings)
    remarks = {found["recording"]: found["remark"] for found in json.loads(outcome.out)["remarks"]}
    crop = "longer than 1 s: it is heard shrunk, and in three stretches of 1 s that the seed draws"
    assert remarks == {
        str(recordings / "more/long.flac"): f"resampled from 44100 Hz to 48000 Hz; {crop}",
        str(recordings / "other.ogg"): "resampled from 16000 Hz to 48000 Hz",
    }
    assert all(f"note: 1 of the recordings: {remark}\n" in outcome.err for remark in remarks.values())
    outcome = cli(*call, recordings / "short.wav")
    assert "note: " not in outcome.err and json.loads(outcome.out)["remarks"] == []


def test_seed_and_half_types(cli, checkpoint, recordings):
    call = ["score", "--model", "clap", "--checkpoint", checkpoint, "--text", *TEXTS, "--json", "--audio", recordings]
    plain, again, seeded, half = (
        {one["recording"]: one["score"] for one in json.loads(cli(*call, *more).out)["texts"][0]["recordings"]}
        for more in ((), (), ("--seed", 5), ("--dtype", "bfloat16"))
    )
    assert plain == again
    changed = {path for path in plain if plain[path] != seeded[path]}
    assert changed == {str(recordings / "more/long.flac")}
    assert half != plain and max(abs(half[path] - plain[path]) for path in plain) < 1


def test_bad_recordings_among_good_ones(cli, checkpoint, recordings, tmp_path):
    shutil.copytree(recordings, tmp_path / "mixed")
    (tmp_path / "mixed/torn.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "mixed/silent.wav", np.zeros(4800), 48000)
    call = ["score", "--model", "clap", "--checkpoint", checkpoint, "--text", "rain", "--json", "--audio"]
    outcome = cli(*call, tmp_path / "mixed")
    assert outcome.code == 1 and "2 of 5 recordings cannot be used" in outcome.err
    assert "torn.wav cannot be read" in outcome.err and "silent.wav is silent" in outcome.err
    document = json.loads(outcome.out)
    assert len(document["failed"]) == 2 and len(document["texts"][0]["recordings"]) == 3
    for name, message in (("silent.wav", "is silent"), ("none.wav", "there is no recording at")):
        outcome = cli(*call, tmp_path / "mixed" / name)
        assert outcome.code == 1 and message in outcome.err and outcome.out == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "clap"],
        ["--model", "clap", "--audio", "a.wav"],
        ["--model", "clap", "--text", "a"],
        ["--model", "clap", "codes.npz", "--audio", "a.wav", "--text", "a"],
        ["codes.npz"],
        ["codes.npz", "text", "--audio", "a.wav"],
        ["codes.npz", "text", "--text", "a"],
        ["--model", "clip", "--audio", "a.wav", "--text", "a"],
    ],
)
def test_wrong_usage(cli, argv):
    outcome = cli("score", *argv)
    assert outcome.code == 2 and "usage: clvp-fast score" in outcome.err


def test_hub_id_that_cannot_be_had(fails, recordings, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    call = ["score", "--model", "clap", "--audio", recordings / "short.wav", "--text", "rain"]
    assert fails(*call, "--checkpoint", "nobody/nothing-of-this-name") == (
        "checkpoint nobody/nothing-of-this-name cannot be loaded: it is not in the cache, and the hub cannot be "
        "reached; download it first, or give a folder"
    )


def test_bad_checkpoints_and_texts(fails, checkpoint, recordings, tmp_path):
    call = ["score", "--model", "clap", "--audio", recordings / "short.wav", "--text"]
    assert "a text is empty" in fails(*call, "rain", " ", "--checkpoint", checkpoint)
    assert "is too long: the model has positions for 512" in fails(*call, "rain " * 600, "--checkpoint", checkpoint)
    assert "there is no demo of CLAP; give a folder" in fails(*call, "a", "--checkpoint", "demo")
    assert "there is no checkpoint folder" in fails(*call, "a", "--checkpoint", tmp_path / "none")
    assert "has no recordings in it" in fails("score", "--model", "clap", "--text", "a", "--audio", tmp_path)
    shutil.copytree(checkpoint, tmp_path / "torn")
    weights = load_file(checkpoint / "model.safetensors")
    del weights["text_projection.linear1.bias"]
    weights["surplus"] = torch.zeros(1)
    save_file(weights, tmp_path / "torn/model.safetensors", metadata={"format": "pt"})
    assert "lacks tensors: text_projection.linear1.bias" in fails(*call, "a", "--checkpoint", tmp_path / "torn")
    (tmp_path / "torn/config.json").unlink()
    assert "torn has no config.json" in fails(*call, "a", "--checkpoint", tmp_path / "torn")
