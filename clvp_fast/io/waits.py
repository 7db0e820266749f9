"""Long waits are shown on a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

#: Seconds of a wait that nobody is told of.
PATIENCE = 2.0


@contextmanager
def waiting(what: str, hidden: bool = False) -> Iterator[None]:
    """Show on a terminal what is waited for, and for how long, where that takes more than `PATIENCE` seconds."""
    console = Console(stderr=True, highlight=False)
    if hidden or not console.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task(what, total=None)
    timer = Timer(PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be about to show something
        progress.stop()
