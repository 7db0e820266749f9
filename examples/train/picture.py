"""The picture of what ranking gains: word errors of the mean, best-scored and best candidate, over their number."""

import json
from pathlib import Path

from examples.train.card import rankings

# The lines of the picture by their figure's name: what it says, and its colour.
_LINES = {
    "mean": ("the mean candidate", "#9aa0a6"),
    "picked": ("the candidate with the highest score", "#3f51b5"),
    "least": ("the candidate with the fewest errors", "#00897b"),
}
KINDS = ("open", "closed")


def content(figures: list[dict]) -> dict[str, list[list]]:
    """Return the points of the picture by language model: number of candidates, and the figures of their ranking."""
    found: dict[str, list[list]] = {kind: [] for kind in KINDS}
    for kind, count, evaluation in rankings(figures):
        best = evaluation[f"best_of_{count}"]
        found[kind].append([count, *(best[name] for name in _LINES), best["picked_error"]])
    return {kind: points for kind, points in found.items() if points}


def mark(figures: list[dict]) -> str:
    """Return the last line of the picture, by which one sees what it was drawn from."""
    return f"<!-- {json.dumps(content(figures))} -->"


def draw(figures: list[dict], path: Path) -> None:
    """Draw the picture as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = content(figures)
    with matplotlib.rc_context({"svg.hashsalt": "clvp_fast", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained", facecolor="white")
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, (kind, points) in zip(panels, shown.items(), strict=True):
            counts, *values, errors = zip(*points, strict=True)
            for (name, (label, colour)), line in zip(_LINES.items(), values, strict=True):
                axes.errorbar(counts, line, errors if name == "picked" else None, fmt="o-", color=colour, label=label)
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_title(f"heard with the {kind} language model", fontsize=9)
            axes.set(xlabel="candidates of a sentence", ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set(ylabel="word error rate")
        lines, labels = panels[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    with path.open("a", encoding="utf-8") as file:
        file.write(mark(figures) + "\n")
