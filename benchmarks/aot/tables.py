"""The tables of docs/kernels.md, made from the rows of benchmarks/aot/compiled/."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "compiled"
DOCUMENT = ROOT / "docs/kernels.md"
BEGIN, END = "<!-- compiled: {} -->", "<!-- end -->"


def _cell(row: dict) -> str:
    spilled = f", {row['spilled_bytes']} B spilled" if row["spilled_bytes"] else ""
    if "call" not in row:
        return f"{row['registers']} r{spilled}"
    matrix = "" if row["matrix_instruction"] == "none" else f", {row['matrix_instruction']}"
    return f"{row['registers']} r, {row['shared_bytes'] / 1024:.0f} KB{matrix}{spilled}"


def table(family: str) -> str:
    """Write one line for a compiled kernel: registers a thread on each architecture, and shared memory of a program.

    nvcc's rows have no call that a launcher made, and no shared memory, which is asked for at the launch.
    """
    rows = [json.loads(line) for line in (RESULTS / f"{family}.jsonl").read_text().splitlines()]
    architectures = sorted({row["arch"] for row in rows})
    called = "call" in rows[0]
    titles = [*(["call"] * called), "kernel", *(["warps"] * called), *(f"sm_{arch}" for arch in architectures)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    launches: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        launches.setdefault((row.get("call"), row.get("launch"), row["kernel"]), {})[row["arch"]] = row
    for (call, _, kernel), found in launches.items():
        cells = [_cell(found[arch]) if arch in found else "–" for arch in architectures]
        named = [f"`{kernel}`"]
        if called:
            warps = "/".join(dict.fromkeys(str(found[arch]["num_warps"]) for arch in architectures if arch in found))
            named = [call, *named, warps]
        lines.append("| " + " | ".join([*named, *cells]) + " |")
    if called:
        lines.append(
            f"\nCompiled by triton {rows[0]['triton']}; r: registers a thread, KB: shared memory of a program."
        )
    else:
        lines.append(f"\nCompiled by nvcc {rows[0]['nvcc']}; r: registers a thread.")
    return "\n".join(lines)


def with_tables(document: str) -> str:
    """Fill each `<!-- compiled: family -->` … `<!-- end -->` of `document` from that family's rows."""
    parts = document.split(BEGIN.split("{}")[0])
    for place, part in enumerate(parts[1:], 1):
        family, rest = part.split(" -->", 1)
        parts[place] = f"{family} -->\n{table(family)}\n{END}" + rest.split(END, 1)[1]
    return BEGIN.split("{}")[0].join(parts)


def write_tables() -> None:
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
