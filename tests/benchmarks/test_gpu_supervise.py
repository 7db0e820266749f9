"""The GPU commands' workers and their supervisor, on a CPU: each planted fault costs itself alone."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import __main__ as command, steps, supervise, testing
from benchmarks.gpu.journal import Journal, State, WorkerProgress
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
    end = supervise._end

    def ended(*args):
        end(*args)
        flag.unlink(missing_ok=True)

    monkeypatch.setattr(supervise, "_end", ended)


def test_each_fault_of_a_test_costs_itself_alone(place):
    place.run(place.step(seconds=float("inf")))
    assert place.outcomes() == dict(
        first="passed", hangs="hung", fails="failed", dies="died", skips="skipped", last="passed"
    )
    assert place.ran() == ["first", "hangs", "fails", "dies", "last"]
    ended = {item.rsplit("_")[-1]: end for item, end in place.journal.ended("tests").items()}
    assert "assert (1 + 1) == 3" in ended["fails"]["why"] and "exit code -9" in ended["dies"]["why"]
    state = place.journal.state("tests")
    assert state.whole and [len(state.passed), len(state.left_out), len(state.failed)] == [2, 1, 3]
    assert "not here" in state.left_out[0] and not state.broken and not state.late
    assert [path.name for path in (place.folder / "logs").iterdir()] == ["tests.log"]


def test_children_of_a_hanging_worker_end_with_it(place):
    """End also the processes that a worker has started, such as a sanitizer's tests."""
    code = (
        "import subprocess; folder = os.environ['PLANTED_FOLDER']\n"
        "if ended('tests'): done(); sys.exit()\n"
        "child = subprocess.Popen(['sleep', '10000']); begin('it')\n"
        "for name in ('child', 'hangs'): open(f'{folder}/{name}', 'w').write(str(child.pid))\n"
        "child.wait()"
    )
    place.run(place.worker(code, seconds=float("inf")))
    child = Path("/proc") / (place.folder / "child").read_text()
    wait_for(lambda: not child.exists() or "Z" in (child / "stat").read_text())
    assert place.outcomes() == dict(it="hung")


def test_a_test_that_ends_in_the_grace_time_passes(place, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE", LONG)
    code = (
        "if ended('tests'): done(); print('ERROR SUMMARY: 0 errors'); sys.exit()\n"
        "begin('it'); open(os.environ['PLANTED_FOLDER'] + '/hangs', 'w').close(); sys.stdin.read()\n"
        "write('end', item='it', outcome='passed', why=''); print('ERROR SUMMARY: 0 errors')"
    )
    place.run(place.worker(code, seconds=float("inf"), sanitized=True))
    assert place.outcomes() == dict(it="passed")


@pytest.mark.parametrize(("items", "hangs"), [("aabbcc", None), ("aaaa", "a"), ("abbbb", "b")])
def test_an_item_s_time_begins_with_it(items, hangs, monkeypatch):
    left, now = list(items), [0.0]

    def wait(seconds):
        now[0] += 40.0

    monkeypatch.setattr(supervise, "monotonic", lambda: now[0])
    process = SimpleNamespace(poll=lambda: None if left else 0, wait=wait)
    progress = SimpleNamespace(look=lambda: left.pop(0))
    assert supervise._watched(process, Step("s", (), LONG, item_seconds=60.0), progress, LONG) == hangs


def test_workers_share_the_tests(place):
    place.tests.write_text("import pytest\n@pytest.mark.parametrize('n', range(40))\ndef test_it(n):\n    pass\n")
    place.run(place.step(workers=3))
    lines = [line for line in place.journal.lines("tests") if line["event"] == "end"]
    events = Counter(line["event"] for line in map(json.loads, place.journal.path.read_text().splitlines()))
    assert events == {"begin step": 1, "begin": 40, "end": 40, "done": 3, "whole": 1}
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
    assert [path.name for path in (place.folder / "logs").iterdir()] == ["tests.log"], "few files, however often killed"


def test_a_journal_that_ends_anywhere_is_read_and_written_on(place):
    for number in range(3):
        place.journal.write("s", "begin", item=f"é {number}", worker="w")
        place.journal.write("s", "end", item=f"é {number}", worker="w", outcome="passed")
    whole = place.journal.path.read_bytes()
    for length in range(0, len(whole), 7):
        place.journal.path.write_bytes(whole[:length])
        before = list(place.journal.lines("s"))
        place.journal.write("s", "done", worker="w")
        assert [line["event"] for line in place.journal.lines("s")] in (
            [line["event"] for line in before] + ["done"],
            ["begin", "end"] * 3 + ["done"],
        )
    other = Journal(place.journal.path, "other code on card")
    assert list(other.lines()) == [] and not other.ended("s")


def test_the_progress_of_a_worker_reads_only_new_lines(place):
    """However the lines come, in pieces or many at once; what it has read may be gone."""
    place.journal.write("s", "begin", item="before", worker="w")
    progress, path = WorkerProgress(place.journal, "w"), place.journal.path
    seen, read = [], path.stat().st_size
    for worker in ("w", "other"):
        place.journal.write("s", "begin", item="it", worker=worker)
        place.journal.write("s", "end", item="it", worker=worker, outcome="passed", why="w")
    place.journal.write("s", "done", worker="w")
    whole = path.read_bytes()
    for length in (*range(read, len(whole), 5), len(whole)):
        path.write_bytes(b"\xff" * read + whole[read:length])
        seen.append((progress.look(), progress.ended, progress.done))
        read = whole.rfind(b"\n", 0, length) + 1
    assert list(dict.fromkeys(seen)) == [(None, 0, False), ("it", 0, False), (None, 1, False), (None, 1, True)]


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


FINE = "end('one'); done()"


def test_a_step_that_is_late_or_broken_stops_no_other(place, capsys):
    asleep = Step("asleep", (sys.executable, "-c", "import time; time.sleep(10**6)"), 0.0, LONG)
    broken = Step("broken", (sys.executable, "-c", "raise SystemExit('no such thing')"), LONG, LONG)
    absent = Step("absent", (str(place.folder / "nothing"),), LONG, LONG)
    planned = [asleep, broken, absent, place.worker(FINE)]
    assert command.run(planned, place.journal, place.folder, float("inf")) == command.FAILED
    assert command.verdict(planned, place.journal) == "FAILED: asleep, broken, absent"
    said = capsys.readouterr().out
    assert "no such thing" in said and "OUT OF ITS TIME" in said and "it cannot be started" in said
    assert not place.journal.state("absent").whole, "it may be there when all is called again"
    # A late step comes last when all is called again.
    planned[0] = place.worker(FINE, "asleep")
    assert command.run(planned, place.journal, place.folder, float("inf")) == command.FAILED
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines() if " s  " in line][-1] == "asleep"
    assert command.verdict(planned, place.journal) == "FAILED: broken, absent"


def test_a_part_without_time_leaves_its_steps_to_the_next(place):
    planned, told = [place.worker(FINE, "one"), place.worker(FINE, "two")], []

    def run(deadline):
        return command.run(planned, place.journal, place.folder, deadline, lambda: told.append(place.outcomes("two")))

    assert run(0.0) == command.LEFT and told == []
    assert command.verdict(planned, place.journal) == "left for another part, so call it again: one, two"
    assert run(float("inf")) == command.OK and told == [{}, {"one": "passed"}], "behind each step"
    assert command.verdict(planned, place.journal) == "all of 2 steps are well"


@pytest.fixture
def called(place, monkeypatch):
    """Call the command with two steps of quick workers, whose code is given, and return its words."""
    monkeypatch.setattr(command, "card_of", lambda python: "a card")

    def call(code, *words):
        planned = [place.worker(code, "one"), place.worker(code, "two")]
        monkeypatch.setattr(command.steps, "evidence", lambda sanitizer, rows: planned)
        return command.main(["evidence", "--out", str(place.folder / "out"), *words])

    return call


def test_the_command_writes_a_table_and_ends_with_what_failed(place, called, monkeypatch, capsys):
    out = place.folder / "out"
    assert called(FINE, "--seconds", "0") == command.LEFT
    assert capsys.readouterr().out.endswith("left for another part, so call it again: one, two\n")
    assert called(FINE) == command.OK
    said = capsys.readouterr().out
    assert said.startswith(f"a card; everything goes to {out}\n") and said.endswith("all of 2 steps are well\n")
    assert (out / "evidence.md").read_text() in said and "aim, scaled to a card" in said
    assert sorted(path.name for path in out.iterdir()) == ["evidence.md", "journal.jsonl", "logs"]
    # Another card or another triton begins anew, and a test that fails is told.
    fails = "end('one', 'failed', 'why'); done()"
    assert called(fails) == command.OK, "all has come to something"
    monkeypatch.setattr(command, "versions", lambda: dict(torch="1", triton="2", transformers="3"))
    assert called(fails, "--seconds", "1e4") == command.FAILED
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED: one, two"
    assert called(FINE, "--seconds", "0") == command.FAILED
    monkeypatch.setattr(command, "card_of", lambda python: "another card")
    assert called(FINE) == command.OK


def test_of_many_failures_the_first_are_told():
    state = State(passed=[], left_out=[], failed=[f"test {n}: failed" for n in range(25)], whole=True)
    first, *lines, last = command.told(Step("tests", (), LONG, LONG), state).splitlines()
    assert first.endswith("0 well, 25 FAILED") and len(lines) == 20 and last.strip() == "... and 5 more, in the journal"


def test_tests_alone_have_no_table(place, called, monkeypatch, capsys):
    monkeypatch.setattr(command.steps, "check", lambda sanitizer: [place.worker(FINE)])
    assert command.main(["check", "--out", str(place.folder / "out")]) == command.OK
    assert "aim" not in capsys.readouterr().out and not (place.folder / "out/evidence.md").exists()


def test_a_worker_whose_device_is_lost_costs_the_test_that_lost_it(place):
    code = f"if ended('tests'): done(); sys.exit()\nend('it', 'failed', 'why'); sys.exit({supervise.DEVICE_LOST})"
    place.run(place.worker(code))
    assert place.outcomes() == dict(it="failed") and place.journal.state("tests").whole


def test_a_gpu_that_does_not_answer_is_none(tmp_path):
    python = tmp_path / "python"
    for answer, card in (("echo 'NVIDIA H200'", "NVIDIA H200"), ("echo", None), ("exec sleep 1000", None)):
        python.write_text(f"#!/bin/sh\n{answer}\n")
        python.chmod(0o755)
        assert command.card_of(str(python), 1.0 if "sleep" in answer else LONG) == card


def test_the_command_says_in_a_sentence_why_it_cannot_begin(place, called, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        called(FINE, "--out", "")
    assert "such as out/gpu, and not ''" in capsys.readouterr().err
    for words in ("soon", "nan", "inf", "-1", ""):
        with pytest.raises(SystemExit):
            called(FINE, "--seconds", words)
        assert f"such as 540, and not {words!r}" in capsys.readouterr().err
    with Journal(place.folder / "out/journal.jsonl", "another's").held():
        assert called(FINE) == command.FAILED
        assert "another run writes to" in capsys.readouterr().err
    assert called(FINE) == command.OK
    (place.folder / "out/evidence.md").unlink()
    (place.folder / "out/evidence.md").mkdir()
    assert called(FINE) == command.FAILED and "choose another place with GPU_OUT" in capsys.readouterr().err
    monkeypatch.setattr(command, "card_of", lambda python: None)
    assert called(FINE) == command.FAILED
    said = capsys.readouterr().err
    assert "needs a CUDA device" in said and "--count tells" in said


@pytest.mark.parametrize(
    ("said", "errors"),
    [("===== ERROR SUMMARY: 0 errors", 0), ("===== ERROR SUMMARY: 3 errors", 1), ("RACECHECK SUMMARY: 2 h", 1)],
)
def test_a_sanitizer_s_word_is_the_step_s_for_good(place, said, errors):
    """Also where another part ends the step, whose own sanitizer saw nothing."""
    code = f"print('ERROR SUMMARY: 0 errors') if 'one' in ended('tests') else (end('one'), print({said!r}))"
    place.run(place.worker(code, sanitized=True))
    assert place.journal.state("tests").broken, "its second worker did nothing"
    place.run(place.worker("end('two'); done(); print('ERROR SUMMARY: 0 errors')", sanitized=True))
    state = place.journal.state("tests")
    assert state.whole and state.passed == ["one", "two"] and len(state.failed) == errors and not state.broken


def test_passes_without_a_sanitizers_report_do_not_count(place):
    code = (
        "if 'one' not in ended('tests'): end('one'); begin('dies'); sys.exit(3)\n"
        "done(); print('ERROR SUMMARY: 0 errors')"
    )
    place.run(place.worker(code, sanitized=True))
    assert place.outcomes() == dict(dies="died")


SANITIZER = """
import subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
print("ERROR SUMMARY: 0 errors", flush=True)
raise SystemExit(code)
"""


def test_passes_under_a_sanitizer_survive_a_hanging_test(place, monkeypatch):
    """End its worker first, so that it can report."""
    monkeypatch.setattr(supervise, "GRACE", LONG)
    sanitizer = place.folder / "sanitizer.py"
    sanitizer.write_text(SANITIZER)
    place.tests.write_text(TESTS.split("def test_fails")[0] + "def test_last():\n    note('last')\n")
    prefix = (sys.executable, str(sanitizer), "--tool")
    place.run(place.step(seconds=float("inf"), prefix=prefix, sanitized=True))
    assert place.ran() == ["first", "hangs", "last"]
    assert place.outcomes() == dict(first="passed", hangs="hung", last="passed")


def test_a_worker_that_dies_between_two_tests_costs_nothing_else(place):
    place.run(place.worker("n = len(ended('tests')); end(str(n)); sys.exit(7) if n == 0 else done()"))
    state = place.journal.state("tests")
    assert state.whole and len(state.passed) == 2 and not state.broken
    assert "between two items" in state.failed[0] and state.failed[0].endswith("died")


def test_a_sanitizer_whose_tests_cannot_be_collected_is_started_once(place):
    place.run(place.worker("print('no such file\\nERROR SUMMARY: 0 errors'); sys.exit(2)", sanitized=True))
    assert "exit code 2: no such file" in place.journal.state("tests").broken
    assert (place.folder / "logs/tests.log").read_text().count("no such file") == 1


def test_a_file_that_cannot_be_imported_costs_its_own_tests(place):
    place.tests.write_text("def test_it():\n    pass\n")
    place.tests.with_name("test_other.py").write_text("import no_such_module\n")
    step = place.step()
    options = steps.check("sanitizer")[0].command
    options = options[options.index("-q") + 1 : options.index("-m", options.index("-q"))]
    place.run(Step("tests", (*step.command[:-1], str(place.tests.parent), *options), LONG, LONG))
    state = place.journal.state("tests")
    assert state.whole and [name.rpartition(":")[2] for name in state.passed] == ["test_it"] and not state.broken
    assert state.failed == ["collecting test_other.py: failed"]
    # Were it to stop everything, as pytest does by itself, no worker would be started for ever.
    place.run(Step("stopped", (*step.command[:-1], str(place.tests.parent)), LONG, LONG))
    assert "collecting test_other.py: failed" in place.journal.state("stopped").failed
    assert "exit code 2" in place.journal.state("stopped").broken


def test_a_step_in_which_nothing_ran_is_red(place, capsys):
    skipped = place.worker("end('one', 'skipped', 'there is no nvcc'); done()", "skipped")
    planned = [place.worker("done()", "empty"), skipped, place.worker("end('one'); done()", "fine")]
    assert command.run(planned, place.journal, place.folder, float("inf")) == command.FAILED
    assert command.verdict(planned, place.journal) == "FAILED: empty, skipped"
    said = capsys.readouterr().out
    assert "0 well, 1 left out, BROKEN" in said and "there is no nvcc" in said and "nothing ran, 0 left out" in said


def test_megabytes_that_a_test_prints_are_in_the_log_alone(place, monkeypatch):
    monkeypatch.setattr(supervise, "_TAIL_BYTES", 1000)
    place.run(place.worker("print('a' * 10**6); print('the end'); begin('dies') if not ended('tests') else done()"))
    why = place.journal.ended("tests")["dies"]["why"]
    assert len(why) < 1100 and why.endswith("the end\n")
    assert (place.folder / "logs/tests.log").stat().st_size > 10**6


def test_a_device_is_asked_before_a_failed_test_has_ended(place, monkeypatch):
    """So that a kernel that never ends is the hanging of the test that launched it."""
    options = {"--journal": place.journal.path, "--mark": place.journal.mark, "--step": "tests"}
    options |= {"--worker": "w", "--share": "0/1"}
    worker = testing._Worker(SimpleNamespace(getoption=options.get))
    progress, seen = WorkerProgress(place.journal, "w"), []

    def synchronize():
        seen.append(progress.look())
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(testing, "_cuda", lambda: SimpleNamespace(synchronize=synchronize))
    worker.pytest_runtest_logstart("one")
    report = SimpleNamespace(when="call", failed=True, skipped=False, longreprtext="why", duration=0.0)
    worker.pytest_runtest_logreport(report)
    with pytest.raises(pytest.exit.Exception):
        worker.pytest_runtest_logfinish("one")
    assert seen == ["one"] and progress.look() is None and progress.ended == 1


def test_a_full_disk_is_reported(place, monkeypatch):
    """Fill the disk in the middle of a line, and before a supervisor's own line."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, text: write(descriptor, text[: len(text) // 2]))
    with pytest.raises(OSError, match="No space left"):
        place.journal.write("s", "done", worker="w")
    monkeypatch.undo()
    place.journal.write("s", "done", worker="w")
    assert len(list(place.journal.lines())) == 1

    def full(step, journal, n, *more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(supervise, "_share", full)
    with pytest.raises(OSError, match="No space left"):
        place.run(place.worker("", workers=3))
