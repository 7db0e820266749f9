"""The tables of docs/kernels.md, made from the rows of benchmarks/aot/compiled/."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "compiled"
DOCUMENT = ROOT / "docs/kernels.md"
BEGIN, END = "<!-- compiled: {} -->", "<!-- end -->"


def _cell(row: dict) -> str:
    matrix = "" if row["matrix_instruction"] == "none" else f", {row['matrix_instruction']}"
    spilled = f", {row['spilled_bytes']} B spilled" if row["spilled_bytes"] else ""
    return f"{row['registers']} r, {row['shared_bytes'] / 1024:.0f} KB{matrix}{spilled}"


def table(family: str) -> str:
    """One line a compiled kernel: registers a thread and shared memory of a program on each architecture."""
    rows = [json.loads(line) for line in (RESULTS / f"{family}.jsonl").read_text().splitlines()]
    architectures = sorted({row["arch"] for row in rows})
    lines = [
        "| call | kernel | warps | " + " | ".join(f"sm_{arch}" for arch in architectures) + " |",
        "|---" * (3 + len(architectures)) + "|",
    ]
    launches: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        launches.setdefault((row["call"], row["launch"], row["kernel"]), {})[row["arch"]] = row
    for (call, _, kernel), found in launches.items():
        warps = "/".join(dict.fromkeys(str(found[arch]["num_warps"]) for arch in architectures if arch in found))
        cells = [_cell(found[arch]) if arch in found else "–" for arch in architectures]
        lines.append(f"| {call} | `{kernel}` | {warps} | " + " | ".join(cells) + " |")
    lines.append(f"\nCompiled by triton {rows[0]['triton']}; r: registers a thread, KB: shared memory of a program.")
    return "\n".join(lines)


def with_tables(document: str) -> str:
    """`document` with each `<!-- compiled: family -->` … `<!-- end -->` filled from that family's rows."""
    parts = document.split(BEGIN.split("{}")[0])
    for place, part in enumerate(parts[1:], 1):
        family, rest = part.split(" -->", 1)
        parts[place] = f"{family} -->\n{table(family)}\n{END}" + rest.split(END, 1)[1]
    return BEGIN.split("{}")[0].join(parts)


def write_tables() -> None:
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
