"""The examples of README.md and of the handbook, and a place to run them in."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The hub ids that examples name, in whose place small checkpoints of this machine are used.
HUB_ID, CLAP_ID = "susnato/clvp_dev", "laion/clap-htsat-unfused"


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Return the fenced blocks of a language in a document, by its path below the repository."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(document), flags=re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    """Return the lines of a document's shell blocks."""
    return [line for block in blocks(document, "sh") for line in block.splitlines() if line]


def clone(folder: Path) -> Path:
    """Make a folder with the parts of a clone that a reader uses: the examples."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def run(example: str, document: str, **stand_ins: str) -> dict:
    """Run a Python example with other words in place of some, and return the names that it leaves."""
    for word, other in stand_ins.items():
        assert word in example
        example = example.replace(word, other)
    names: dict = {}
    exec(compile(example, document, "exec"), names)
    return names


def would_run(program: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """Run a command that sets up an environment, as far as it goes without one: `make` or `pip`."""
    if program == "make":
        command = ["make", "-n", *arguments]
    else:
        options = ["--dry-run", "--no-deps", "--no-build-isolation", "--quiet"]
        command = [sys.executable, "-m", "pip", *arguments, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
