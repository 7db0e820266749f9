"""The folder of a job, from which the job can continue however it ended.

    manifest.json       the job's description: settings, input, checkpoint; after its end also its shards
    rows.parquet        the job's own copy of the input's rows
    voices/             recordings from the rows themselves, named by content; only if there are any
    shards/             part-000000.parquet and so on: results, each file written atomically
    unfinished/         part-000007.journal and so on: results of shards that are not complete yet
    failures.jsonl      rows that could not be spoken, and why
    summary.json, overview.png

A shard has the failures of its rows in its metadata, so that one rename publishes everything about it; failures.jsonl
is made from there. File names never come from the input.
"""

import fcntl
import json
import os
import socket
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clvp_fast.batch.outcomes import Outcome, from_table, to_table
from clvp_fast.io.files import UnwritableError, json_text, replacing, write_json

#: It rises with every change in the meaning of settings. Since 2, `top_k` defaults to 50 in Python; since 3, the
#: repetition penalty sees the original's prompt, and latents are those of its second pass.
FORMAT = "clvp_fast.batch.3"
_KEY = b"clvp_fast"


class JobFolder:
    """The files of one job, for one process at a time.

    Raises:
        UnwritableError: the folder cannot be made or written.
        BlockingIOError: another process works on it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with explained(folder):
            for part in (folder, self.shards, self.unfinished):
                part.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / ".lock", "a+")  # noqa: SIM115 - held until `close`
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise BlockingIOError(
                f"{owner} is at work on {folder}: wait for its end, or choose another folder"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

        self._remove_leftovers()

    def close(self) -> None:
        """Release the folder for other processes; the end of the process releases it too."""
        self._lock.close()

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def unfinished(self) -> Path:
        return self.folder / "unfinished"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.parquet"

    @property
    def failures(self) -> Path:
        return self.folder / "failures.jsonl"

    def keep_voice(self, content: bytes) -> Path:
        """Return the file of a recording from a row; write it if it does not exist."""
        path = Path(os.path.abspath(self.folder / "voices" / blake2b(content, digest_size=16).hexdigest()))
        if not path.exists():
            with explained(self.folder):
                path.parent.mkdir(exist_ok=True)
            with replacing(path) as scratch:
                scratch.write_bytes(content)
        return path

    def shard_path(self, shard: int) -> Path:
        return self.shards / f"part-{shard:06}.parquet"

    def journal_path(self, shard: int) -> Path:
        return self.unfinished / f"part-{shard:06}.journal"

    def has_shards(self) -> bool:
        return any(self.shards.iterdir())

    def read_manifest(self) -> dict[str, Any] | None:
        """Return the description of the job, or None if there is no job.

        Raises:
            ValueError: the manifest is damaged or of another version, or there are results without a manifest.
        """
        path = self.folder / "manifest.json"
        if not path.exists():
            if self.has_shards():
                raise ValueError(f"{self.shards} has results, but {path} is missing: choose another folder")
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found, version = manifest["format"], manifest.get("versions", {}).get("clvp_fast", "an unknown version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): put it back, or choose another folder") from error
        if found != FORMAT:
            raise ValueError(
                f"{path} is of the format {found!r}, and this version has {FORMAT!r}: finish it with the "
                f"clvp_fast that began it ({version}), or choose another folder"
            )
        return manifest

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        with replacing(self.folder / name) as path:
            write_json(path, document)

    def write_shard(self, shard: int, outcomes: Iterable[Outcome], schema: pa.Schema, settings: str) -> None:
        """Write a shard of results in the order of its rows, and remove its journal."""
        outcomes = sorted(outcomes, key=lambda outcome: outcome.row)
        failed = [_failure(outcome) for outcome in outcomes if outcome.error is not None]
        about = {"shard": shard, "rows": len(outcomes), "settings": settings, "failures": failed}
        table = to_table(outcomes, schema).replace_schema_metadata({_KEY: json.dumps(about)})
        with replacing(self.shard_path(shard)) as path:
            pq.write_table(table, path, compression="zstd", write_page_checksum=True)
        self.append_failures(failed)
        self.journal_path(shard).unlink(missing_ok=True)

    def check_shard(self, shard: int, rows: int, settings: str) -> dict[str, Any] | None:
        """Return the metadata of a shard, or None if it does not exist.

        Raises:
            ValueError: it is damaged, or belongs to another job.
        """
        path = self.shard_path(shard)
        if not path.exists():
            return None
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            about = json.loads(table.schema.metadata[_KEY])
            found = (about["shard"], about["rows"], about["settings"])
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
        if found != (shard, rows, settings):
            raise ValueError(f"{path} is of another job")
        return about

    def about(self, path: Path) -> dict[str, Any]:
        """Return the metadata of a checked shard."""
        return json.loads(pq.read_schema(path).metadata[_KEY])

    def read_shard(self, shard: int) -> list[Outcome]:
        """Return the outcomes of a checked shard, without its failures."""
        return from_table(pq.read_table(self.shard_path(shard)))

    def append_failures(self, failures: list[dict[str, Any]]) -> None:
        with explained(self.folder), open(self.failures, "a", encoding="utf-8") as file:
            file.writelines(json_text(failure, indent=None) for failure in failures)

    def write_failures(self, failures: Iterable[dict[str, Any]]) -> None:
        """Rewrite all failures, in the order of the rows."""
        with replacing(self.failures) as path, open(path, "w", encoding="utf-8") as file:
            file.writelines(json_text(failure, indent=None) for failure in failures)

    def _remove_leftovers(self) -> None:
        """Remove files that a process was writing when it died."""
        for folder in (self.folder, self.shards, self.unfinished):
            for path in folder.glob(".*.part"):
                path.unlink()


class Journal:
    """Outcomes of an unfinished shard. They reach the disk within moments, so that a sudden end does not lose them.

    Each addition is its length, its checksum and an Arrow stream, so that a torn one is recognized.
    """

    _HEAD = struct.Struct("<QI")

    def __init__(self, path: Path, outcomes: list[Outcome], schema: pa.Schema):
        """Begin a journal with `outcomes`, in place of a former journal."""
        self._schema = schema
        self._folder = path.parent
        with explained(self._folder):
            scratch = path.with_name(f".{path.name}.part")
            self._file = open(scratch, "wb")  # noqa: SIM115 - held until `close`
            self.add(outcomes)
            os.replace(scratch, path)

    def add(self, outcomes: list[Outcome]) -> None:
        if not outcomes:
            return
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema) as stream:
            stream.write_table(to_table(outcomes, self._schema))
        content = sink.getvalue()
        with explained(self._folder):
            self._file.write(self._HEAD.pack(len(content), zlib.crc32(content)))
            self._file.write(content)
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # after a full disk the journal can still be read
            self._file.close()

    @classmethod
    def read(cls, path: Path, schema: pa.Schema) -> list[Outcome]:
        """Return the outcomes of a journal, up to its first damage."""
        outcomes: list[Outcome] = []
        with open(path, "rb") as file:
            while len(head := file.read(cls._HEAD.size)) == cls._HEAD.size:
                length, checksum = cls._HEAD.unpack(head)
                content = file.read(min(length, path.stat().st_size))
                if not length or zlib.crc32(content) != checksum:  # a zeroed record is invalid too
                    break
                table = pa.ipc.open_stream(content).read_all()
                if not table.schema.equals(schema):
                    break
                outcomes += from_table(table)
        return outcomes


def _failure(outcome: Outcome) -> dict[str, Any]:
    return {"row": outcome.row, "id": outcome.id, "error": outcome.error}


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn errors from writing below `folder` into one sentence."""
    try:
        yield
    except UnwritableError:
        raise
    except OSError as error:
        raise UnwritableError.explain(error, folder) from error
