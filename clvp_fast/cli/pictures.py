"""Pictures of results, drawn without a display."""

from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from clvp_fast.engine.voice_files import LoadedVoice
from clvp_fast.io.errors import cut
from clvp_fast.io.plot_style import TOKENS_PER_SECOND, plot_style

#: The number of recordings in an overview.
OVERVIEW_PANELS = 12


def draw_mel(path: Path, mel: np.ndarray, extractor, title: str) -> None:
    """Draw the log-mel features `[bins, frames]` over time, as a PNG."""
    with plot_style():
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        _mel_panel(figure, figure.subplots(), mel, extractor, _shorten(title, 110))
        figure.savefig(path, format="png")


def draw_mels(path: Path, mels: list[tuple[str, np.ndarray]], extractor, total: int) -> None:
    """Draw log-mel features `[bins, frames]` of some of `total` recordings, on one scale of colours, as a PNG."""
    columns = min(len(mels), 3)
    rows = -(-len(mels) // columns)
    norm = Normalize(min(mel.min() for _, mel in mels), max(mel.max() for _, mel in mels))
    with plot_style():
        figure = Figure(figsize=(12, 0.8 + 1.7 * rows), layout="constrained")
        title = "Log-mel features" + (f" of the first {len(mels)} of {total} recordings" if total > len(mels) else "")
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (name, mel) in zip(grid.flat, mels, strict=False):
            image = _show_mel(axes, mel, extractor, norm)
            axes.set_title(_shorten(name, 48), fontsize=8, fontweight="normal")
        for axes in grid.flat[len(mels) :]:
            axes.set_axis_off()
        figure.supxlabel("time (s)", fontsize=9)
        figure.supylabel("mel bin", fontsize=9)
        figure.colorbar(image, ax=grid, pad=0.01, label=_power_label(extractor))
        figure.savefig(path, format="png")


def draw_candidates(path: Path, voice: LoadedVoice, extractor, rows: list[dict], text: str) -> None:
    """Draw the voice's log-mel, and each candidate's score and length (best first), as a PNG.

    A saved voice has no log-mel to show; a candidate without a score is left out.
    """
    total, rows = len(rows), [row for row in rows if row["score"] is not None]
    with plot_style():
        figure = Figure(figsize=(10, 7 if voice.mel is not None else 4), layout="constrained")
        figure.suptitle(_shorten(text, 110), fontsize=11, x=0.01, ha="left")
        lower = figure
        if voice.mel is not None:
            upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.25])  # pyright: ignore[reportGeneralTypeIssues] - an array of both
            of = f" of the first of {voice.recordings} recordings" if voice.recordings > 1 else ""
            _mel_panel(upper, upper.subplots(), voice.mel, extractor, f"Voice: log-mel features{of}")
        score_axes, length_axes = lower.subplots(1, 2, width_ratios=[1.6, 1])
        if rows:
            norm = Normalize(*_limits([row["score"] for row in rows]))
            _score_panel(score_axes, rows[:64], norm, total)
            _length_panel(length_axes, rows, norm)
        else:
            score_axes.set(title="No candidate has a score: all of them are empty")
        figure.savefig(path, format="png")


def _mel_panel(figure, axes, mel: np.ndarray, extractor, title: str) -> None:
    image = _show_mel(axes, mel, extractor)
    axes.set(title=title, xlabel="time (s)", ylabel="mel bin")
    figure.colorbar(image, ax=axes, pad=0.01, label=_power_label(extractor))


def _show_mel(axes, mel: np.ndarray, extractor, norm: Normalize | None = None):
    seconds = mel.shape[1] * extractor.hop_length / extractor.sampling_rate
    extent = (0, seconds, 0, mel.shape[0])
    return axes.imshow(
        mel, origin="lower", aspect="auto", cmap="magma", extent=extent, interpolation="nearest", norm=norm
    )


def _power_label(extractor) -> str:
    return "normalised log power" if extractor.mel_norms else "log power"


def _score_panel(axes, rows: list[dict], norm: Normalize, total: int) -> None:
    scores = [row["score"] for row in rows]
    places = range(1, len(rows) + 1)
    axes.vlines(places, min(scores) - 1e3, scores, color="0.88", linewidth=1)
    axes.scatter(places, scores, c=scores, norm=norm, cmap="viridis", s=48, zorder=3)
    if len(rows) <= 24:
        axes.set_xticks(places, [str(row["candidate"]) for row in rows])
        for place, score in zip(places, scores, strict=True):
            axes.annotate(f"{score:.2f}", (place, score), (0, 6), textcoords="offset points", ha="center", fontsize=6.5)
    axes.set_ylim(*_limits(scores))
    title = "Score by candidate, best first" + (f" (best {len(rows)} of {total})" if total > len(rows) else "")
    axes.set(title=title, xlabel="candidate" if len(rows) <= 24 else "rank", ylabel="text-speech score")


def _length_panel(axes, rows: list[dict], norm: Normalize) -> None:
    for stopped, marker, label in ((True, "o", "ended by itself"), (False, "^", "cut at the limit")):
        chosen = [row for row in rows if row["stopped"] == stopped]
        if chosen:
            scores = [row["score"] for row in chosen]
            axes.scatter(
                [row["tokens"] for row in chosen],
                scores,
                c=scores,
                norm=norm,
                cmap="viridis",
                marker=marker,
                s=48,
                label=label,
            )
    best = rows[0]
    axes.scatter([best["tokens"]], [best["score"]], s=140, facecolors="none", edgecolors="crimson", label="best")
    axes.set_ylim(*_limits([row["score"] for row in rows]))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, handletextpad=0.2)
    axes.set(title="Length and score", xlabel=f"speech tokens ({TOKENS_PER_SECOND:.1f} to a second of speech)")


def _limits(scores: list[float]) -> tuple[float, float]:
    margin = max((max(scores) - min(scores)) * 0.12, 0.02)
    return min(scores) - margin, max(scores) + margin


def _shorten(text: str, width: int) -> str:
    # A dollar sign would switch matplotlib to mathematical notation; a name that is not UTF-8 would not be drawn.
    text = " ".join(text.split()).replace("$", r"\$").encode(errors="replace").decode()
    return cut(text, width)
