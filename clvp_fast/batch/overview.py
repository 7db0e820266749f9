"""A picture of a job's results: how the scores and lengths of the best candidates are spread."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from clvp_fast.files import replacing
from clvp_fast.plot_style import TOKENS_PER_SECOND, plot_style

_BINS = 60


def draw_overview(path: Path, shards: list[Path], rows: int, failed: int) -> None:
    """Histograms of scores and lengths over `shards`, a shard at a time, as a PNG."""
    with plot_style(), replacing(path) as scratch:
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        figure.suptitle(
            f"Best candidates of {rows - failed} rows; {failed} rows failed", fontsize=11, x=0.01, ha="left"
        )
        score_axes, length_axes = figure.subplots(1, 2)
        counts, edges = _histogram(shards, "score")
        score_axes.stairs(counts, edges, fill=True, color="#35618f")
        score_axes.set(title="Scores", xlabel="text-speech score of the best candidate", ylabel="rows")
        for stopped, color, label in ((True, "#35618f", "ended by itself"), (False, "#c8553d", "cut at the limit")):
            counts, edges = _histogram(shards, "length", stopped, whole=True)
            length_axes.stairs(counts, edges, fill=True, color=color, alpha=0.8, label=label)
        length_axes.legend(fontsize=8, frameon=False)
        seconds = f"speech tokens ({TOKENS_PER_SECOND:.1f} to a second of speech)"
        length_axes.set(title="Lengths", xlabel=seconds, ylabel="rows")
        figure.savefig(scratch, format="png")


def _histogram(shards: list[Path], name: str, stopped: bool | None = None, whole: bool = False):
    """Counts and edges of a column of the best candidates, of all or of those that ended so.

    whole: edges lie between whole numbers, over all that there are.
    """
    low = min((values.min() for values in _values(shards, name) if len(values)), default=0.0)
    high = max((values.max() for values in _values(shards, name) if len(values)), default=1.0)
    if whole:
        edges = np.arange(low - 0.5, high + 1, max(1, -(-(high - low) // _BINS)))
        edges = np.append(edges, edges[-1] + 1) if edges[-1] < high else edges
    else:
        edges = np.linspace(low, high, _BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    for values in _values(shards, name, lambda table: table["stopped"] == stopped if stopped is not None else None):
        counts += np.histogram(values, edges)[0]
    return counts, edges


def _values(shards: list[Path], name: str, chosen: Callable = lambda table: None):
    """A column of each shard's best candidates; a score that is no number is left out."""
    for path in shards:
        table = {key: column.to_numpy() for key, column in _columns(path, name).items()}
        keep = (table["rank"] == 1) & np.isfinite(table[name].astype(float))
        if (mask := chosen(table)) is not None:
            keep &= mask
        yield table[name][keep]


def _columns(path: Path, name: str):
    table = pq.read_table(path, columns=["rank", "stopped", name])
    return {key: table[key] for key in table.column_names}
