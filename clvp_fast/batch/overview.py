"""A picture of a job's results: histograms of scores and lengths of the best candidates."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from clvp_fast.io.files import replacing
from clvp_fast.io.plot_style import TOKENS_PER_SECOND, plot_style

_BINS = 60
_BLUE, _RED = "#35618f", "#c8553d"


def draw_overview(path: Path, shards: list[Path], failed: int) -> None:
    """Draw histograms over the best candidates of all rows in `shards`, as a PNG; ten million rows take 100 MB."""
    scores, lengths, stopped = (np.concatenate(columns) for columns in zip(*map(_best, shards), strict=True))
    with plot_style(), replacing(path) as scratch:
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        figure.suptitle(f"Best candidates of {len(scores)} rows; {failed} rows failed", fontsize=11, x=0.01, ha="left")
        score_axes, length_axes = figure.subplots(1, 2)
        score_axes.hist(scores[np.isfinite(scores)], _BINS, color=_BLUE)  # a candidate without tokens may have no score
        score_axes.set(title="Scores", xlabel="text-speech score of the best candidate", ylabel="rows")
        width = -(-(lengths.max() - lengths.min() + 1) // _BINS)
        edges = np.arange(lengths.min(), lengths.max() + width + 1, width) - 0.5
        length_axes.hist(
            [lengths[stopped], lengths[~stopped]],
            edges,
            color=[_BLUE, _RED],
            label=["ended by itself", "cut at the limit"],
            stacked=True,
        )
        for axis in (score_axes.yaxis, length_axes.yaxis, length_axes.xaxis):
            axis.get_major_locator().set_params(integer=True)
        length_axes.legend(fontsize=8, frameon=False)
        seconds = f"speech tokens ({TOKENS_PER_SECOND:.1f} to a second of speech)"
        length_axes.set(title="Lengths", xlabel=seconds, ylabel="rows")
        figure.savefig(scratch, format="png")


def _best(shard: Path) -> tuple[np.ndarray, ...]:
    """Return score, length and `stopped` of the best candidate of each row."""
    names = ["score", "length", "stopped"]
    table = pq.read_table(shard, columns=names, filters=pc.field("rank") == 1)
    return tuple(table[name].to_numpy() for name in names)
