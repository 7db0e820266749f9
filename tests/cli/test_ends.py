"""Ends of a command that cannot go on: folders that cannot be written, a full disk, and interrupts."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from clvp_fast.cli import main
from clvp_fast.io import files
from tests.cli.conftest import QUICK, ROOT, TEXT
from tests.kit.waiting import BOUND


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
        "--checkpoint",
        "random",
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
