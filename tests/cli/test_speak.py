"""`speak`: the best candidate of a text as a WAV, through a checkpoint's vocoder; what Tortoise's needs is told."""

import importlib.util
import json

import pytest
import soundfile

from clvp_fast.cli import speak
from clvp_fast.integrations.tortoise_vocoder import MODELS

QUICK = ("--num-candidates", 4, "--max-new-tokens", 24)


def test_the_sound_is_that_of_the_best_candidate(cli, voice, checkpoint, tmp_path):
    out = tmp_path / "said.wav"
    common = ("hello there", "--voice", voice, "--checkpoint", checkpoint, *QUICK)
    outcome = cli("speak", *common, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert cli("generate", *common, "--listen", "--no-pictures", "--out", tmp_path / "all").code == 0
    first, *_ = json.loads((tmp_path / "all/candidates.json").read_text())["candidates"]
    assert out.read_bytes() == (tmp_path / "all/sound/rank-1.wav").read_bytes()
    samples, rate = soundfile.read(out)
    assert document["written"] == [str(out)] and document["candidate"] == first["candidate"]
    assert document["sound_seconds"] == pytest.approx(len(samples) / rate, abs=1e-3)
    assert cli("speak", *common, "--out", out, "--seed", 1).out.startswith(f"wrote {out}")
    assert out.read_bytes() != (tmp_path / "all/sound/rank-1.wav").read_bytes()


def test_impossible_calls_are_refused_in_a_sentence(fails, voice, checkpoint, tmp_path, monkeypatch):
    common = ("speak", "hello", "--voice", voice, *QUICK, "--out", tmp_path / "said.wav")
    assert "has no vocoder (vocoder.json): give Tortoise's own with --tortoise DIR" in fails(*common)
    assert "--iterations is for Tortoise's diffusion" in fails(*common, "--checkpoint", checkpoint, "--iterations", 9)
    assert "--out needs a file to write" in fails(*common[:-1], tmp_path)
    assert "--out needs a file to write" in fails(*common[:-1], tmp_path / "no" / "said.wav")
    assert "the text is empty" in fails("speak", " ", *common[2:])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fails(*common, "--tortoise", tmp_path).startswith(
        "--tortoise needs tortoise-tts 3.0.0 and its packages: tortoise-tts is not installed"
    )
    assert not any(tmp_path.iterdir())


def test_files_of_tortoise_that_are_missing_are_named(fails, voice, tmp_path, monkeypatch):
    monkeypatch.setattr(speak, "make_tortoise_importable", list)
    common = ("speak", "hello", "--voice", voice, "--tortoise")
    assert "there is no folder" in fails(*common, tmp_path / "no")
    below = tmp_path / "models--tortoise/snapshots/1"
    below.mkdir(parents=True)
    for name in MODELS:
        told = fails(*common, tmp_path)
        assert f"has no {name}, in it or below it: tortoise-tts 3.0.0 downloads them" in told
        (below / name).write_bytes(b"none")
