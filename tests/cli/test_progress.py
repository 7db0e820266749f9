"""The bar counts what was drawn, and knows at each moment what can still come."""

import re

import pytest
from rich.progress import Progress

from clvp_fast.cli.progress import Watch, warm_up

STOP = 9


@pytest.fixture
def watch():
    """Of 2 requests with 3 candidates of at most 5 tokens."""
    return Watch(Progress(disable=True), 2, 3, 5, STOP)


def shown(watch):
    watch.show()
    return watch._progress.tasks[0]


def test_limit_falls_with_those_that_stop(watch):
    assert (watch.candidates, watch.limit) == (6, 30)
    for token in (1, 2, STOP):
        watch("a", 0, token)
    assert (watch.tokens, watch.ended, watch.limit) == (3, 1, 28)
    for token in range(5):
        watch("a", 1, token)
    assert (watch.tokens, watch.ended, watch.limit) == (8, 2, 28), "cut at the limit"
    watch("a", 2, STOP)
    assert (watch.tokens, watch.ended, watch.limit) == (9, 3, 24)
    watch.close("a")
    assert (watch.tokens, watch.candidates, watch.limit) == (9, 6, 24)
    task = shown(watch)
    assert task.fields["ended"] == "3 of 6 candidates" and (task.completed, task.total) == (9, 24)


def test_failed_requests_are_expected_no_more(watch):
    watch("a", 0, STOP)
    watch("a", 1, 3)
    watch.close("a")
    assert (watch.tokens, watch.ended, watch.candidates, watch.limit) == (2, 1, 4, 2 + 15)
    watch.close("b")  # before it drew anything
    assert (watch.tokens, watch.candidates, watch.limit) == (2, 1, 2)
    assert shown(watch).fields["left"] == ""


def test_rate_and_time_left(watch):
    for token in range(4):
        watch("a", 0, token)
    watch._started -= 12
    watch.paused = 4.0  # in which results were written
    task = shown(watch)
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
