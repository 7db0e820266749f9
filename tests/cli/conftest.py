"""Running `clvp-fast` inside the test's process, and a voice to run it with."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clvp_fast.cli import main
from clvp_fast.demo import build_random
from clvp_fast.vocoder import Codec, save_vocoder

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The birch canoe slid on the smooth planks."
QUICK = ("--num-candidates", 2, "--max-new-tokens", 8)


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Give `cli("generate", ...)`, which runs one command line and returns its exit code, stdout and stderr.

    A command that names no checkpoint runs on `random`, whose codes and sizes are those of Tortoise.
    """

    def run(*argv) -> Ended:
        capsys.readouterr()
        words = [str(part) for part in argv]
        named = {"--checkpoint", "--model", "--tortoise"} & {*words}
        if words and words[0] in ("generate", "speak", "score", "batch") and not named:
            words[1:1] = ["--checkpoint", "random"]
        try:
            code = main(words)
        except SystemExit as stop:  # argparse ends so
            code = stop.code
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def voice() -> Path:
    return ROOT / "examples/voice.flac"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Give the random checkpoint with a vocoder of noise, which has a code for each of its speech tokens."""
    folder = tmp_path_factory.mktemp("with-vocoder")
    build_random(folder)
    torch.manual_seed(0)
    save_vocoder(folder, Codec(levels=(8, 8, 8, 16), width=16))
    return folder


@pytest.fixture
def fails(cli):
    """Run a command line that must fail, and return its one sentence."""

    def run(*argv) -> str:
        outcome = cli(*argv)
        assert outcome.code == 1, outcome
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        *notes, last = outcome.err.strip().splitlines()
        assert last.startswith("clvp-fast: error: "), outcome.err
        assert not any("error" in line for line in notes)
        return last.removeprefix("clvp-fast: error: ")

    return run


@pytest.fixture
def generate_fails(fails, voice, tmp_path):
    """Run `generate` with something bad, assert that nothing was written, and return the sentence."""

    def run(text=TEXT, clip=voice, *argv):
        sentence = fails("generate", text, "--voice", clip, "--out", tmp_path / "out", *QUICK, *argv)
        assert not (tmp_path / "out").exists()
        return sentence

    return run
