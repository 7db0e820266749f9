"""A function that Python calls at every line, or opcode, of what runs meanwhile."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def traced_by(trace) -> Iterator[None]:
    """`trace` is this thread's trace function within, and the one from before (coverage's, say) behind."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
