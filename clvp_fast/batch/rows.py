"""Rows of a corpus: a text, a voice, settings, and a seed for each."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from hashlib import blake2b
from numbers import Integral
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from clvp_fast.batch.failures import failure_of
from clvp_fast.engine.sampling_params import SAMPLING
from clvp_fast.io.errors import sentence
from clvp_fast.io.files import user_path

#: The columns that a job reads; it ignores others.
COLUMNS = frozenset(("id", "text", "voice", *SAMPLING))

_TRUTH = {"true": True, "1": True, "false": False, "0": False}
# The most bytes of a recording in a row, and of a path that comes as bytes, which is Linux's limit.
_RECORDING, _PATH = 64 << 20, 4096


@dataclass(frozen=True)
class Row:
    """A row of the input.

    index: its position in the input, from 0. voice: None if the row names none.
    sampling: its own parameters, by their names in [`SamplingParams`].
    error: why it cannot be spoken, as far as is known after reading it.
    """

    index: int
    id: str | None
    text: str | None = None
    voice: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def read(
        cls,
        index: int,
        record: Mapping[str, Any],
        folder: Path | None = None,
        keep: Callable[[bytes], Path] | None = None,
    ) -> "Row":
        """Make a row from the columns of a file or a table; a fault in them becomes its error.

        Args:
            record: values by column; numbers may be given as text, and text as bytes of UTF-8. None, NaN and "" mean
                that there is no value, and an exception that it could not be read. `voice` is a path, the bytes of a
                recording, or both as `{"bytes", "path"}`, of which the bytes are used.
            folder: the folder for relative paths of voices.
            keep: writes a recording's bytes into a file and returns its path; None: a row with bytes is an error.
        """
        row_id = None
        try:
            given = {name: value for name in COLUMNS if not _is_nothing(value := record.get(name))}
            row_id = _id(given.pop("id", None))
            for name, value in given.items():
                if isinstance(value, Exception):
                    raise ValueError(f"{name} cannot be read: {sentence(value)}")
            if "text" not in given:
                raise ValueError("the row has no text")
            text, voice = _text("text", given.pop("text")), given.pop("voice", None)
            sampling = {name: _number(name, value) for name, value in given.items() if name != "voice"}
            voice = None if voice is None else _voice(voice, folder, keep)
        except Exception as error:
            return cls(index, row_id, error=failure_of(error))
        return cls(index, row_id, text, voice, sampling)

    def seed(self, job_seed: int) -> int:
        """Return the row's own seed, or 63 bits that depend only on the job's seed and the row's id."""
        if "seed" in self.sampling:
            return self.sampling["seed"]
        digest = blake2b(f"{job_seed} {self.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def sampling_json(self) -> str | None:
        return json.dumps(self.sampling) if self.sampling else None


def _is_nothing(value: Any) -> bool:
    return value is None or value in ("", b"") or (isinstance(value, (float, Decimal)) and math.isnan(value))


def _id(value: Any) -> str:
    if isinstance(value, (int, float, np.integer, Decimal, UUID)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, (str, bytes)):
        raise ValueError(f"each row needs an id of its own, a string or a number, not {value!r}")
    return _text("id", value)


def _text(name: str, value: Any) -> str:
    """Return a string, also for bytes: some writers of Parquet do not mark a column as text."""
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()
            return value
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"{name} is not valid Unicode ({error.reason}): save the input as UTF-8") from error
    raise ValueError(f"{name} must be a string, not {value!r}")


def _voice(value: Any, folder: Path | None, keep: Callable[[bytes], Path] | None) -> str:
    """Return the path of a voice; a recording in the row itself becomes a file."""
    recording = value if isinstance(value, bytes) and not _is_path(value) else None
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        recording, value = value.get("bytes") or None, value.get("path")
        if recording is None and _is_nothing(value):
            raise ValueError("voice has neither bytes nor a path")
    if recording is None:
        if not isinstance(value, (str, bytes)):
            raise ValueError(f"voice must be the path of a file or folder, not {value!r}")
        voice = _text("voice", value)
        return voice if folder is None else str(folder / user_path(voice))
    if not isinstance(recording, bytes):
        raise ValueError(f"bytes of a voice must be those of a recording, not {recording!r}")
    if len(recording) > _RECORDING:
        raise ValueError(
            f"the recording in the row has {len(recording)} bytes, and may have {_RECORDING >> 20} MiB: cut it, "
            "or give its path"
        )
    if keep is None:
        raise ValueError("voice must be the path of a file or folder here, not a recording's bytes")
    return str(keep(recording))


def _is_path(content: bytes) -> bool:
    """Tell whether bytes are a path: every recording has bytes that no text contains."""
    try:
        return len(content) <= _PATH and content.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _number(name: str, value: Any) -> Integral | float | bool:
    """Return a number as SamplingParams takes it, which checks its value."""
    if hasattr(value, "item"):  # a number of numpy
        value = value.item()
    number = _plain(value)
    if name == "do_sample":
        truth = value if isinstance(value, bool) else _TRUTH.get(str(number).strip().lower())
        if truth is None:
            raise ValueError(f"do_sample must be true or false, not {value!r}")
        return truth
    if isinstance(number, bool) or not isinstance(number, (Integral, float)):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return number


def _plain(value: Any) -> Any:
    """Return a number given as text or Decimal as Python's own, a whole one as int; anything else unchanged."""
    try:
        if isinstance(value, (str, Decimal)):
            digits = str(value).strip()
            value = int(digits) if digits.lstrip("+-").isdigit() else float(digits)
    except ValueError:
        return value
    # Tables with missing values in a column of whole numbers hold floats.
    return int(value) if isinstance(value, float) and value.is_integer() else value
