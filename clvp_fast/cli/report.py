"""The output of the commands: notes and progress on stderr, the result as a table or as JSON on stdout."""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers.utils import logging as transformers_logging

from clvp_fast.io.files import json_text
from clvp_fast.io.waits import waiting as waiting

# The fewest characters of a column that folds in a narrow terminal.
_FOLDED = 16

notes_console = Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Print one line for the user, on stderr."""
    notes_console.print(f"note: {' '.join(text.splitlines())}", markup=False, soft_wrap=True)


@contextmanager
def noting_warnings() -> Iterator[None]:
    """Show the package's own logged warnings as notes."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: note(record.getMessage())
    logger = logging.getLogger("clvp_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def quiet_transformers() -> None:
    """Silence the progress bars and warnings of transformers and its hub."""
    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def print_json(document) -> None:
    sys.stdout.write(json_text(document, sys.stdout.encoding or "utf-8"))


def print_table(table: Table) -> None:
    """Print a table on stdout. In a narrow terminal columns fold, and if that is not enough, lines break."""
    needed = 1
    for column in table.columns:
        column.no_wrap = column.overflow != "fold"
        cells = [len(str(cell)) for cell in (column.header, *column.cells)]
        needed += 3 + (max(cells) if column.no_wrap else min(_FOLDED, max(cells)))
    console = Console(highlight=False)
    Console(highlight=False, width=max(console.width, needed)).print(table)


#: The most rows of a printed table; the files have all.
_SHOWN = 32


def ranking(
    scores: np.ndarray, lengths: np.ndarray, stopped: np.ndarray | None = None, numbers: np.ndarray | None = None
) -> list[dict]:
    """Return one row per candidate, best score first.

    A row has its rank (from 1), the candidate's number (from `numbers`, or its index), its number of tokens, its score
    (None for an empty candidate with `--scoring trimmed`), and whether it stopped by itself, if `stopped` is given. All
    arrays are `[candidates]`.
    """
    rows = []
    for rank, index in enumerate(np.argsort(-scores, kind="stable"), start=1):
        score = float(scores[index])
        number = index if numbers is None else numbers[index]
        row: dict[str, Any] = {"rank": rank, "candidate": int(number), "tokens": int(lengths[index])}
        row["score"] = None if score == -math.inf else score
        rows.append(row if stopped is None else row | {"stopped": bool(stopped[index])})
    return rows


def score_text(score: float | None) -> str:
    return "none" if score is None else f"{score:.4f}"


def print_ranking(rows: list[dict]) -> None:
    """Print the rows of `ranking` as a table; a + after a length means that the candidate was cut."""
    table = Table(header_style="bold")
    for title in ("rank", "candidate", "tokens", "score"):
        table.add_column(title, justify="right")
    for row in rows[:_SHOWN]:
        cut = "" if row.get("stopped", True) else "+"
        table.add_row(str(row["rank"]), str(row["candidate"]), f"{row['tokens']}{cut}", score_text(row["score"]))
    print_table(table)
    if len(rows) > _SHOWN:
        Console(highlight=False).print(f"and {len(rows) - _SHOWN} more")


def print_summary(rows: list[dict]) -> None:
    """Print the best candidate of each request of `summary.json` as a table."""
    table = Table(header_style="bold")
    table.add_column("folder", overflow="fold")
    for title in ("best", "tokens", "score"):
        table.add_column(title, justify="right")
    for row in rows[:_SHOWN]:
        best = row["best"]
        if best is None:
            table.add_row(row["folder"], "failed")
        else:
            cut = "" if best["stopped"] else "+"
            table.add_row(row["folder"], str(best["candidate"]), f"{best['tokens']}{cut}", score_text(best["score"]))
    print_table(table)
    if len(rows) > _SHOWN:
        Console(highlight=False).print(f"and {len(rows) - _SHOWN} more")


def print_written(paths: list[Path]) -> None:
    for path in paths[:_SHOWN]:
        Console(highlight=False).print(f"wrote {path}", markup=False, soft_wrap=True)
    if len(paths) > _SHOWN:
        Console(highlight=False).print(f"and {len(paths) - _SHOWN} more")


def counting_progress(hidden: bool) -> Progress:
    """Make a bar on stderr that shows how many things are done, their rate, and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=notes_console,
        disable=hidden,
    )


class _RateColumn(ProgressColumn):
    def render(self, task) -> str:
        seconds = task.finished_time or task.elapsed
        return f"{task.completed / seconds:.1f} a second" if seconds else ""
