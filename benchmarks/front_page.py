"""The generated parts of README.md: the gain in a line, a table of three rows, and one picture.

All come from the rows of whole calls in float32 and bfloat16 on the CPU with the newest row of `generate` that was not
held down.
"""

import hashlib
import json
import textwrap
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.machine import by_machine, is_forced

PICTURE = ROOT / "docs/pictures/gain.svg"
THEIRS = "transformers float32"
# By workload: title, and our providers in float32 and bfloat16.
WHOLE_CALLS = {
    "generate": (
        "generate {candidates} candidates of {new_tokens} tokens",
        ("clvp_fast engine, float32", "clvp_fast engine, bfloat16"),
    ),
    "end_to_end": (
        "text and clip to the best of preset {preset}, {new_tokens} tokens each",
        ("clvp_fast engine, float32", "clvp_fast engine, bfloat16"),
    ),
    "score": ("embed {candidates} candidates of {length} tokens", ("clvp_fast float32", "clvp_fast bfloat16")),
}
# Longest line of README.
_WIDTH = 118


def calls(rows: list[dict]) -> tuple[str, list[dict]]:
    """Return the name of a CPU and its whole calls: `title`, `row` (one of them), seconds by provider's place.

    The place is 0 for transformers, 1 for ours in float32, 2 for ours in bfloat16. Empty without a row of `generate`.
    """
    timed = [row for row in rows if row["seconds"] and row["workload"] in WHOLE_CALLS and not is_forced(row["device"])]
    machines = by_machine([row for row in timed if "NVIDIA" not in row["device"]["name"]])
    all_found = {name: [_call(workload, rows) for workload in WHOLE_CALLS] for name, rows in machines.items()}
    ages = {name: found[0]["row"]["utc"] for name, found in all_found.items() if found[0]}
    if not ages:
        return "", []
    newest = max(ages, key=lambda name: ages[name])
    return newest, [call for call in all_found[newest] if call]


def _call(workload: str, rows: list[dict]) -> dict | None:
    """Return the first shape of a workload with times of transformers and of ours."""
    title, ours = WHOLE_CALLS[workload]
    of_workload = [row for row in rows if row["workload"] == workload and "padded_to" not in row["shape"]]
    for first in of_workload:
        times = {row["provider"]: row["seconds"]["median"] for row in of_workload if row["shape"] == first["shape"]}
        if {THEIRS, ours[0]} <= times.keys():
            seconds = [times.get(provider) for provider in (THEIRS, *ours)]
            return {"title": title.format(**first["shape"]), "row": first, "seconds": seconds}
    return None


def gain(rows: list[dict]) -> str:
    """Write how many times faster a whole call is than transformers', and under which condition."""
    machine, found = calls(rows)
    if not found:
        return "Not measured yet."
    theirs, ours, _ = found[0]["seconds"]
    row = found[0]["row"]
    on_gpu = any("NVIDIA" in one["device"]["name"] and one["workload"] == "generate" and one["seconds"] for one in rows)
    elsewhere = "docs/benchmarks.md has rows of a GPU" if on_gpu else "whole calls are unmeasured on a GPU"
    text = (
        f"**{theirs / ours:.1f} times as fast as transformers** to {found[0]['title']} in float32: {ours:.2f} s "
        f"instead of {theirs:.2f} s, on {row['device']['threads']} threads of {machine}, commit "
        f"{row['commit']}; {elsewhere}."
    )
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def table(rows: list[dict]) -> str:
    """Write a row for each whole call: seconds, and how many times faster than transformers."""
    _, found = calls(rows)
    if not found:
        return "Not measured yet."
    lines = ["| a whole call | transformers | clvp_fast, float32 | clvp_fast, bfloat16 |", "|---|---|---|---|"]
    for call in found:
        theirs, *ours = call["seconds"]
        cells = ["not measured" if one is None else f"{one:.2f} s ({theirs / one:.1f}x)" for one in ours]
        lines.append(f"| {call['title']} | {theirs:.2f} s | {' | '.join(cells)} |")
    return "\n".join(lines)


def drawing(rows: list[dict]) -> dict:
    """Return the content of the picture: its title and, for each whole call, its title and seconds."""
    machine, found = calls(rows)
    if not found:
        return {}
    commits = ", ".join(dict.fromkeys(call["row"]["commit"] for call in found))
    title = f"{machine}, {found[0]['row']['device']['threads']} threads, commit {commits}"
    return {"title": title, "calls": [[call["title"], call["seconds"]] for call in found]}


def mark(content: dict) -> str:
    """Return the last line of the picture, which changes with its content and its style."""
    text = json.dumps(content, sort_keys=True) + Path(__file__).read_text(encoding="utf-8")
    return f"<!-- drawn from {hashlib.sha256(text.encode()).hexdigest()[:16]} -->"


def is_current(content: dict, path: Path = PICTURE) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8").endswith(mark(content) + "\n")


def draw(rows: list[dict], path: Path = PICTURE) -> None:
    """Draw the picture, unless it shows these rows already."""
    content = drawing(rows)
    if not content or is_current(content, path):
        return
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": "clvp_fast", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.2, 2.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        names = ("transformers, float32", "clvp_fast, float32", "clvp_fast, bfloat16")
        colours = ("#9aa0a6", "#3f51b5", "#00897b")
        for number, (_, seconds) in enumerate(content["calls"]):
            for place, value in enumerate(seconds):
                if value is None:
                    continue
                y = number + 0.27 * (place - 1)
                axes.barh(y, value, 0.25, color=colours[place], label=names[place] if number == 0 else None)
                gained = f"  ({seconds[0] / value:.1f}x)" if place else ""
                axes.annotate(f" {value:.1f} s{gained}", (value, y), va="center", fontsize=8)
        axes.set_yticks(range(len(content["calls"])), [textwrap.fill(title, 26) for title, _ in content["calls"]])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlabel="seconds of a whole call, less is better")
        axes.set_xlim(right=1.15 * max(value for _, seconds in content["calls"] for value in seconds if value))
        axes.set_title(content["title"], fontsize=8)
        axes.legend(fontsize=8, loc="lower right", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    with path.open("a", encoding="utf-8") as file:
        file.write(mark(content) + "\n")
