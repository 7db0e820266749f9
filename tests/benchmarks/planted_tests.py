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

# A worker that starts at once, in place of pytest's.
WORKER = """
import json, os, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))

def write(event, **more):
    line = {name: words["--" + name] for name in ("mark", "step", "worker")} | {"event": event} | more
    with open(words["--journal"], "a") as file:
        file.write(json.dumps(line) + "\\n")

def begin(item):
    write("begin", item=item)

def end(item, outcome="passed", why=""):
    begin(item)
    write("end", item=item, outcome=outcome, why=why)

def done():
    write("done")

def ended(step):
    with open(words["--journal"]) as file:
        return [line["item"] for line in map(json.loads, file) if line["event"] == "end" and line["step"] == step]

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

    def worker(self, code: str, name="tests", seconds=LONG, **options) -> Step:
        """Make a step whose workers are `WORKER` and `code`."""
        return Step(name, (sys.executable, "-S", "-c", WORKER + code), seconds, LONG, **options)

    def run(self, step: Step, deadline: float = float("inf")) -> None:
        run_step(step, self.journal, deadline, self.folder / "logs", self.environment)

    def outcomes(self, step="tests") -> dict[str, str]:
        ended = self.journal.ended(step)
        return {item.rsplit("::")[-1].removeprefix("test_"): end["outcome"] for item, end in ended.items()}

    def ran(self) -> list[str]:
        path = self.folder / "ran"
        return path.read_text().split() if path.exists() else []


def run_planted(folder: str) -> None:
    """Do the work of a process that is to be killed."""
    place = Place(Path(folder))
    place.run(place.step(seconds=float("inf")))
