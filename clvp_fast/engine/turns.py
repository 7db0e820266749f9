"""Turns of threads at one resource, in the order in which they asked."""

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from queue import Empty, SimpleQueue
from typing import TypeVar, overload
from weakref import WeakSet

T = TypeVar("T")

# Seconds after which a waiting thread checks again, because an interrupt may have prevented its notification.
_PATIENCE = 0.05
_ALL: WeakSet["Turns"] = WeakSet()


def _forget_threads() -> None:
    """Forget turns in the child of a fork, which lacks the other threads: their turns would never end."""
    for turns in _ALL:
        turns._tickets.clear()


if hasattr(os, "register_at_fork"):  # Windows forks no process
    os.register_at_fork(after_in_child=_forget_threads)


class Turns:
    """Give one thread at a time the turn, the longest waiting one first, so that no long caller starves a short one.

    The oldest ticket has the turn. A ticket is given back in a `finally` block, whose first call does so: Python raises
    a signal's exception after a call, never before the first one, so that an interrupt cannot leave a turn taken.

    Args:
        context: entered for each turn.
    """

    def __init__(self, context: Callable[[], AbstractContextManager] = nullcontext):
        self._context = context
        self._tickets: dict[SimpleQueue, int] = {}  # tickets in the order of asking, with their threads
        _ALL.add(self)

    @property
    def mine(self) -> bool:
        """Tell whether this thread has the turn or waits for it; a finalizer or a callback may run then."""
        return threading.get_ident() in list(self._tickets.values())

    def refuse_mine(self) -> None:
        """Raise `RuntimeError` inside a turn of this thread, which would wait for itself."""
        if self.mine:
            raise RuntimeError("an engine cannot be asked for more within its own step, by a listener or a scorer")

    @overload
    def take(self, function: Callable[[], T]) -> T: ...

    @overload
    def take(self, function: Callable[[], T], unless: Callable[[], bool]) -> T | None: ...

    def take(self, function: Callable[[], T], unless: Callable[[], bool] = lambda: False) -> T | None:
        """Call `function` in a turn of this thread and return its result; return None if `unless()` is true first.

        `unless` is called when this thread's turn comes, and sometimes before. Raises `RuntimeError` inside a turn of
        this thread.
        """
        if unless():
            return None
        self.refuse_mine()
        ticket = SimpleQueue()
        try:
            self._tickets[ticket] = threading.get_ident()
            while next(iter(list(self._tickets))) is not ticket:
                with suppress(Empty):
                    ticket.get(timeout=_PATIENCE)
                if unless():
                    return None
            with self._context():
                return function()
        finally:
            self._tickets.pop(ticket, None)
            for oldest in list(self._tickets)[:1]:
                oldest.put(None)
