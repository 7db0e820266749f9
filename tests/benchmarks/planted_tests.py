"""Tests with a fault of each kind, and what runs them under the supervisor; without torch, which takes seconds."""

import os
import sys
from pathlib import Path

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.supervise import Step, run_step

ROOT = Path(__file__).parents[2]
#: Seconds that nothing here takes.
LONG = 1e4
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.testing", "-p", "no:cacheprovider", "-m", "")
TESTS = """
import os, pathlib, signal, time
import pytest

FOLDER = pathlib.Path(os.environ["PLANTED_FOLDER"])

def note(name):
    with open(FOLDER / "ran", "a") as file:
        file.write(name + " ")

def hang():
    (FOLDER / "hangs").write_text(str(os.getpid()))
    while True:
        time.sleep(1)

def test_first():
    note("first")

def test_hangs():
    note("hangs")
    hang()

def test_fails():
    note("fails")
    assert 1 + 1 == 3

def test_dies():
    note("dies")
    os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.skip(reason="not here")
def test_skips():
    pass

def test_last():
    note("last")
"""


class Place:
    """A folder with a journal, planted tests, and the environment of workers."""

    def __init__(self, folder: Path):
        self.folder, self.journal = folder, Journal(folder / "journal.jsonl", "code on card")
        self.tests = folder / "planted/test_planted.py"
        self.tests.parent.mkdir(exist_ok=True)
        self.tests.write_text(TESTS)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = os.environ | {"PLANTED_FOLDER": str(folder), "PYTHONPATH": path}

    def step(self, name="tests", seconds=LONG, prefix=(), **options) -> Step:
        command = (*prefix, *PYTEST, "--rootdir", str(self.tests.parent), str(self.tests))
        return Step(name, command, seconds, LONG, **options)

    def run(self, step: Step, deadline: float = float("inf")) -> None:
        run_step(step, self.journal, deadline, self.folder / "logs", self.environment)

    def outcomes(self, step="tests") -> dict[str, str]:
        ended = self.journal.ended(step)
        return {item.rsplit("::")[-1].removeprefix("test_"): end["outcome"] for item, end in ended.items()}

    def ran(self) -> list[str]:
        path = self.folder / "ran"
        return path.read_text().split() if path.exists() else []


def run_planted(folder: str) -> None:
    """What a process that is to be killed does."""
    place = Place(Path(folder))
    place.run(place.step(seconds=float("inf")))
