"""The figures of docs/benchmarks.md and docs/scaling.md, drawn from the newest rows.

A figure carries a mark of what it was drawn from, and is drawn again only if that changes: other versions of
matplotlib write the same picture in other bytes.
"""

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

from benchmarks.machine import bandwidth, by_machine
from benchmarks.providers import bits, group_of
from benchmarks.scaling_model import SWEEPS, sweeps

FIGURES = Path(__file__).parent.parent / "docs/benchmarks"
# One colour a provider; of those of one name, tiers in order.
_STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:")
_TITLES = {
    "roofline": "Operators against the roofline",
    "decode_step": "A decode step over the batch",
    "scaling": "A call over candidates, text, clips and requests",
}


def drawings(rows: list[dict]) -> dict[str, dict]:
    """Return the content of each figure by file name: `kind`, `device` (a machine's label), and its lines or points."""
    found = {}
    for device, of_machine in by_machine(rows).items():
        timed = [row for row in of_machine if row["seconds"]]
        stem = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        points = _roofline(timed)
        if points:
            found[f"{stem}-roofline.svg"] = {"kind": "roofline", "device": device, "points": points} | _roofs(timed)
        lines = defaultdict(list)
        for row in sorted(timed, key=lambda row: row["shape"].get("candidates", 0)):
            if row["workload"] == "decode_step":
                lines[row["provider"]].append((row["shape"]["candidates"], row["seconds"]["median"]))
        if lines:
            found[f"{stem}-decode-step.svg"] = {"kind": "decode_step", "device": device, "lines": dict(lines)}
        panels = _panels(timed)
        if panels:
            found[f"{stem}-scaling.svg"] = {"kind": "scaling", "device": device, "panels": panels}
    return found


def _counted(rows: list[dict]) -> list[dict]:
    """Return our rows whose operations and bytes are known."""
    return [row for row in rows if row.get("flop") and row.get("bytes") and row["provider"].startswith("clvp_fast")]


def _roofline(rows: list[dict]) -> list[list]:
    """Return, for our rows, workload and type, operations a byte, operations a second."""
    return [
        [f"{row['workload']} {row['dtype']}", row["flop"] / row["bytes"], row["flop"] / row["seconds"]["median"]]
        for row in _counted(rows)
    ]


def _roofs(rows: list[dict]) -> dict:
    """Return each run's bandwidth, and for each type the rate of its product in those runs."""
    roofs = {}
    for row in _counted(rows):
        device = row["device"]
        roof = [bandwidth(device), device["matmul_flop_per_s"][row["dtype"]]]
        roofs.setdefault(row["dtype"], []).append(roof)
    return {"roofs": {dtype: [list(roof) for roof in sorted(set(map(tuple, found)))] for dtype, found in roofs.items()}}


def _panels(rows: list[dict]) -> dict[str, dict[str, list]]:
    """Return, by varied value and provider, values, the seconds' quantiles, tokens a second; at least two points."""
    found = {}
    for name, points in sweeps(row for row in rows if row["workload"] == "scaling").items():
        lines = defaultdict(list)
        for row in points:
            spread = row["seconds"]
            quantiles = [spread[one] for one in ("q20", "median", "q80")]
            lines[row["provider"]].append([row["shape"][name], *quantiles, row["tokens"] / spread["median"]])
        found[name] = {provider: line for provider, line in lines.items() if len(line) > 1}
    return found if any(found.values()) else {}


def mark(drawing: dict) -> str:
    """Return the last line of a figure, which changes with its content and its style."""
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


def lines_of(rows: list[dict], kind: str | None = None) -> dict[str, str]:
    """Return by a machine's label the lines of Markdown that show its figures, or the figure of one kind."""
    found = defaultdict(list)
    for name, drawing in drawings(rows).items():
        if kind in (None, drawing["kind"]):
            found[drawing["device"]].append(f"![{_TITLES[drawing['kind']]}](benchmarks/{name})")
    return {device: "\n\n".join(lines) for device, lines in found.items()}


def _draw(drawing: dict, path: Path) -> None:
    import matplotlib

    settings = {"svg.hashsalt": "clvp_fast", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}
    with matplotlib.rc_context(settings | {"grid.alpha": 0.3}):
        draw = {"roofline": _roofline_figure, "decode_step": _decode_step_figure, "scaling": _scaling_figure}
        figure = draw[drawing["kind"]](drawing)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    with path.open("a", encoding="utf-8") as file:
        file.write(mark(drawing) + "\n")


def _figure(columns: int, rows: int = 1):
    """Make a figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns if rows == 1 else 3.6 * columns, 3.8 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _roofline_figure(drawing: dict):
    figure, (axes,) = _figure(1)
    by_label = defaultdict(list)
    for label, intensity, rate in drawing["points"]:
        by_label[label].append((intensity, rate))
    reach = [intensity for _, intensity, _ in drawing["points"]]
    left, right = min(reach) / 3, max(reach) * 3
    for number, (dtype, roofs) in enumerate(drawing["roofs"].items()):
        for slope, peak in roofs:
            corner = min(max(peak / slope, left), right)
            heights = [min(reached * slope, peak) for reached in (left, corner, right)]
            axes.plot([left, corner, right], heights, f"C{number}", lw=1, alpha=0.6)
        highest = max(min(right * slope, peak) for slope, peak in roofs)
        axes.annotate(f"{dtype} product", (right, highest), ha="right", va="bottom", color=f"C{number}")
    dtypes = list(drawing["roofs"])
    for number, (label, points) in enumerate(by_label.items()):
        colour, marker = dtypes.index(label.split()[-1]), _STYLES[number % len(_STYLES)][0]
        axes.plot(*zip(*points, strict=True), marker, color=f"C{colour}", ms=4, alpha=0.8, label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte that must move", ylabel="operations a second")
    axes.set_title(f"{drawing['device']}: ours against copy and product of the same runs", fontsize=9)
    axes.legend(fontsize=7)
    return figure


def _scaling_figure(drawing: dict):
    """Draw seconds of a call over the varied value, and tokens a second over candidates and over requests."""
    figure, panels = _figure(3, 2)
    shown = [(name, False) for name in SWEEPS] + [("candidates", True), ("requests", True)]
    for axes, (name, is_rate) in zip(panels, shown, strict=True):
        axes.set(xlabel=SWEEPS[name], ylabel="tokens a second" if is_rate else "seconds a call")
        lines = drawing["panels"][name]
        if not lines:
            axes.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center")
            continue
        for number, (provider, points) in enumerate(lines.items()):
            values, low, median, high, rates = zip(*points, strict=True)
            style = _STYLES[number % len(_STYLES)]
            axes.plot(values, rates if is_rate else median, style, ms=4, label=provider)
            if not is_rate:
                axes.fill_between(values, low, high, alpha=0.3)
        if name in ("candidates", "requests"):
            axes.set(xscale="log", yscale="linear" if is_rate else "log")
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(values, [str(value) for value in values])
        axes.xaxis.minorticks_off()
    figure.suptitle(f"{drawing['device']}: a call of the engine")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=7)
    return figure


def _decode_step_figure(drawing: dict):
    """Draw tokens a second over candidates, ours with thick lines, in one panel for each number of bits of weights."""
    panels = defaultdict(dict)
    for provider, points in drawing["lines"].items():
        panels[bits(provider)][provider] = [(count, count / seconds) for count, seconds in points]
    figure, all_axes = _figure(len(panels))
    every = [rate for lines in panels.values() for points in lines.values() for _, rate in points]
    for axes, (width, lines) in zip(all_axes, sorted(panels.items(), reverse=True), strict=True):
        for number, (provider, points) in enumerate(lines.items()):
            thickness = 2.5 if group_of(provider) == "ours" else 1
            axes.plot(*zip(*points, strict=True), _STYLES[number % len(_STYLES)], ms=4, lw=thickness, label=provider)
        axes.set(xscale="log", yscale="log", xlabel="candidates", ylabel="tokens a second")
        axes.set(title=f"weights of {width} bits", ylim=(min(every) / 1.2, max(every) * 1.2))
        counts = sorted({count for points in lines.values() for count, _ in points})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(fontsize=6)
    figure.suptitle(f"{drawing['device']}: one decode step, 250 tokens stored")
    return figure
