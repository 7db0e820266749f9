"""The bar counts what was drawn, and knows what can still come; long waits are shown, and short ones are not."""

import io
import re
import sys
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from clvp_fast import native
from clvp_fast.cli.progress import DecodingProgress, warm_up
from clvp_fast.io import waits

STOP = 9


@pytest.fixture
def counts():
    """Give the counts of 2 requests with 3 candidates of at most 5 tokens."""
    return DecodingProgress(Progress(disable=True), 2, 3, 5, STOP)


def shown(counts):
    counts.show()
    return counts._progress.tasks[0]


def test_limit_falls_with_those_that_stop(counts):
    assert (counts.candidates, counts.limit) == (6, 30)
    for token in (1, 2, STOP):
        counts("a", 0, token)
    assert (counts.tokens, counts.ended, counts.limit) == (3, 1, 28)
    for token in range(5):
        counts("a", 1, token)
    assert (counts.tokens, counts.ended, counts.limit) == (8, 2, 28), "cut at the limit"
    counts("a", 2, STOP)
    assert (counts.tokens, counts.ended, counts.limit) == (9, 3, 24)
    counts.close("a")
    assert (counts.tokens, counts.candidates, counts.limit) == (9, 6, 24)
    task = shown(counts)
    assert task.fields["ended"] == "3 of 6 candidates" and (task.completed, task.total) == (9, 24)


def test_failed_requests_are_expected_no_more(counts):
    counts("a", 0, STOP)
    counts("a", 1, 3)
    counts.close("a")
    assert (counts.tokens, counts.ended, counts.candidates, counts.limit) == (2, 1, 4, 2 + 15)
    counts.close("b")  # before it drew anything
    assert (counts.tokens, counts.candidates, counts.limit) == (2, 1, 2)
    assert shown(counts).fields["left"] == ""


def test_rate_and_time_left(counts):
    for token in range(4):
        counts("a", 0, token)
    counts._started -= 12
    counts.paused = 4.0  # in which results were written
    task = shown(counts)
    assert re.fullmatch("4 tokens, [01] a second", task.fields["rate"])
    assert task.fields["left"] == "left: 0:00:52 at most"  # 26 tokens at 8 s for 4


def test_warm_up_is_shown(capsys):
    class Engine:
        def warm_up(self, progress):
            for done in range(1, 4):
                progress(done, 3)
            return 1.5

    assert warm_up(Engine()) == 1.5
    shown = capsys.readouterr().err
    assert "capturing the decode step" in shown and "3/3" in shown


def test_behind_the_last_token_candidates_are_ranked(counts):
    assert shown(counts).description == "decoding"
    for request in "ab":
        for candidate in range(3):
            counts(request, candidate, STOP)
    assert shown(counts).description == "ranking"


@pytest.fixture
def terminal(monkeypatch):
    """Replace stderr by a terminal, and give the text that was written to it."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(waits, "Console", lambda **options: console)
    return written


def test_a_long_wait_is_shown_and_a_short_one_is_not(terminal, monkeypatch):
    with waits.waiting("loading a checkpoint"):
        pass
    assert "loading" not in terminal.getvalue() and "\n" not in terminal.getvalue()
    monkeypatch.setattr(waits, "PATIENCE", 0.05)
    with waits.waiting("loading a checkpoint"):
        time.sleep(0.5)
    assert re.search(r"loading a checkpoint.*0:00:0\d", terminal.getvalue())
    with pytest.raises(ValueError), waits.waiting("loading another"):
        raise ValueError
    with waits.waiting("a hidden one", hidden=True):
        time.sleep(0.1)
    assert "hidden" not in terminal.getvalue()


def test_without_a_terminal_a_wait_shows_nothing(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(waits, "Console", lambda **options: Console(file=written, highlight=False))
    monkeypatch.setattr(waits, "PATIENCE", 0.0)
    with waits.waiting("loading a checkpoint"):
        time.sleep(0.1)
    assert written.getvalue() == ""


def test_the_build_of_the_library_tells_its_rate_and_the_time_that_is_left(monkeypatch):
    written = io.StringIO()
    written.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", written)
    seconds = iter([0.0, 0.0, 8.0, 20.0])
    monkeypatch.setattr(native.time, "monotonic", lambda: next(seconds))
    show = native._progress("building")
    for done in (0, 2, 8):
        show(done, 8)
    lines = [line.split("\x1b")[0] for line in written.getvalue().split("\r")[1:]]
    assert lines == ["building: 0/8", "building: 2/8, 0.2 a second, left: 0:00:24", "building: 8/8"]
    assert written.getvalue().endswith("\n")
