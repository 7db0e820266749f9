"""Corpora as files: JSON lines, CSV and Parquet, read a row at a time; and the copy of the rows that a job keeps.

The copy, `rows.parquet`, has a row group for each shard of the results, so that any shard's rows can be read at once,
whatever the input was, and a job that goes on for days does not depend on what becomes of its input.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clvp_fast.batch.rows import COLUMNS, Row

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
# Rows whose texts differ by less than this many characters are in one bucket.
_BUCKET = 32


def read_rows(
    path: Path, done: Callable[[float], None] = lambda share: None, unused: set[str] | None = None
) -> Iterator[Row]:
    """The rows of a file, in its order. Those that cannot be read are rows with an error.

    Args:
        path: `.jsonl` (or `.ndjson`), `.csv`, or `.parquet`; voices in it are relative to its folder.
        done: told after each row which part of the file, from 0 to 1, is read.
        unused: gets the names of columns that say nothing to a job.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is of another kind, or has no columns `id` and `text`.
    """
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".parquet": _parquet}
    if not path.is_file():
        raise FileNotFoundError(f"there is no input at {path}")
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} must be one of {', '.join(readers)}, by its name")
    folder = path.resolve().parent
    unused = set() if unused is None else unused
    for index, record in enumerate(readers[path.suffix.lower()](path, done, unused)):
        if isinstance(record, Exception):
            yield Row(index, None, error=str(record))
        else:
            yield Row.read(index, record, folder)


def digest_of(path: Path) -> str:
    """32 hexadecimal digits of a file's content."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _json_lines(path: Path, done, unused: set[str]) -> Iterator[Mapping[str, Any] | Exception]:
    size = max(path.stat().st_size, 1)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
                if not isinstance(record, dict):
                    raise ValueError("it holds no object")
                unused.update(record.keys() - COLUMNS)
                yield record
            except ValueError as error:  # of JSON and of UTF-8
                yield ValueError(f'line {number} is no JSON object such as {{"id": "a", "text": "Hello."}}: {error}')
            done(file.tell() / size)


def _csv(path: Path, done, unused: set[str]) -> Iterator[Mapping[str, Any] | Exception]:
    size = max(path.stat().st_size, 1)
    with open(path, "rb") as file:
        # A byte that is no UTF-8 fails its own row.
        lines = (
            line.decode("utf-8-sig" if not start else "utf-8", "surrogateescape") for start, line in enumerate(file)
        )
        reader = csv.reader(lines)
        header = [name.strip() for name in next(reader, [])]
        unused.update(_columns(path, header))
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield ValueError(f"line {reader.line_num} is no row of CSV: {error}")
                continue
            if values is None:
                return
            if len(values) not in (0, len(header)):
                yield ValueError(f"line {reader.line_num} has {len(values)} values, and the header {len(header)}")
            elif values:
                yield dict(zip(header, values, strict=True))
            done(file.tell() / size)


def _parquet(path: Path, done, unused: set[str]) -> Iterator[Mapping[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    with file:
        unused.update(_columns(path, file.schema_arrow.names))
        known = [name for name in file.schema_arrow.names if name in COLUMNS]
        read, total = 0, max(file.metadata.num_rows, 1)
        try:
            for batch in file.iter_batches(1024, columns=known):
                yield from batch.to_pylist()
                read += len(batch)
                done(read / total)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged from row {read} on: {error}") from error


def _columns(path: Path, found: list[str]) -> set[str]:
    """Those of the columns found that say nothing to a job. Raises `ValueError` where one is missing."""
    missing = [name for name in ("id", "text") if name not in found]
    if missing:
        shown = ", ".join(map(repr, found[:12])) or "none"
        raise ValueError(f"{path} has no column {missing[0]!r}; its columns are {shown}")
    return set(found) - COLUMNS


class RowFile:
    """A job's own copy of its rows, in groups of as many as a shard has.

    Attributes:
        num_rows, num_shards: of all. shard_rows: of each shard but the last.
    """

    def __init__(self, path: Path):
        """Opens a copy. Raises `OSError` or `pyarrow.ArrowException` where it is damaged."""
        self._path = path
        self._file = pq.ParquetFile(path, page_checksum_verification=True)
        self.num_rows = self._file.metadata.num_rows
        self.num_shards = self._file.metadata.num_row_groups
        self.shard_rows = self.rows_of(0) if self.num_shards else 0

    def rows_of(self, shard: int) -> int:
        """How many rows a shard has."""
        return self._file.metadata.row_group(shard).num_rows

    def shard(self, shard: int) -> list[Row]:
        """The rows of a shard. Raises `ValueError` where the copy is damaged."""
        try:
            records = self._file.read_row_group(shard).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self._path} is damaged ({error}): remove it, and it is made again") from error
        return [_row(shard * self.shard_rows + place, record) for place, record in enumerate(records)]

    @staticmethod
    def write(path: Path, rows: Iterable[Row], shard_rows: int) -> None:
        """Copies rows. One whose id is also that of an earlier row gets an error, as results go by ids."""
        marks: list[np.ndarray] = []
        with _writer(path) as writer:
            for group in _groups(rows, shard_rows):
                marks.append(np.array([_mark(row.id) for row in group], dtype=np.uint64))
                writer.write_table(_table(group))
        repeated = _repeated(np.concatenate(marks)) if marks else {}
        if repeated:
            _mark_repeated(path, repeated)


@dataclass(frozen=True)
class Task:
    """Rows of a shard that are to be spoken: those of the given indices, or all."""

    shard: int
    rows: tuple[int, ...] | None = None

    def rows_of(self, file: RowFile) -> list[Row]:
        """In buckets of like lengths, the longest first, so that none of them is the last to be waited for."""
        wanted = None if self.rows is None else set(self.rows)
        return in_buckets(row for row in file.shard(self.shard) if wanted is None or row.index in wanted)


def in_buckets(rows: Iterable[Row]) -> list[Row]:
    """Rows by the length of their texts, roughly, the longest first."""
    return sorted(rows, key=lambda row: -(len(row.text or "") // _BUCKET))


def in_transit(rows: Iterable[Row]) -> pa.Table:
    """Rows as they travel between machines."""
    rows = list(rows)
    return _table(rows).append_column("row", pa.array([row.index for row in rows], pa.int64()))


def arrived(table: pa.Table) -> list[Row]:
    """The inverse of `in_transit`."""
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


def _mark(row_id: str | None) -> int:
    """64 bits of an id, 0 for none: ten million of them take 80 MB, and their ids a gigabyte."""
    return int.from_bytes(blake2b(row_id.encode(), digest_size=8).digest(), "little") | 1 if row_id is not None else 0


def _repeated(marks: np.ndarray) -> dict[int, int]:
    """Each row whose mark an earlier row has, and the first of those."""
    order = np.argsort(marks, kind="stable")
    ordered = marks[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    first = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    again = (first != order) & (ordered != 0)
    return dict(zip(order[again].tolist(), first[again].tolist(), strict=True))


def _mark_repeated(path: Path, repeated: dict[int, int]) -> None:
    """Writes the copy once more, with errors in the rows whose ids came before."""
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
