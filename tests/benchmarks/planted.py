"""A workload with a fault of each kind, for the supervisor's tests; its hanging provider says so in a file."""

import os
import signal
import time
import weakref
from pathlib import Path

from benchmarks.harness import Provider, task
from benchmarks.providers import Absent

#: Where the file is written that says that something hangs.
FOLDER = "PLANTED_FOLDER"
NAMES = (
    "torch, first",
    "clvp_fast raises",
    "clvp_fast hangs",
    "clvp_fast dies",
    "torch, absent",
    "clvp_fast wrong",
    "clvp_fast last",
)


def hang() -> None:
    (Path(os.environ[FOLDER]) / "hangs").write_text(str(os.getpid()))
    while True:
        time.sleep(1)


class Held:
    """The memory of a provider while it is measured."""


_held = weakref.WeakSet()


def make(name: str) -> Provider:
    if _held:
        raise RuntimeError("what the provider before this one held is still there")
    if "hangs" in name:
        hang()
    if "raises" in name:
        raise RuntimeError("a planted fault")
    if "dies" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "absent" in name:
        raise Absent("it is not here")
    held = Held()
    held.itself = held  # which only the collector of garbage frees
    _held.add(held)
    return Provider(name, lambda: held.itself, 1.0 if "wrong" in name else 0.0, 1e-3)


def tasks(device, smoke=False):
    for n in (1, 2):
        names = NAMES if n == 1 else (NAMES[0], NAMES[-1])
        yield task("planted", {"n": n}, {name: (lambda name=name: make(name)) for name in names}, 1)
