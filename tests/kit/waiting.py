"""One bound for all that tests wait for: nothing fails because the machine was slow, and nothing hangs for ever."""

import time
from collections.abc import Callable
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

#: Seconds that any wait of a test may take. Tests wait for events; this is for those that never come.
BOUND = 900.0


def wait_for(found: Callable[[], T], pause: float = 0.02) -> T:
    """Ask until `found()` is true, and return what it then gave; fails after `BOUND` seconds."""
    end = time.monotonic() + BOUND
    while not (answer := found()):
        assert time.monotonic() < end, f"it did not happen in {BOUND:.0f} seconds"
        time.sleep(pause)
    return answer


def join(*threads: Thread) -> None:
    """Wait for the end of each thread; fails where one has not ended after `BOUND` seconds."""
    end = time.monotonic() + BOUND
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), f"{thread.name} did not end in {BOUND:.0f} seconds"
