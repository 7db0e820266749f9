"""What the commands say: notes and progress on stderr, the result as a table or as JSON on stdout."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers.utils import logging as transformers_logging

_notes = Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """One line for the person who watches, on stderr."""
    _notes.print(f"note: {text}", markup=False, soft_wrap=True)


@contextmanager
def noting_warnings() -> Iterator[None]:
    """Shows the package's own logged warnings as notes."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: note(record.getMessage())
    logger = logging.getLogger("clvp_fast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def quiet_transformers() -> None:
    """No progress bars and warnings of transformers between the notes of a command."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def print_json(document) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


#: Rows of a table that a person looks through; the files have all.
_SHOWN = 32


def ranking(scores: np.ndarray, lengths: np.ndarray, stopped: np.ndarray | None = None) -> list[dict]:
    """One row a candidate, best score first.

    A row has its rank (from 1), the number of the candidate (from 0, as given), its tokens, its score, and whether it
    came to its end, where `stopped` tells. All arrays are `[candidates]`.
    """
    rows = []
    for rank, index in enumerate(np.argsort(-scores, kind="stable"), start=1):
        row = {"rank": rank, "candidate": int(index), "tokens": int(lengths[index]), "score": float(scores[index])}
        rows.append(row if stopped is None else row | {"stopped": bool(stopped[index])})
    return rows


def print_ranking(rows: list[dict]) -> None:
    """The rows of `ranking` as a table; a length with + was cut short."""
    table = Table(header_style="bold")
    for title in ("rank", "candidate", "tokens", "score"):
        table.add_column(title, justify="right")
    for row in rows[:_SHOWN]:
        cut = "" if row.get("stopped", True) else "+"
        table.add_row(str(row["rank"]), str(row["candidate"]), f"{row['tokens']}{cut}", f"{row['score']:.4f}")
    Console(highlight=False).print(table)
    if len(rows) > _SHOWN:
        Console(highlight=False).print(f"and {len(rows) - _SHOWN} more")


def print_written(paths: list[Path]) -> None:
    for path in paths[:_SHOWN]:
        Console(highlight=False).print(f"wrote {path}", markup=False, soft_wrap=True)
    if len(paths) > _SHOWN:
        Console(highlight=False).print(f"and {len(paths) - _SHOWN} more")


def decoding_progress() -> Progress:
    """A bar on stderr that shows how far decoding is and how many candidates have stopped."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("token {task.completed:.0f} of at most {task.total:.0f}"),
        TextColumn("{task.fields[finished]}"),
        TimeElapsedColumn(),
        console=_notes,
    )


def counting_progress(hidden: bool) -> Progress:
    """A bar on stderr for many things of a kind: how many are done, how many a second, and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=_notes,
        disable=hidden,
    )


class _RateColumn(ProgressColumn):
    def render(self, task) -> str:
        seconds = task.finished_time or task.elapsed
        return f"{task.completed / seconds:.1f} a second" if seconds else ""
