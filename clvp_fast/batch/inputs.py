"""Corpora as files: JSON lines, CSV and Parquet, read a row at a time; and the copy of the rows that a job keeps.

The copy, `rows.parquet`, has a row group for each shard of the results. So the rows of any shard can be read directly,
whatever the form of the input, and a job of several days does not depend on its input file.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clvp_fast.batch.failures import failure_of
from clvp_fast.batch.rows import COLUMNS, Row
from clvp_fast.io.files import is_special

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("voice", pa.string()),
        ("sampling", pa.string()),
        ("error", pa.string()),
    ]
)
_BLOCK = 1 << 20
# Rows are in one bucket if their texts differ by less than this many characters.
_BUCKET = 32
# The deepest nesting of a line of JSON.
_NESTING = 64
# The number of rows read at a time if they may hold recordings.
_RECORDINGS = 8


def read_rows(
    path: Path,
    done: Callable[[float], None] = lambda share: None,
    unused: set[str] | None = None,
    keep: Callable[[bytes], Path] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a file in order. Rows that cannot be read have an error.

    Args:
        path: `.jsonl` (or `.ndjson`), `.csv`, or `.parquet`; voices in it are relative to its folder.
        done: called after each row with the part of the file, from 0 to 1, that is read.
        unused: receives the names of columns that a job ignores.
        keep: as for [`Row.read`].

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is of another kind, it lacks a column `id` or `text`,
            it has a column twice, or it is so damaged that its rows cannot be told apart; file and line are named.
    """
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".parquet": _parquet}
    require_file(path)
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is of no kind that can be read: its name must end in {', '.join(readers)}")
    folder = Path(os.path.abspath(path)).parent  # relative to a link, not to its target
    unused = set() if unused is None else unused
    for index, record in enumerate(readers[path.suffix.lower()](path, done, unused)):
        if isinstance(record, Exception):
            yield Row(index, None, error=failure_of(record))
        else:
            yield Row.read(index, record, folder, keep)


def require_file(path: Path) -> None:
    """Raise for an input that is not a file."""
    if path.is_dir():
        raise ValueError(f"the input {path} is a folder: give a file of rows, such as a .parquet file in it")
    if is_special(path):
        raise ValueError(f"the input {path} is a pipe or a device, and a job reads it more than once: give a file")
    if not path.is_file():
        raise FileNotFoundError(f"there is no input at {path}")


def digest_of(path: Path) -> str:
    """Return 32 hexadecimal digits of a file's content."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _json_lines(path: Path, done, unused: set[str]) -> Iterator[Mapping[str, Any] | Exception]:
    size = max(path.stat().st_size, 1)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = _first(path, line) if number == 1 else line
            if not line.strip():
                continue
            try:
                record = _json_object(line)
                unused.update(record.keys() - COLUMNS)
                yield record
            except ValueError as error:  # from JSON or from UTF-8
                yield ValueError(
                    f'{path}, line {number}: no JSON object such as {{"id": "a", "text": "Hello."}}: {error}'
                )
            done(file.tell() / size)


def _json_object(line: bytes) -> dict[str, Any]:
    if line.count(b"[") + line.count(b"{") > _NESTING and _depth(line) > _NESTING:
        raise ValueError(f"it nests more than {_NESTING} deep")
    record = json.loads(line.decode(), object_pairs_hook=_object)
    if not isinstance(record, dict):
        raise ValueError("it holds no object")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"it has {_repeated_name([name for name, _ in pairs])!r} twice")
    return found


def _depth(line: bytes) -> int:
    deepest = depth = 0
    for sign in re.sub(rb'"(?:[^"\\]|\\.)*"|[^][{}]', b"", line):
        depth += 1 if sign in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _csv(path: Path, done, unused: set[str]) -> Iterator[Mapping[str, Any] | Exception]:
    size, line = max(path.stat().st_size, 1), ""

    def lines(file) -> Iterator[str]:
        nonlocal line
        for number, content in enumerate(file):
            # A byte that is not UTF-8 fails its own row.
            line = (content if number else _first(path, content)).decode(errors="surrogateescape")
            yield line

    with open(path, "rb") as file:
        reader = csv.reader(lines(file), strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            place = f"{path}, line {start}"
            try:
                values = next(reader, None)
                wrong = (
                    None
                    if values is None or len(values) in (0, len(header or values))
                    else (f"{len(values)} values, and the header has {len(header or values)}")
                )
            except csv.Error as error:
                values, wrong = [], f"no row of CSV: {_reason(error)}"
            # A bad row of several lines, or with an unclosed quote, has no known end.
            if wrong and (header is None or reader.line_num > start or line.count('"') % 2):
                raise ValueError(
                    f"{place}: {wrong}; is a quote in the row that begins there not closed, or not doubled?"
                )
            if wrong:
                yield ValueError(f"{place}: {wrong}")
            elif values is None:
                break
            elif values and header is None:
                header = [name.strip() for name in values]
                unused.update(_columns(path, header))
            elif values and header is not None:
                yield dict(zip(header, values, strict=True))
            done(file.tell() / size)
        if header is None:
            _columns(path, [])


def _reason(error: csv.Error) -> str:
    """Return the message of Python's reader, without its advice to programmers."""
    return "a carriage return stands outside of quotes" if "new-line character" in str(error) else str(error)


def _first(path: Path, line: bytes) -> bytes:
    """Return the first line of a text, without the mark of UTF-8.

    Raises:
        ValueError: it is UTF-16, or has line ends that make the whole file one line.
    """
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line[:2]:
        raise ValueError(f"{path} is UTF-16: save it as UTF-8")
    if b"\r" in line.rstrip(b"\r\n") and not line.endswith(b"\n"):
        raise ValueError(f"{path} ends its lines with carriage returns only: save it with newlines")
    return line.removeprefix(b"\xef\xbb\xbf")


def _parquet(path: Path, done, unused: set[str]) -> Iterator[Mapping[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    with file:
        schema = file.schema_arrow
        unused.update(_columns(path, schema.names))
        known = [name for name in schema.names if name in COLUMNS]
        # Older versions of Arrow return this for a UUID.
        numbered = schema.field("id").type == pa.binary(16)
        rows = 1024 if "voice" not in known or _is_short(schema.field("voice").type) else _RECORDINGS
        read, total = 0, max(file.metadata.num_rows, 1)
        try:
            for batch in file.iter_batches(rows, columns=known):
                for record in _records(batch):
                    yield record | ({"id": UUID(bytes=record["id"])} if numbered and record["id"] else {})
                read += len(batch)
                done(read / total)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is damaged from row {read} on: {error}") from error


def _records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch, with an exception in place of each value that Python cannot represent.

    Text that is not UTF-8 is returned as bytes, so that each bad row fails alone.
    """
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        columns = [[_cell(value) for value in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:
        return value.as_buffer().to_pybytes() if isinstance(value, pa.BinaryScalar) else error


def _is_short(kind: pa.DataType) -> bool:
    """Tell whether a column holds paths, not recordings."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _columns(path: Path, found: list[str]) -> set[str]:
    """Return the columns in `found` that a job ignores.

    Raises:
        ValueError: a column is missing, or one that a job reads is there twice.
    """
    missing = [name for name in ("id", "text") if name not in found]
    if missing:
        shown = ", ".join(map(repr, found[:12])) or "none"
        other = next((sign for sign in ";\t|" if len(found) == 1 and sign in found[0]), None)
        advice = f"; separate values by commas, not by {other!r}" if other else ""
        raise ValueError(f"{path} has no column {missing[0]!r}; its columns are {shown}{advice}")
    if repeated := _repeated_name([name for name in found if name in COLUMNS]):
        raise ValueError(f"{path} has the column {repeated!r} twice: leave one")
    return set(found) - COLUMNS


def _repeated_name(names: list[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


class RowFile:
    """A job's own copy of its rows, in groups, each with the rows of one shard.

    Attributes:
        num_rows, num_shards: the totals. shard_rows: rows of each shard but the last.
    """

    def __init__(self, path: Path):
        """Open a copy. Raises `OSError` or `pyarrow.ArrowException` if it is damaged."""
        self._path = path
        self._file = pq.ParquetFile(path, page_checksum_verification=True)
        self.num_rows = self._file.metadata.num_rows
        self.num_shards = self._file.metadata.num_row_groups
        self.shard_rows = self.rows_of(0) if self.num_shards else 0

    def rows_of(self, shard: int) -> int:
        """Return the number of rows of a shard."""
        return self._file.metadata.row_group(shard).num_rows

    def without_voice(self) -> tuple[int, int | None]:
        """Return the number of speakable rows without a voice, and the first of them."""
        count, first = 0, None
        for shard in range(self.num_shards):
            table = self._file.read_row_group(shard, columns=["voice", "error"])
            pairs = enumerate(
                zip(table["voice"].is_valid().to_pylist(), table["error"].is_valid().to_pylist(), strict=True)
            )
            rows = [shard * self.shard_rows + place for place, (voice, error) in pairs if not voice and not error]
            count += len(rows)
            first = rows[0] if rows and first is None else first
        return count, first

    def shard(self, shard: int) -> list[Row]:
        """Return the rows of a shard. Raises `ValueError` if the copy is damaged."""
        try:
            records = self._file.read_row_group(shard).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self._path} is damaged ({error}): remove it, and it is made again") from error
        return [_row(shard * self.shard_rows + place, record) for place, record in enumerate(records)]

    @staticmethod
    def write(path: Path, rows: Iterable[Row], shard_rows: int) -> None:
        """Copy rows. A row that repeats an earlier row's id gets an error, because results are found by id."""
        hashes: list[np.ndarray] = []
        with _writer(path) as writer:
            for group in _groups(rows, shard_rows):
                hashes.append(np.array([_hash_of(row.id) for row in group], dtype=np.uint64))
                writer.write_table(_table(group))
        repeated = _repeated(np.concatenate(hashes)) if hashes else {}
        if repeated:
            _refuse_repeated(path, repeated)


@dataclass(frozen=True)
class Task:
    """Rows of a shard to be spoken: those at the given indices, or all."""

    shard: int
    rows: tuple[int, ...] | None = None

    def rows_of(self, file: RowFile) -> list[Row]:
        """Return the rows in buckets of similar lengths, the longest first, so that no long row comes last."""
        wanted = None if self.rows is None else set(self.rows)
        return in_buckets(row for row in file.shard(self.shard) if wanted is None or row.index in wanted)


def in_buckets(rows: Iterable[Row]) -> list[Row]:
    """Sort rows roughly by the length of their texts, the longest first."""
    return sorted(rows, key=lambda row: -(len(row.text or "") // _BUCKET))


def in_transit(rows: Iterable[Row]) -> pa.Table:
    """Return rows as a table that can be sent between machines."""
    rows = list(rows)
    return _table(rows).append_column("row", pa.array([row.index for row in rows], pa.int64()))


def arrived(table: pa.Table) -> list[Row]:
    """Return the rows of a table that `in_transit` made."""
    return [_row(record["row"], record) for record in table.to_pylist()]


def _row(index: int, record: dict) -> Row:
    sampling = json.loads(record["sampling"]) if record["sampling"] else {}
    return Row(index, record["id"], record["text"], record["voice"], sampling, record["error"])


def _table(rows: list[Row]) -> pa.Table:
    columns = [[row.id, row.text, row.voice, row.sampling_json(), row.error] for row in rows]
    return pa.table([pa.array(values, pa.string()) for values in zip(*columns, strict=True)], _SCHEMA)


def _writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, _SCHEMA, compression="zstd", write_page_checksum=True)


def _groups(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _hash_of(row_id: str | None) -> int:
    """Return a 64-bit hash of an id, 0 for none: ten million of them take 80 MB, the ids themselves a gigabyte."""
    return int.from_bytes(blake2b(row_id.encode(), digest_size=8).digest(), "little") | 1 if row_id is not None else 0


def _repeated(hashes: np.ndarray) -> dict[int, int]:
    """Return each row whose hash an earlier row has, with the first such row."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    first = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    again = (first != order) & (ordered != 0)
    return dict(zip(order[again].tolist(), first[again].tolist(), strict=True))


def _refuse_repeated(path: Path, repeated: dict[int, int]) -> None:
    """Rewrite the copy, with errors in the rows that repeat an id."""
    scratch = path.with_name(f"{path.name}.again.part")
    rows = RowFile(path)
    with _writer(scratch) as writer:
        for shard in range(rows.num_shards):
            group = rows.shard(shard)
            for place, row in enumerate(group):
                if row.index in repeated and row.error is None:
                    error = f"its id is also that of row {repeated[row.index]}: give each row one of its own"
                    group[place] = replace(row, error=error)
            writer.write_table(_table(group))
    scratch.replace(path)
