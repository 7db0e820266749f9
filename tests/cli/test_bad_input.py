"""Bad input: one clear sentence, exit code 1, and no file written."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from clvp_fast import ClvpFeatureExtractor
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.engine.runner import Runner
from tests.cli.conftest import QUICK, ROOT, TEXT


@pytest.fixture
def write_clip(tmp_path):
    def write(samples, rate=22050, name="clip.wav"):
        soundfile.write(tmp_path / name, samples, rate, subtype="FLOAT")
        return tmp_path / name

    return write


# Text


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_empty_text(generate_fails, text):
    assert generate_fails(text) == "the text is empty; give the sentence to speak"


def test_text_over_the_limit(generate_fails):
    sentence = generate_fails("a b " * 150)
    assert sentence.startswith("the text is too long: ") and "this checkpoint takes 401" in sentence
    sentence = generate_fails("$1," * 30_000)
    assert sentence == "the text is too long: 90000 characters, and at most 65536 are read; split it up"


@pytest.mark.parametrize("cleaning, text", [("transformers", "你好，世界"), ("tortoise", "😀 🎉"), ("tortoise", "{}")])
def test_text_of_unknown_characters(generate_fails, voice, cleaning, text):
    sentence = generate_fails(text, voice, "--text-cleaning", cleaning)
    assert sentence.startswith("nothing of the text ") and text in sentence


def test_long_texts_are_named_by_their_beginning(generate_fails):
    assert f"nothing of the text '{'😀' * 80}…' is in" in generate_fails("😀" * 1000)


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


# Paths


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (("generate", TEXT, "--voice", ""), "--voice"),
        (("generate", TEXT, "--voice", "v.wav", "--out", ""), "--out"),
        (("generate", "--texts", "", "--voice", "v.wav"), "--texts"),
        (("batch", "", "--out", "out"), "INPUT"),
        (("mel", ""), "RECORDING"),
        (("score", "--model", "clap", "--audio", "", "--text", TEXT), "--audio"),
    ],
)
def test_paths_that_are_empty(cli, argv, name):
    """Refuse paths from unset variables, which must not mean the working folder."""
    outcome = cli(*argv)
    assert outcome.code == 2
    assert (
        f"argument {name}: a path is empty: it must be that of a file or a folder, and . is the working folder"
        in outcome.err
    )


def test_texts_of_a_closed_input(fails, voice, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", None)
    sentence = fails("generate", "--texts", "-", "--voice", voice, "--out", tmp_path / "out")
    assert sentence == "the standard input is closed; give a file of texts"


# Numbers


def test_unequal_counts_of_texts_and_clips():
    model = load_checkpoint("random").model
    ids = torch.full((2, 4), 20)
    with pytest.raises(ValueError, match=r"2 .*3 "):
        model.generate(ids, torch.randn(3, 80, 517), max_new_tokens=2)


def test_more_tokens_than_positions(fails, voice, tmp_path):
    sentence = fails("generate", TEXT, "--voice", voice, "--out", tmp_path / "out", "--max-new-tokens", 609)
    assert sentence == "--max-new-tokens 609: this checkpoint has positions for 608 speech tokens"


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
        (5, "has no array named 'codes'"),
        ({"codes": [[1, 2]], "lengths": [1, 2]}, "1 candidates need as many lengths, got [2]"),
        ({"codes": [[1, 2]], "lengths": ["a"]}, "lengths must be whole numbers from 0 to 2"),
        ({"codes": [[1, 2]], "lengths": [1.5]}, "lengths must be whole numbers from 0 to 2"),
        ({"codes": [[1, 2]], "lengths": [-1]}, "lengths must be whole numbers from 0 to 2"),
        ({"codes": [[1, 2]], "lengths": [3]}, "lengths must be whole numbers from 0 to 2"),
        ({"codes": [[1, 2]] * 2, "lengths": [[1], [1, 2]]}, "lengths must be whole numbers from 0 to 2"),
        ({"codes": [[1, 2]], "candidates": [1, 2]}, "1 candidates need as many candidates, got [2]"),
        ({"codes": [[1, 2]], "candidates": [{}]}, "candidates must be whole numbers from 0, the number of each row"),
        ({"codes": [[1, 2]], "candidates": [-1]}, "candidates must be whole numbers from 0, the number of each row"),
    ],
)
def test_bad_codes(fails, tmp_path, content, expected):
    (tmp_path / "codes.json").write_text(json.dumps(content))
    assert expected in fails("score", tmp_path / "codes.json", TEXT)


def test_unreadable_codes(fails, tmp_path):
    assert "there is no file of codes" in fails("score", tmp_path / "no.npz", TEXT)
    assert f"{tmp_path} is a folder: give a file of codes in it" in fails("score", tmp_path, TEXT)
    for name in ("codes.npz", "codes.npy", "codes.json"):
        (tmp_path / name).write_text("{ not this")
        assert "cannot be read as .npz, .npy or .json" in fails("score", tmp_path / name, TEXT)
    (tmp_path / "codes.json").write_text("[" * 100_000)
    assert "cannot be read as .npz, .npy or .json" in fails("score", tmp_path / "codes.json", TEXT)
    np.save(tmp_path / "codes.npy", np.array([[2**64 - 1]], dtype=np.uint64))
    assert "codes must be those of speech, got 18446744073709551615" in fails("score", tmp_path / "codes.npy", TEXT)
    for array in (np.array([[1, None]], dtype=object), np.arange(1000).reshape(10, 100)):
        np.savez(tmp_path / "codes.npz", codes=array)
        if array.dtype != object:
            content = bytearray((tmp_path / "codes.npz").read_bytes())
            content[500] ^= 0xFF
            (tmp_path / "codes.npz").write_bytes(content)
        assert "cannot be read as .npz, .npy or .json" in fails("score", tmp_path / "codes.npz", TEXT)
    np.savez(tmp_path / "other.npz", scores=np.ones(3))
    assert "has no array named 'codes'" in fails("score", tmp_path / "other.npz", TEXT)


# Memory


def test_too_little_memory_for_one_candidate(generate_fails, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr("clvp_fast.engine.runner.Runner.decode", full)
    assert generate_fails().startswith("there is too little memory for a single candidate; ")


def test_budget_too_small_for_one_candidate(generate_fails, voice):
    sentence = generate_fails(TEXT, voice, "--memory-fraction", 1e-6)
    assert sentence.startswith("one candidate of 8 tokens after a prompt of ") and "may be used" in sentence


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


def test_the_only_text_and_voice_are_looked_at_before_a_checkpoint_is_loaded(
    generate_fails, voice, monkeypatch, tmp_path
):
    monkeypatch.setattr("clvp_fast.cli.inputs.load_checkpoint", lambda *_, **__: pytest.fail("it was loaded"))
    assert generate_fails(" ") == "the text is empty; give the sentence to speak"
    for name, said in (("a.wav", "is no recording"), ("a.safetensors", "is no voice"), ("a.pth", "are no latents")):
        assert generate_fails(TEXT, tmp_path / name) == f"there {said} at {tmp_path}/{name}"


def test_more_to_keep_than_there_is_is_noted(cli, voice, tmp_path):
    outcome = cli("generate", TEXT, "--voice", voice, "--out", tmp_path, *QUICK, "--keep", 30, "--no-pictures")
    assert outcome.code == 0 and "note: --keep 30: there are 2 candidates, and all are kept" in outcome.err
