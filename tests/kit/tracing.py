"""A function that Python calls at every line, or opcode, of what runs meanwhile."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def traced_by(trace) -> Iterator[None]:
    """Make `trace` this thread's trace function, and restore the former one (coverage's, say) afterwards."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
