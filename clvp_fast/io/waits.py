"""Messages on a terminal during long waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

#: The seconds of a wait before a message appears.
PATIENCE = 2.0


@contextmanager
def waiting(what: str, hidden: bool = False) -> Iterator[None]:
    """Show on a terminal a wait's subject and duration, if it takes more than `PATIENCE` seconds."""
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
        timer.join()  # it may be showing something now
        progress.stop()
