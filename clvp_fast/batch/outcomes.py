"""Outcomes of rows as Arrow tables: a line for each kept candidate, or one line with the reason for none.

This is the form in which results go into shards, into the journal of an unfinished shard, and between the workers of a
cluster.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clvp_fast.batch.rows import Row
from clvp_fast.batch.settings import Settings
from clvp_fast.engine.requests import CandidateResult

_TIMINGS = pa.struct([(stage, pa.float32()) for stage in ("prepare", "queue", "decode", "rank")])
_COLUMNS = [
    ("row", pa.int64()),
    ("id", pa.string()),
    ("rank", pa.int32()),
    ("candidate", pa.int32()),
    ("candidates", pa.int32()),
    ("codes", pa.list_(pa.int32())),
    ("length", pa.int32()),
    ("stopped", pa.bool_()),
    ("score", pa.float32()),
    ("tokens", pa.int64()),
    ("seed", pa.int64()),
    ("settings", pa.string()),
    ("timings", _TIMINGS),
    ("remarks", pa.list_(pa.string())),
]
_EMBEDDINGS = [("text_embedding", pa.list_(pa.float32())), ("speech_embedding", pa.list_(pa.float32()))]
_LATENTS = [("latents", pa.list_(pa.list_(pa.float32())))]
_ERROR = [("error", pa.string())]


def shard_schema(settings: Settings) -> pa.Schema:
    """Return the columns of results, as `clvp_fast.batch.run` documents them."""
    more = (_EMBEDDINGS if settings.embeddings else []) + (_LATENTS if settings.latents else [])
    return pa.schema(_COLUMNS + more)


def outcome_schema(settings: Settings) -> pa.Schema:
    """Return the columns of results and failures; a line with an `error` has only that, its row and its id."""
    return pa.schema([*shard_schema(settings), *pa.schema(_ERROR)])


@dataclass(frozen=True)
class Outcome:
    """The outcome of a row: lines of kept candidates, best first, as in `shard_schema`, or an error."""

    row: int
    id: str | None
    lines: tuple[dict[str, Any], ...] = ()
    error: str | None = None

    @property
    def drawn(self) -> dict[str, int]:
        """The numbers of candidates and tokens that were drawn for the row."""
        return {name: self.lines[0][name] if self.lines else 0 for name in ("candidates", "tokens")}

    @classmethod
    def of(
        cls, row: Row, seed: int, result: CandidateResult, settings: Settings, remarks: Sequence[str] = ()
    ) -> "Outcome":
        """Make the outcome of a row's result; an unusable result becomes an error.

        Args:
            seed: the seed that was used. remarks: sentences on how the row's text and voice were changed.
        """
        if error := result.failure(settings.dtype):
            return cls(row.index, row.id, error=error)
        lines = []
        tokens = int(result.lengths.sum() + result.stopped.sum())  # a stop token is drawn too
        for rank, candidate in enumerate(map(int, result.kept), start=1):
            length = int(result.lengths[candidate])
            line = {
                "row": row.index,
                "id": row.id,
                "rank": rank,
                "candidate": candidate,
                "candidates": len(result.codes),
                "codes": result.codes[candidate, :length],
                "length": length,
                "stopped": bool(result.stopped[candidate]),
                "score": float(result.scores[candidate]),
                "tokens": tokens,
                # The column is signed and the generator's key unsigned; their 64 bits are the same.
                "seed": seed - 2**64 if seed >= 2**63 else seed,
                "settings": settings.digest,
                "timings": result.timings,
                "remarks": list(remarks),
            }
            if settings.embeddings:
                assert result.speech_embeds is not None  # the engine's own scorer makes embeddings
                line["text_embedding"] = result.text_embeds
                line["speech_embedding"] = result.speech_embeds[candidate]
            if settings.latents:
                assert result.latents is not None  # the engine was asked for them
                line["latents"] = list(result.latents[candidate][0].float().cpu().numpy())
            lines.append(line)
        return cls(row.index, row.id, tuple(lines))


def to_table(outcomes: Iterable[Outcome], schema: pa.Schema) -> pa.Table:
    """Return the lines of outcomes; if `schema` has an `error`, also the failures."""
    lines: list[dict[str, Any]] = []
    for outcome in outcomes:
        if outcome.error is None:
            lines += outcome.lines
        elif "error" in schema.names:
            lines.append({"row": outcome.row, "id": outcome.id, "error": outcome.error})
    return pa.Table.from_pylist(lines, schema)


def from_table(table: pa.Table) -> list[Outcome]:
    """Return outcomes in the order of the first lines of their rows; this inverts `to_table`."""
    lines: dict[int, list[dict[str, Any]]] = {}
    for line in table.to_pylist():
        lines.setdefault(line["row"], []).append(line)
    return [_outcome(row, of_row) for row, of_row in lines.items()]


def _outcome(row: int, lines: list[dict[str, Any]]) -> Outcome:
    error = lines[0].get("error")
    if error is not None:
        return Outcome(row, lines[0]["id"], error=error)
    for line in lines:
        line.pop("error", None)
        line["codes"] = np.array(line["codes"], dtype=np.int32)
    return Outcome(row, lines[0]["id"], tuple(sorted(lines, key=lambda line: line["rank"])))
