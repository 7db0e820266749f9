"""Help fits on a screen and ends with examples; a mistyped word is answered with the one that it is near to."""

import os
import shlex
import subprocess
import sys

import pytest

from clvp_fast.cli.helping import HELP
from clvp_fast.cli.parser import build_parser

COMMANDS = tuple(HELP)


def helped(cli, command, option, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = cli(command, option)
    assert outcome.code == 0 and outcome.err == ""
    return outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_ends_with_two_examples(cli, command, monkeypatch):
    lines = helped(cli, command, "--help", monkeypatch).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert lines[-3] == "examples:" and all(line.startswith("  clvp-fast ") for line in lines[-2:])
    for line in lines[-2:]:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_shows_every_option(cli, command, monkeypatch):
    short, whole = (helped(cli, command, option, monkeypatch) for option in ("--help", "--help-all"))
    (commands,) = (action for action in build_parser()._actions if action.dest == "command")
    options = {name for action in commands.choices[command]._actions for name in action.option_strings}
    assert all(f"{name} " in whole or f"{name}\n" in whole or f"{name}," in whole for name in options)
    assert max(map(len, whole.splitlines())) <= 100 and len(whole) >= len(short)
    if command in ("generate", "batch"):
        assert "--typical-p" in whole and "--typical-p" not in short


def test_every_command_has_examples():
    (commands,) = (action for action in build_parser()._actions if action.dest == "command")
    assert set(commands.choices) == set(HELP)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["genrate"], "did you mean generate for genrate?"),
        (["generate", "Hi.", "--voise", "a.wav"], "did you mean --voice for --voise?"),
        (["generate", "Hi.", "--voice", "a.wav", "--kep=3"], "did you mean --keep for --kep?"),
        (["generate", "Hi.", "--voice", "a.wav", "--preset", "ultrafast"], "did you mean ultra_fast for ultrafast?"),
        (["batch", "a.csv", "--out", "o", "--retry-faild"], "did you mean --retry-failed for --retry-faild?"),
        (["score", "--modle", "clap"], "did you mean --model for --modle?"),
    ],
)
def test_a_mistyped_word_is_near_to_one(cli, argv, meant):
    outcome = cli(*argv)
    assert outcome.code == 2 and outcome.err.splitlines()[-1].endswith(meant)


def test_distant_words_get_no_suggestion(cli):
    outcome = cli("generate", "Hi.", "--voice", "a.wav", "--zzz")
    assert outcome.code == 2 and "unrecognized arguments: --zzz" in outcome.err and "did you mean" not in outcome.err
    assert "did you mean" not in cli("convert", "--out", "x").err
    # Behind `--` all are texts.
    assert "did you mean" not in cli("generate", "--voice", "a.wav", "--", "--voise", "--keep", "x").err


def test_a_mistyped_checkpoint_is_near_to_one(generate_fails, voice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/tortoise-clvp").mkdir(parents=True)
    assert "did you mean demo? Or give" in generate_fails("Hi.", voice, "--checkpoint", "dmo")
    said = generate_fails("Hi.", voice, "--checkpoint", "./models/tortoise-clpv")
    assert "did you mean models/tortoise-clvp? Or give" in said
    assert "did you mean" not in generate_fails("Hi.", voice, "--checkpoint", "./models/zzz")

    def unreachable(*arguments, **options):
        raise OSError("no such repository")

    monkeypatch.setattr("clvp_fast.checkpoint.ClvpConfig.from_pretrained", unreachable)  # owner/name is a hub id too
    said = generate_fails("Hi.", voice, "--checkpoint", "models/tortoise-clpv")
    assert "cannot be loaded" in said and said.endswith("did you mean models/tortoise-clvp?")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("clvp-fast ge", ["generate"]),
        ("clvp-fast generate --num", ["--num-candidates"]),
        ("clvp-fast generate --preset ultra", ["ultra_fast"]),
        ("clvp-fast batch --retry", ["--retry-failed"]),
    ],
)
def test_a_shell_completes(line, offered, tmp_path):
    pytest.importorskip("argcomplete", reason="argcomplete is not installed: pip install '.[completion]'")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "IFS": "\n"}
    asked["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "answer")
    code = "import sys; sys.argv[0] = 'clvp-fast'; from clvp_fast.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | asked, check=True, capture_output=True)
    found = (tmp_path / "answer").read_text()
    assert [word.strip() for word in found.replace("\v", "\n").split("\n") if word.strip()] == offered
