"""The predictions of docs/kernels.md, made from the rows of `predicted.jsonl`; measured rows stand beside them."""

import json
from pathlib import Path

from benchmarks.cost.devices import H200
from benchmarks.document import seconds
from benchmarks.harness import ROOT, newest_rows
from clvp_fast.engine.memory import human_bytes

ROWS = Path(__file__).parent / "predicted.jsonl"
DOCUMENT = ROOT / "docs/kernels.md"
BEGIN, END = "<!-- predicted -->", "<!-- end -->"
#: The providers of a step's rows, not deterministic and deterministic, and of a kernel's.
STEPS, KERNEL = ("clvp_fast bfloat16, captured", "clvp_fast bfloat16, deterministic, captured"), "clvp_fast kernel"
# The steps whose launches are listed.
_LISTED = ((1, False), (256, False), (256, True))


def _lines(titles: list[str], cells: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in cells)]


def measured(row: dict, rows: list[dict]) -> dict | None:
    """Return the newest row in bfloat16 of what a prediction is of, on the same chip, or None."""
    provider = STEPS[row["deterministic"]] if row["workload"] == "decode_step" else KERNEL
    for found in rows:
        same = found["workload"] == row["workload"] and found["provider"] == provider and found["seconds"]
        if not same or row["chip"] not in found["device"]["name"]:
            continue
        if all(found["shape"].get(name) == value for name, value in row["shape"].items()):
            return found
    return None


def _beside(row: dict, rows: list[dict]) -> list[str]:
    found = measured(row, rows)
    if found is None:
        return [seconds(row["seconds"]), "no row", "", ""]
    took = found["seconds"]["median"]
    return [seconds(row["seconds"]), seconds(took), f"{took / row['seconds']:.2f}", found["commit"]]


def _counted(row: dict) -> list[str]:
    issued = human_bytes(row["issued"]).removesuffix("B").strip() if row["issued"] else "unknown"
    return [human_bytes(row["bytes"]), human_bytes(row["cache_bytes"]), issued]


_COUNTED = ["memory", "L2 cache", "instructions"]
_BESIDE = ["predicted", "measured", "measured / predicted", "measured at"]


def steps(rows: list[dict], found: list[dict]) -> list[str]:
    """Write a line for each step."""
    cells = []
    for row in rows:
        setting = "yes" if row["deterministic"] else "no"
        cells.append([str(row["shape"]["candidates"]), setting, str(row["launches"]), *_counted(row)])
        cells[-1] += _beside(row, found)
    return _lines(["candidates", "deterministic", "launches", *_COUNTED, *_BESIDE], cells)


def calls(rows: list[dict], found: list[dict]) -> list[str]:
    """Write a line for each call of a kernel."""
    cells = []
    for row in rows:
        shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
        cells.append([f"{row['workload']}, {shape}", str(row["launches"]), *_counted(row), *_beside(row, found)])
    return _lines(["call", "launches", *_COUNTED, *_BESIDE], cells)


def launches(row: dict) -> list[str]:
    """Write a line for each kind of launch of a step; numbers are of one launch."""
    cells = []
    for kind in row["kinds"]:
        name = f"`{kind['kernel']}`" + (f" {kind['what']}" if kind["what"] else "")
        programs, waits = str(kind["programs"] or "unknown"), " + ".join(map(str, kind["waits"]))
        cells.append([name, str(kind["number"]), programs, *_counted(kind), waits])
        cells[-1] += [f"{kind['seconds'] * 1e6:.2f} µs", kind["bound"]]
    return _lines(["launch", "number", "programs", *_COUNTED, "waits", "predicted", "bound by"], cells)


def section(rows: list[dict]) -> str:
    """Write the tables of these rows."""
    found = newest_rows()
    of_steps = [row for row in rows if row["workload"] == "decode_step"]
    parts = [*steps(of_steps, found)]
    if others := [row for row in rows if row not in of_steps]:
        parts += ["", *calls(others, found)]
    for candidates, deterministic in _LISTED:
        for row in of_steps:
            if (row["shape"]["candidates"], row["deterministic"]) == (candidates, deterministic):
                setting = "" if deterministic else "not "
                parts += ["", f"The launches of a step of {candidates}, {setting}deterministic, each by itself:", ""]
                parts += launches(row)
    parts += ["", f"Compiled by triton {rows[0]['triton']}; constants of an {H200.name}, {rows[0]['constants']}."]
    return "\n".join(parts)


def read() -> list[dict]:
    """Return the rows that were written."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def with_tables(document: str) -> str:
    """Fill the `<!-- predicted -->` … `<!-- end -->` of `document`."""
    before, rest = document.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{section(read())}\n{END}{rest.split(END, 1)[1]}"


def write(rows: list[dict]) -> None:
    """Write the rows, and the document's tables from them."""
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
