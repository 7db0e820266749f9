"""`mel`, `info`, usage and exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

import clvp_fast
from clvp_fast import ClvpFeatureExtractor
from clvp_fast.audio import load_audio


def test_mel_is_what_the_model_sees(cli, voice, tmp_path):
    outcome = cli("mel", voice, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    written = np.load(tmp_path / "voice.npy")
    samples, _ = load_audio(voice)
    expected = ClvpFeatureExtractor()(samples, sampling_rate=22050, return_tensors="np")["input_features"][0]
    np.testing.assert_array_equal(written, expected)
    assert written.shape == (80, 517) and written.dtype == np.float32
    assert (tmp_path / "voice.png").read_bytes().startswith(b"\x89PNG")


def test_mel_of_a_whole_recording(cli, voice, tmp_path):
    outcome = cli("mel", voice, "--out", tmp_path, "--whole", "--json")
    document = json.loads(outcome.out)
    samples, _ = load_audio(voice)
    assert document["shape"] == [80, 1 + len(samples) // 256] == list(np.load(tmp_path / "voice.npy").shape)


def test_mel_norms_of_a_checkpoint(cli, voice, tmp_path):
    norms = np.linspace(0.5, 2.0, 80)
    from clvp_fast.demo import build_demo

    (tmp_path / "checkpoint").mkdir()
    build_demo(tmp_path / "checkpoint")
    ClvpFeatureExtractor(mel_norms=norms.tolist()).save_pretrained(tmp_path / "checkpoint")
    assert cli("mel", voice, "--out", tmp_path / "a").code == 0
    assert cli("mel", voice, "--out", tmp_path / "b", "--checkpoint", tmp_path / "checkpoint").code == 0
    plain, normed = np.load(tmp_path / "a/voice.npy"), np.load(tmp_path / "b/voice.npy")
    np.testing.assert_allclose(normed, plain / norms[:, None], rtol=1e-5, atol=1e-5)


def test_info(cli):
    outcome = cli("info", "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["versions"]["clvp_fast"] == clvp_fast.__version__
    assert document["devices"][0].startswith("cpu")
    plain = cli("info")
    assert plain.code == 0
    for operator in ("rotary_attention", "add_norm", "geglu_mlp", "gelu_mlp", "log_mel"):
        assert operator in json.dumps(document["operators"])
        assert operator in plain.out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sing"],
        ["generate", "hello"],
        ["generate", "hello", "--voice", "a.wav", "--num-candidates", "0"],
        ["generate", "hello", "--voice", "a.wav", "--temperature", "-1"],
        ["generate", "hello", "--voice", "a.wav", "--temperature", "nan"],
        ["generate", "hello", "--voice", "a.wav", "--top-p", "1.5"],
        ["generate", "hello", "--voice", "a.wav", "--dtype", "float8"],
        ["generate", "hello", "--voice", "a.wav", "--seed", "-1"],
        ["convert", "--out", "x"],
    ],
)
def test_wrong_usage_is_2(cli, argv):
    outcome = cli(*argv)
    assert outcome.code == 2
    assert "usage: clvp-fast" in outcome.err


def test_version_and_help(cli):
    assert cli("--version").out == f"clvp-fast {clvp_fast.__version__}\n"
    for command in ("generate", "score", "mel", "convert", "info"):
        outcome = cli(command, "--help")
        assert outcome.code == 0 and f"usage: clvp-fast {command}" in outcome.out


def test_python_dash_m(tmp_path):
    done = subprocess.run([sys.executable, "-m", "clvp_fast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"clvp-fast {clvp_fast.__version__}\n")
