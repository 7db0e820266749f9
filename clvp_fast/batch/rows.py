"""Rows of a corpus: what is to be said, in which voice, and how; each with a seed of its own."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from clvp_fast.batch.settings import SAMPLING

#: Columns that are looked at; others of an input are left alone.
COLUMNS = frozenset(("id", "text", "voice", *SAMPLING))

_TRUTH = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Row:
    """A row of the input.

    index: its place in the input, from 0. voice: None where the row names none.
    sampling: what it has of its own, as [`SamplingParams`] names it.
    error: why it cannot be spoken, as far as reading it told.
    """

    index: int
    id: str | None
    text: str | None = None
    voice: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def read(cls, index: int, record: Mapping[str, Any], folder: Path | None = None) -> "Row":
        """A row of what a file or a table has in its columns; what is wrong with it becomes its error.

        Args:
            record: values by column; numbers may be given as text. None, NaN and "" stand for nothing.
            folder: that relative paths of voices start from.
        """
        given = {name: value for name in COLUMNS if not _is_nothing(value := record.get(name))}
        row_id = given.pop("id", None)
        if isinstance(row_id, (int, float, np.integer)) and not isinstance(row_id, bool):
            row_id = str(row_id)
        try:
            text, voice = given.pop("text", None), given.pop("voice", None)
            if not isinstance(row_id, str):
                found, row_id = row_id, None
                raise ValueError(f"each row needs an id of its own, a string or a number, not {found!r}")
            if not isinstance(text, str):
                raise ValueError("the row has no text" if text is None else f"text must be a string, not {text!r}")
            if voice is not None and not isinstance(voice, str):
                raise ValueError(f"voice must be the path of a file or folder, not {voice!r}")
            for name, value in (("id", row_id), ("text", text), ("voice", voice or "")):
                _require_unicode(name, value)
            if voice is not None and folder is not None:
                voice = str(folder / Path(voice).expanduser())
            sampling = {name: _number(name, value) for name, value in given.items()}
        except ValueError as error:
            return cls(index, _printable(row_id), error=str(error))
        return cls(index, row_id, text, voice, sampling)

    def seed(self, job_seed: int) -> int:
        """The row's own, or 63 bits that follow from the job's seed and the row's id alone."""
        if "seed" in self.sampling:
            return self.sampling["seed"]
        digest = blake2b(f"{job_seed} {self.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def sampling_json(self) -> str | None:
        return json.dumps(self.sampling) if self.sampling else None


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))


def _require_unicode(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode ({error.reason}): save the input as UTF-8") from error


def _printable(value: str | None) -> str | None:
    return None if value is None else value.encode(errors="backslashreplace").decode()


def _number(name: str, value: Any) -> int | float | bool:
    """A number as SamplingParams takes it; whether its value can be is looked at there."""
    if hasattr(value, "item"):  # numpy's
        value = value.item()
    if name == "do_sample":
        truth = value if isinstance(value, bool) else _TRUTH.get(str(value).strip().lower())
        if truth is None:
            raise ValueError(f"do_sample must be true or false, not {value!r}")
        return truth
    try:
        number = float(value) if isinstance(value, str) and not value.strip().lstrip("+-").isdigit() else value
        number = int(number) if isinstance(number, str) else number
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, (Integral, float)):
        raise ValueError(f"{name} must be a number, not {value!r}")
    # Tables that miss a value in a column of whole numbers have them as floats.
    return int(number) if isinstance(number, float) and number.is_integer() else number
