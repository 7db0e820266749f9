"""The figures of docs/benchmarks.md, drawn from the newest rows.

A figure carries a mark of what it was drawn from, and is drawn again only if that changes: other versions of
matplotlib write the same picture in other bytes.
"""

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

FIGURES = Path(__file__).parent.parent / "docs/benchmarks"
# One colour a provider; of those of one name, tiers in order.
_STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:")


def drawings(rows: list[dict]) -> dict[str, dict]:
    """By file name, what each figure shows: `kind`, `device`, and its lines or points."""
    found = {}
    for device in sorted({row["device"]["name"] for row in rows}):
        timed = [row for row in rows if row["device"]["name"] == device and row["seconds"]]
        stem = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        points = _roofline(timed)
        if points:
            ceilings = {"bytes": timed[-1]["device"]["copy_bytes_per_s"], "flop": _matmul(timed)}
            found[f"{stem}-roofline.svg"] = {"kind": "roofline", "device": device, "points": points} | ceilings
        lines = defaultdict(list)
        for row in sorted(timed, key=lambda row: row["shape"].get("candidates", 0)):
            if row["workload"] == "decode_step":
                lines[row["provider"]].append((row["shape"]["candidates"], row["seconds"]["median"]))
        if lines:
            found[f"{stem}-decode-step.svg"] = {"kind": "decode_step", "device": device, "lines": dict(lines)}
    return found


def _matmul(rows: list[dict]) -> dict[str, float]:
    rates = [row["device"]["matmul_flop_per_s"] for row in rows]
    return next((rate for rate in reversed(rates) if isinstance(rate, dict)), {})


def _roofline(rows: list[dict]) -> list[list]:
    """Of ours: workload, operations a byte, operations a second."""
    return [
        [row["workload"], row["flop"] / row["bytes"], row["flop"] / row["seconds"]["median"]]
        for row in rows
        if row.get("flop") and row.get("bytes") and row["provider"].startswith("clvp_fast")
    ]


def mark(drawing: dict) -> str:
    """The line that a figure ends with: of what it shows, and of how."""
    content = json.dumps(drawing, sort_keys=True) + Path(__file__).read_text(encoding="utf-8")
    return f"<!-- drawn from {hashlib.sha256(content.encode()).hexdigest()[:16]} -->"


def is_current(path: Path, drawing: dict) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8").endswith(mark(drawing) + "\n")


def draw_all(rows: list[dict], folder: Path = FIGURES) -> None:
    """Draw what is not current, and remove what no row is shown in any more."""
    wanted = drawings(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.svg"):
        if path.name not in wanted:
            path.unlink()
    for name, drawing in wanted.items():
        if not is_current(folder / name, drawing):
            _draw(drawing, folder / name)


def lines_of(rows: list[dict]) -> dict[str, str]:
    """By device, the lines of Markdown that show its figures."""
    titles = {"roofline": "Operators against the roofline", "decode_step": "A decode step over the batch"}
    found = defaultdict(list)
    for name, drawing in drawings(rows).items():
        found[drawing["device"]].append(f"![{titles[drawing['kind']]}](benchmarks/{name})")
    return {device: "\n\n".join(lines) for device, lines in found.items()}


def _draw(drawing: dict, path: Path) -> None:
    import matplotlib

    settings = {"svg.hashsalt": "clvp_fast", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}
    with matplotlib.rc_context(settings | {"grid.alpha": 0.3}):
        figure = _roofline_figure(drawing) if drawing["kind"] == "roofline" else _decode_step_figure(drawing)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    with path.open("a", encoding="utf-8") as file:
        file.write(mark(drawing) + "\n")


def _figure(columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.8), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _roofline_figure(drawing: dict):
    figure, (axes,) = _figure(1)
    by_workload = defaultdict(list)
    for workload, intensity, rate in drawing["points"]:
        by_workload[workload].append((intensity, rate))
    for number, (workload, points) in enumerate(by_workload.items()):
        axes.plot(*zip(*points, strict=True), _STYLES[number % len(_STYLES)][0], label=workload)
    reach = [intensity for _, intensity, _ in drawing["points"]]
    left, right = min(reach) / 3, max(reach) * 3
    for dtype, peak in drawing["flop"].items():
        corner = min(max(peak / drawing["bytes"], left), right)
        axes.plot(
            [left, corner, right], [left * drawing["bytes"], min(corner * drawing["bytes"], peak), peak], "k-", lw=1
        )
        axes.annotate(f"{dtype} product", (right, peak), ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte that must move", ylabel="operations a second")
    axes.set_title(f"{drawing['device']}: ours against copy and product of the same run")
    axes.legend(fontsize=7)
    return figure


def _decode_step_figure(drawing: dict):
    figure, (times, rates) = _figure(2)
    for number, (provider, points) in enumerate(drawing["lines"].items()):
        candidates, seconds = zip(*points, strict=True)
        style = _STYLES[number % len(_STYLES)]
        times.plot(candidates, [1000 * one for one in seconds], style, ms=4, label=provider)
        rates.plot(candidates, [count / one for count, one in zip(candidates, seconds, strict=True)], style, ms=4)
    times.set(xscale="log", yscale="log", xlabel="candidates", ylabel="milliseconds a step")
    rates.set(xscale="log", yscale="log", xlabel="candidates", ylabel="tokens a second")
    counts = sorted({count for points in drawing["lines"].values() for count, _ in points})
    for axes in (times, rates):
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    figure.suptitle(f"{drawing['device']}: one decode step, 250 tokens stored")
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    return figure
