"""Candidates in your own Ray Data pipelines: an actor for `map_batches`.

    import ray
    from clvp_fast.distributed import CandidateActor

    spoken = ray.data.read_parquet("corpus.parquet").map_batches(
        CandidateActor,
        fn_constructor_kwargs={"checkpoint": "demo", "num_candidates": 16, "keep": 3},
        num_gpus=1,
        concurrency=(1, 8),
        batch_size=64,
    )

Importing this module imports neither Ray nor torch: a driver without a GPU can name the actor, and the model is loaded
where the actor runs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from clvp_fast.batch.inputs import in_buckets
from clvp_fast.batch.outcomes import outcome_schema, to_table
from clvp_fast.batch.rows import COLUMNS, Row
from clvp_fast.batch.settings import Settings
from clvp_fast.engine.defaults import MEMORY_FRACTION

# Columns of results that input rows may have too: `id` is the same, and `seed` is the seed that was used.
_SHARED = ("id", "seed", "row")


class CandidateActor:
    """An actor for `ray.data.Dataset.map_batches` that makes candidates for batches of rows; give it one GPU, or CPUs.

    Args:
        checkpoint: "demo", a folder that the actor's machine can read, or a hub id.
        memory_fraction: the share of free memory that may be used beside the weights.
        settings: those of [`clvp_fast.batch.Settings`]: `voice`, `keep`, `num_candidates`, `dtype` and so on.

    Raises:
        ValueError, FileNotFoundError: an unusable setting or checkpoint.
    """

    def __init__(self, checkpoint: str = "demo", *, memory_fraction: float = MEMORY_FRACTION, **settings: Any):
        from clvp_fast.batch.worker import ready_worker

        self._worker = ready_worker(Settings(checkpoint=checkpoint, **settings), memory_fraction)

    def __call__(self, batch: Mapping[str, Any] | pa.Table) -> pa.Table:
        """Return the lines of kept candidates, best first, in the order of the batch's rows.

        Args:
            batch: arrays by column, an Arrow table or a pandas frame: `id`, `text`, `voice` (a recording, a folder of
                recordings of one speaker, or a saved voice, which the actor's machine can read), and optionally
                `num_candidates`, `max_new_tokens`, `temperature` and so on, for rows with settings of their own.

        Returns:
            The columns of [`clvp_fast.batch.run`] without `row`. `error` is null; a row that could not be spoken has
            one line with the reason there. All other columns of the batch are repeated on each line.

        Raises:
            ValueError: the batch lacks `id` or `text`, or has a column that the results have too.
        """
        table = _as_table(batch)
        schema = outcome_schema(self._worker.settings)
        _check_columns(table.column_names, schema.names)
        known = table.select([name for name in table.column_names if name in COLUMNS])
        rows = [Row.read(place, record) for place, record in enumerate(known.to_pylist())]
        outcomes = sorted(self._worker.outcomes(in_buckets(rows)), key=lambda outcome: outcome.row)
        lines = to_table(outcomes, schema)
        result = lines.drop_columns("row")
        for name in table.column_names:
            if name not in result.column_names:
                result = result.append_column(name, table[name].take(lines["row"]))
        return result


def _as_table(batch: Any) -> pa.Table:
    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, Mapping):
        return pa.table({name: _as_array(name, values) for name, values in batch.items()})
    if hasattr(batch, "to_records"):
        return pa.Table.from_pandas(batch, preserve_index=False)
    raise TypeError(f"a batch must be arrays by column, an Arrow table or a pandas frame, not {type(batch).__name__}")


def _as_array(name: str, values: Any) -> pa.Array:
    try:
        return pa.array(values if np.ndim(values) == 1 else np.asarray(values).tolist())
    except pa.ArrowException as error:
        raise ValueError(f"column {name!r} of the batch cannot be a column of a table: {error}") from error


def _check_columns(found: list[str], of_results: list[str]) -> None:
    for name in ("id", "text"):
        if name not in found:
            raise ValueError(
                f"the batch has no column {name!r}; its columns are {', '.join(map(repr, found)) or 'none'}"
            )
    if taken := [name for name in found if name in of_results and name not in _SHARED]:
        raise ValueError(f"the batch has columns that results have too: {', '.join(taken)}; rename them before")
