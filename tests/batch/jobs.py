"""Corpora to try jobs on, an executor without a model, and what must hold of a job's folder."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clvp_fast.batch.inputs import RowFile
from clvp_fast.batch.outcomes import Outcome
from clvp_fast.batch.settings import Settings
from clvp_fast.io.files import replacing

VOICE = Path(__file__).resolve().parents[2] / "examples/voice.flac"
WORDS = "the birch canoe slid on smooth planks and a doctor paid 25 dollars glue sheet to dark blue background"
#: A job on the random checkpoint that takes little time.
QUICK = {"checkpoint": "random", "voice": str(VOICE), "num_candidates": 2, "max_new_tokens": 5}
QUICK |= {"batch_size": 8, "device": "cpu"}


def records(count: int, seed: int = 0) -> list[dict]:
    """Return rows of many lengths; some have a missing voice, or sampling of their own."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        row = {"id": f"row-{index}", "text": " ".join(rng.choices(WORDS.split(), k=rng.randint(1, 12))) + "."}
        row |= {"voice": "nowhere.wav"} if index % 11 == 7 else {}
        row |= {"temperature": 0.5, "num_candidates": 3} if index % 7 == 3 else {}
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    pq.write_table(
        pa.Table.from_pylist(rows, pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows])), path
    )
    return path


def results(out: Path) -> list[dict]:
    """Return the lines of all shards, in their order, without what differs between equal runs."""
    lines: list[dict] = []
    for path in sorted((out / "shards").iterdir()):
        lines += pq.read_table(path).drop_columns("timings").to_pylist()
    return lines


def failures(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_whole(out: Path, count: int) -> None:
    """Assert that every row is spoken or failed, once, in the order of the input, and no other file is left."""
    spoken = [line["row"] for line in results(out) if line["rank"] == 1]
    failed = [failure["row"] for failure in failures(out)]
    assert spoken == sorted(spoken) and failed == sorted(failed)
    assert sorted(spoken + failed) == list(range(count))
    assert not list((out / "unfinished").iterdir())
    assert not list(out.rglob("*.part"))


def blank_overview(path: Path, shards: list[Path], failed: int) -> None:
    """Replace the picture, which takes nine tenths of the time of a job without a model."""
    with replacing(path) as scratch:
        Path(scratch).write_bytes(b"no picture")


class NoModel:
    """In place of a worker: outcomes that follow from rows alone, and those asked for a voice "nowhere.wav" fail.

    asked: the rows that were asked for.
    """

    def __init__(self, settings: Settings, stop_after: int | None = None):
        self.settings = Settings(
            **settings.as_dict()
            | {name: getattr(settings, name) or found for name, found in (("max_new_tokens", 5), ("device", "cpu"))}
            | {"batch_size": settings.batch_size or 8, "threads": settings.threads or 1}
        )
        self.asked: list[int] = []
        self.broken_voices = ("nowhere.wav",)
        self.stop_after = stop_after

    def description(self) -> dict:
        return {"settings": self.settings.as_dict(), "checkpoint": "digest", "versions": {"torch": "1"}}

    def outcomes(self, path, tasks):
        rows = RowFile(path)
        for task in tasks:
            for row in task.rows_of(rows):
                if self.stop_after is not None and len(self.asked) >= self.stop_after:
                    raise KeyboardInterrupt
                self.asked.append(row.index)
                yield self.outcome(row)

    def outcome(self, row) -> Outcome:
        if row.error or (row.voice and Path(row.voice).name in self.broken_voices):
            return Outcome(row.index, row.id, error=row.error or f"there is no recording at {row.voice}")
        seed = row.seed(self.settings.seed)
        rng = np.random.default_rng(seed)
        lines = []
        for rank in range(1, (self.settings.keep or 2) + 1):
            codes = rng.integers(0, 8192, rng.integers(0, 5))
            lines.append(
                {
                    "row": row.index,
                    "id": row.id,
                    "rank": rank,
                    "candidate": rank - 1,
                    "candidates": 2,
                    "codes": codes,
                    "length": len(codes),
                    "stopped": True,
                    "score": float(np.float32(rng.standard_normal())),
                    "tokens": 7,
                    "seed": seed,
                    "settings": self.settings.digest,
                    "timings": dict.fromkeys(("prepare", "queue", "decode", "rank"), 0.5),
                }
            )
        return Outcome(row.index, row.id, tuple(lines))

    def close(self) -> None:
        pass


def rewrite(path: Path, change) -> None:
    """Change the bytes of a Parquet file."""
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def table_of(path: Path) -> pa.Table:
    return pq.read_table(path)
