"""The GPU commands' workers and their supervisor, on a CPU: each planted fault costs itself alone."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command, supervise
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.supervise import Step
from benchmarks.harness import ROOT, stored_rows
from tests.benchmarks.planted_tests import LONG, TESTS, Place
from tests.kit.waiting import wait_for


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(autouse=True)
def time_passes_when_something_hangs(place, monkeypatch):
    """So that nothing is taken for hanging because the machine is slow."""
    flag, passed, real = place.folder / "hangs", itertools.count(), supervise.monotonic
    monkeypatch.setattr(supervise, "monotonic", lambda: real() + (2 * LONG * next(passed) if flag.exists() else 0))
    kill = supervise._kill

    def killed(process):
        kill(process)
        flag.unlink(missing_ok=True)

    monkeypatch.setattr(supervise, "_kill", killed)


def test_each_fault_of_a_test_costs_itself_alone(place):
    place.run(place.step(seconds=float("inf")))
    assert place.outcomes() == dict(
        first="passed", hangs="hung", fails="failed", dies="died", skips="skipped", last="passed"
    )
    assert place.ran() == ["first", "hangs", "fails", "dies", "last"]
    ended = {item.rsplit("_")[-1]: end for item, end in place.journal.ended("tests").items()}
    assert "assert (1 + 1) == 3" in ended["fails"]["why"] and "exit code -9" in ended["dies"]["why"]
    state = place.journal.state("tests")
    assert state.whole and state.passed == 3 and len(state.failed) == 3 and not state.broken and not state.late
    assert [path.name for path in (place.folder / "logs").iterdir()] == ["tests.log"]


def test_workers_share_the_tests(place):
    place.tests.write_text("import pytest\n@pytest.mark.parametrize('n', range(40))\ndef test_it(n):\n    pass\n")
    place.run(place.step(workers=3))
    lines = [line for line in place.journal.lines("tests") if line["event"] == "end"]
    assert len(lines) == 40 and len({line["worker"] for line in lines}) == 3
    assert place.journal.state("tests").whole


def test_a_killed_part_leaves_no_process_and_goes_on_where_it_was(place):
    """Killed while a test hangs: what had ended is not run again, what had not is."""
    words = "import sys; from tests.benchmarks import planted_tests; planted_tests.run_planted(sys.argv[1])"
    part = subprocess.Popen([sys.executable, "-c", words, str(place.folder)], cwd=ROOT, env=place.environment)
    flag = place.folder / "hangs"
    worker = int(wait_for(lambda: flag.exists() and flag.read_text()))
    part.send_signal(signal.SIGKILL)
    part.wait()
    wait_for(lambda: not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text())
    assert place.outcomes() == dict(first="passed") and not place.journal.state("tests").whole
    flag.unlink()
    place.tests.write_text(TESTS.replace("    hang()\n", ""))
    place.run(place.step())
    assert place.outcomes()["hangs"] == "passed" and place.outcomes()["last"] == "passed"
    assert place.ran() == ["first", "hangs", "hangs", "fails", "dies", "last"]


def test_a_journal_that_ends_anywhere_is_read_and_written_on(place):
    for number in range(3):
        place.journal.write("s", "begin", item=f"é {number}", worker="w")
        place.journal.write("s", "end", item=f"é {number}", worker="w", outcome="passed")
    whole = place.journal.path.read_bytes()
    for length in range(len(whole)):
        place.journal.path.write_bytes(whole[:length])
        before = list(place.journal.lines("s"))
        place.journal.write("s", "done", worker="w")
        assert [line["event"] for line in place.journal.lines("s")] in (
            [line["event"] for line in before] + ["done"],
            ["begin", "end"] * 3 + ["done"],
        )
        assert place.journal.is_done("s", "w")
    other = Journal(place.journal.path, "other code on card")
    assert list(other.lines()) == [] and not other.ended("s")


@pytest.mark.slow
def test_each_fault_of_a_row_costs_itself_alone(place):
    rows = place.folder / "rows"
    words = ("-m", "benchmarks.gpu.measuring", "tests.benchmarks.planted", "--groups", "ours,torch", "--device", "cpu")
    step = Step("rows", (sys.executable, *words, "--smoke", "--rows", str(rows)), float("inf"), LONG)
    place.run(step)
    ended = place.journal.ended("rows")
    found = {item.removeprefix("tests.benchmarks.planted "): end["outcome"] for item, end in ended.items()}
    assert found == {
        '{"n": 1} torch, first': "measured",
        '{"n": 1} clvp_fast raises': "failed",
        '{"n": 1} clvp_fast hangs': "hung",
        '{"n": 1} clvp_fast dies': "died",
        '{"n": 1} torch, absent': "absent",
        '{"n": 1} clvp_fast wrong': "failed",
        '{"n": 1} clvp_fast last': "measured",
        '{"n": 2} torch, first': "measured",
        '{"n": 2} clvp_fast last': "measured",
    }
    whys = {end["why"] for end in ended.values()}
    assert "RuntimeError: a planted fault" in whys and "it is not here" in whys
    written = [(row["shape"]["n"], row["provider"]) for row in stored_rows(rows / "cpu")]
    names = ["torch, first", "clvp_fast wrong", "clvp_fast last"]
    assert written == [(1, name) for name in names] + [(2, "torch, first"), (2, "clvp_fast last")]
    # Called again, there is nothing to do.
    place.run(step)
    assert len(list(stored_rows(rows / "cpu"))) == len(written) and place.journal.state("rows").whole


def test_a_step_that_is_late_or_broken_stops_no_other(place, capsys):
    asleep = Step("asleep", (sys.executable, "-c", "import time; time.sleep(10**6)"), 0.0, LONG)
    broken = Step("broken", (sys.executable, "-c", "raise SystemExit('no such thing')"), LONG, LONG)
    absent = Step("absent", (str(place.folder / "nothing"),), LONG, LONG)
    place.tests.write_text("def test_it():\n    pass\n")
    planned = [asleep, broken, absent, place.step()]
    assert command.run(planned, place.journal, place.folder, float("inf")) == command.FAILED
    assert command.verdict(planned, place.journal) == "FAILED: asleep, broken, absent"
    said = capsys.readouterr().out
    assert "no such thing" in said and "OUT OF ITS TIME" in said and "it cannot be started" in said
    # A late step comes last when all is called again.
    planned[0] = Step("asleep", place.step("asleep").command, LONG, LONG)
    assert command.run(planned, place.journal, place.folder, float("inf")) == command.FAILED
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines() if " s  " in line][-1] == "asleep"
    assert command.verdict(planned, place.journal) == "FAILED: broken, absent"


def test_a_part_without_time_leaves_its_steps_to_the_next(place):
    place.tests.write_text("def test_it():\n    pass\n")
    planned = [place.step("one"), place.step("two")]
    assert command.run(planned, place.journal, place.folder, 0.0) == command.LEFT
    assert command.verdict(planned, place.journal) == "left for another part, so call it again: one, two"
    assert command.run(planned, place.journal, place.folder, float("inf")) == command.OK
    assert command.verdict(planned, place.journal) == "all of 2 steps are well"


def test_the_command_writes_a_table_and_ends_with_what_failed(place, monkeypatch, capsys):
    monkeypatch.setattr(command, "card_of", lambda python: "a card")
    monkeypatch.setattr(command.steps, "evidence", lambda sanitizer, rows: [place.step("one"), place.step("two")])
    monkeypatch.setenv("PLANTED_FOLDER", str(place.folder))
    place.tests.write_text("def test_it():\n    pass\n")
    words, out = ["evidence", "--out", str(place.folder / "out")], place.folder / "out"
    assert command.main(words) == command.OK
    said = capsys.readouterr().out
    assert said.startswith(f"a card; everything goes to {out}\n") and said.endswith("all of 2 steps are well\n")
    assert (out / "evidence.md").read_text() in said and "aim, scaled to a card" in said
    assert sorted(path.name for path in out.iterdir()) == ["evidence.md", "journal.jsonl", "logs"]
    # Another card begins anew, and a test that fails is told.
    monkeypatch.setattr(command, "card_of", lambda python: "another card")
    place.tests.write_text("def test_it():\n    assert False\n")
    assert command.main(words) == command.FAILED
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED: one, two"
    assert command.main([*words, "--seconds", "0"]) == command.FAILED


SANITIZER = """
import subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
print({said!r})
raise SystemExit(1 if "3 errors" in {said!r} else code)
"""


@pytest.mark.parametrize(
    ("said", "broken"),
    [
        ("===== ERROR SUMMARY: 0 errors", False),
        ("===== ERROR SUMMARY: 3 errors", True),
        ("RACECHECK SUMMARY: 2 h", True),
    ],
)
def test_a_sanitizer_s_word_is_the_step_s(place, said, broken):
    place.tests.write_text("def test_it():\n    pass\n")
    sanitizer = place.folder / "sanitizer.py"
    sanitizer.write_text(SANITIZER.format(said=said))
    place.run(place.step(prefix=(sys.executable, str(sanitizer), "--tool"), sanitized=True))
    state = place.journal.state("tests")
    assert state.whole and state.passed == 1 and bool(state.broken) == broken


def test_what_passed_under_a_sanitizer_that_was_ended_is_run_again(place):
    sanitizer = place.folder / "sanitizer.py"
    sanitizer.write_text(SANITIZER.format(said="ERROR SUMMARY: 0 errors"))
    place.tests.write_text(TESTS.split("def test_fails")[0] + "def test_last():\n    note('last')\n")
    prefix = (sys.executable, str(sanitizer), "--tool")
    place.run(place.step(seconds=float("inf"), prefix=prefix, sanitized=True))
    assert place.ran() == ["first", "hangs", "first", "last"]
    assert place.outcomes() == dict(first="passed", hangs="hung", last="passed")


def test_lines_are_json_of_a_few_words(place):
    place.tests.write_text("def test_it():\n    pass\n")
    place.run(place.step())
    lines = [json.loads(line) for line in place.journal.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["begin step", "begin", "end", "done", "whole"]
    assert all(line["mark"] == "code on card" and line["step"] == "tests" for line in lines)
