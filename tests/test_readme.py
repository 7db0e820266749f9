"""README.md fits on a screen or two, all of its blocks run, and its links lead somewhere here and on PyPI."""

import re
import shlex
from types import SimpleNamespace

import pytest

from clvp_fast.cli import main
from tests.kit.documents import ROOT, blocks, clone, commands, text_of, would_run

README = text_of("README.md")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Give the folder of a reader of the README."""
    monkeypatch.chdir(clone(tmp_path))
    return tmp_path


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 95 and max(map(len, lines)) <= 120
    assert len(blocks("README.md", "python")) == 1 and len(commands("README.md")) == 5
    assert set(re.findall(r"^```(\S+)", README, flags=re.MULTILINE)) == {"python", "sh"}


def test_commands_in_order(reader, capsys):
    for command in commands("README.md"):
        program, *arguments = shlex.split(command)
        if program in ("make", "pip"):  # only whether it could: this is the environment that they make
            done = would_run(program, arguments)
            assert done.returncode == 0, done.stderr
        else:
            assert program == "clvp-fast"
            assert main(arguments) == 0, capsys.readouterr().err
    assert (reader / "out/hello/candidates.png").exists() and (
        reader / "out/corpus/shards/part-000000.parquet"
    ).exists()


def test_the_example_prints_the_tokens_beside_it(reader, capsys):
    """Run its six lines, on any instruction set."""
    (example,) = blocks("README.md", "python")
    assert len([line for line in example.splitlines() if line]) == 6
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"# speech tokens: (\[[\d, ]+\])", example)[1]


def test_on_pypi_no_link_is_relative(monkeypatch):
    """PyPI knows no files of the repository: links to them become their names, and pictures are left out."""
    import setuptools

    asked = SimpleNamespace(options={})
    monkeypatch.setattr(setuptools, "setup", lambda **options: asked.options.update(options))
    monkeypatch.chdir(ROOT)
    exec(compile(text_of("setup.py"), str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    said = asked.options["long_description"]
    assert asked.options["long_description_content_type"] == "text/markdown"
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", said)
    assert "Change the import (`docs/change-the-import.md`)" in said and "![" not in said and "<!--" not in said
    assert blocks("README.md", "python")[0] in said and "| you | read |" in said
