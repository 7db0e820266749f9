"""Output survives any encoding and any width of a terminal."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.table import Table

from clvp_fast.cli import main, report
from clvp_fast.io.files import json_text
from tests.cli.conftest import ROOT
from tests.cli.test_generate import QUICK

DOCUMENT = {"text": "Yes 🙂 é", "file": os.fsdecode(b"v\xff.wav"), "score": 0.5}


@pytest.fixture
def piped(monkeypatch, tmp_path):
    """Run a command in `tmp_path` as if its output were a pipe of an encoding, and return the bytes in it."""

    def run(*argv, encoding: str) -> bytes:
        pipe = io.BytesIO()
        stdout = io.TextIOWrapper(pipe, encoding, write_through=True)
        monkeypatch.chdir(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert main(list(map(str, argv))) == 0
        return pipe.getvalue()

    return run


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252", "utf-16"])
def test_json_is_whole_in_every_encoding(encoding):
    text = json_text(DOCUMENT, encoding)
    assert json.loads(text.encode(encoding).decode(encoding)) == DOCUMENT
    plain = {"text": "é"}
    assert ("\\u00e9" in json_text(plain, encoding)) == (encoding == "ascii")


def test_json_into_a_pipe(piped, voice, tmp_path):
    arguments = ("generate", "Yes 🙂", *QUICK, "--voice", voice, "--out", "é🙂", "--json")
    document = json.loads(piped(*arguments, encoding="latin-1").decode("latin-1"))
    assert document["text"] == "Yes 🙂" and "é🙂/candidates.json" in document["written"]
    assert json.loads((tmp_path / "é🙂/candidates.json").read_text(encoding="utf-8"))["text"] == "Yes 🙂"


@pytest.mark.parametrize(
    "closed",
    ["<&- >&- 2>&-", *(pytest.param(one, marks=pytest.mark.slow) for one in (">&- 2>&-", "<&-", ">&-", "2>&-"))],
)
def test_closed_streams(voice, tmp_path, closed):
    """Write the files even if a service has closed the streams."""
    command = [sys.executable, "-m", "clvp_fast", "mel", str(voice), "--out", "out", "--json"]
    shell = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *command]
    found = subprocess.run(shell, capture_output=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out/voice.npy").exists() and b"Error" not in found.stderr
    assert (json.loads(found.stdout)["recordings"] if found.stdout else []) or ">&-" in closed.replace("2>&-", "")


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}])
def test_texts_are_utf_8_in_any_locale(tmp_path, locale):
    """Read UTF-8 under an old locale, and refuse bytes that are not UTF-8 before any text is spoken."""
    code = "import sys; from clvp_fast.cli.parser import build_parser; "
    code += "print(ascii(build_parser().parse_args(sys.argv[1:]).text))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"} | locale
    for words, shown in (("Ça 東京 🙂", None), (b"caf\xe9", b"argument TEXT: 'caf\\udce9' is not UTF-8 text")):
        command = [sys.executable, "-c", code, "generate", words, "--voice", "v.wav"]
        found = subprocess.run(command, capture_output=True, env=environment)
        if shown is None:
            assert found.stdout.decode().strip() == ascii([words]), found.stderr
        else:
            assert found.returncode == 2 and shown in found.stderr


def test_a_note_is_one_line(capsys):
    report.note("a\nb.wav: resampled")
    assert capsys.readouterr().err == "note: a b.wav: resampled\n"


def test_a_table_into_a_pipe(piped, voice):
    found = piped("generate", "Yes 🙂", *QUICK, "--voice", voice, "--out", "é🙂", encoding="ascii")
    assert b"wrote \\xe9\\U0001f642/candidates.json" in found and b"score" in found


@pytest.mark.parametrize("columns", [1, 20, 33, 80])
def test_scores_can_be_read_in_any_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    scores = np.array([123.4567, -0.0312, -99.125])
    report.print_ranking(report.ranking(scores, np.array([500, 1, 37])))
    shown = capsys.readouterr().out
    assert "…" not in shown and all(f"{score:.4f}" in shown for score in scores) and "candidate" in shown


def test_folders_give_way_to_numbers(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "50")
    best = {"candidate": 3, "tokens": 41, "score": -12.5, "stopped": True}
    report.print_summary([{"folder": "001-the-birch-canoe-slid-on-the-smooth-planks", "best": best}])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 50 and any("-12.5000" in line for line in lines)
    assert "".join(line[1:].split("│")[0].split("┃")[0].strip() for line in lines if "│" in line).startswith("001-the")


def test_wide_tables_are_as_wide_as_the_terminal_lets_them(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    table = Table()
    table.add_column("recording", overflow="fold")
    table.add_column("score")
    table.add_row("x" * 200, "1.0000")
    report.print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 60 and "".join(lines).count("x") == 200
