"""`python -m benchmarks.report`: writes all that is measured into the documents, from the newest rows of
benchmarks/results/: the front page (README.md), docs/figures.md, the table of the precision tiers in
docs/architecture.md, docs/benchmarks.md, docs/scaling.md, and the pictures.
"""

from collections.abc import Callable

from benchmarks import ahead_document, document, front_page, plots, scaling_document
from benchmarks.harness import ROOT, newest_rows
from benchmarks.machine import by_machine, is_forced, label

README = ROOT / "README.md"
FIGURES = ROOT / "docs/figures.md"
ARCHITECTURE = ROOT / "docs/architecture.md"
BENCHMARKS = ROOT / "docs/benchmarks.md"
SCALING = ROOT / "docs/scaling.md"
# The workloads of docs/figures.md, and how a reader would call each.
SHOWN = {
    "generate": "generate {candidates} candidates of {new_tokens} tokens, whole call",
    "end_to_end": "text and clip to the best of preset {preset}, {new_tokens} tokens a candidate",
    "score": "embed {candidates} candidates of {length} tokens",
    "log_mel": "log-mel of {clips} clips of {seconds} s{on_threads}",
    "import_time": "import",
}
# Of a workload with several shapes, those that are shown.
SHAPES = {
    "log_mel": lambda shape: (shape["clips"], shape["n_fft"]) == (64, 1024),
    "score": lambda shape: "padded_to" not in shape,
}


def table(rows: list[dict]) -> str:
    """Write the tables of docs/figures.md, one for each device; docs/benchmarks.md has machines below their best."""
    shown = by_machine([row for row in rows if row["workload"] in SHOWN and row["seconds"] and _is_shown(row)])
    if not shown:
        return "Not measured yet."
    parts = [_device_table(of_machine) for of_machine in shown.values()]
    if not any("NVIDIA" in name for name in shown):
        parts.append("GPU: not measured yet.")
    return "\n\n".join(parts)


def _is_shown(row: dict) -> bool:
    return not is_forced(row["device"]) and SHAPES.get(row["workload"], lambda shape: True)(row["shape"])


def _device_table(rows: list[dict]) -> str:
    lines = ["| what | provider | median | speed | error | peak memory |", "|---|---|---|---|---|---|"]
    for workload, title in SHOWN.items():
        lines += [
            f"| {_titled(title, row['shape'])} | {row['provider']} | {_seconds(row['seconds']['median'])} | "
            f"{document.speed(row)} | {row['error']:.1e} | {_memory(row['peak_extra_bytes'])} |"
            for row in rows
            if row["workload"] == workload
        ]
    return "\n".join([*lines, "", _context(rows)])


def _titled(title: str, shape: dict) -> str:
    """Write the `title` of a shape, with the number of threads on a CPU."""
    return title.format(on_threads=f", threads: {shape['threads']}" if "threads" in shape else "", **shape)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.5 else f"{seconds * 1000:.1f} ms"


def _memory(extra_bytes: int | None) -> str:
    return "not measured" if extra_bytes is None else f"+{extra_bytes / 2**20:.0f} MiB"


def _context(rows: list[dict]) -> str:
    measured = {}  # the workloads of each circumstances
    for row in rows:
        device, versions = row["device"], row["versions"]
        where = (
            f"on {label(device)}, {device['threads']} threads, torch {versions['torch']}, "
            f"transformers {versions['transformers']}, at commit {row['commit']}"
        )
        measured.setdefault(where, {})[row["workload"]] = None
    wheres = [where if len(measured) == 1 else f"{', '.join(names)} {where}" for where, names in measured.items()]
    return (
        f"Measured with `clvp-fast bench`: {'; '.join(wheres)}; models have random weights of the full size (665 "
        "million parameters). Speed is against the first row of each kind; error is relative, against transformers in "
        "float32, and of log-mel the largest difference from float64; memory is what a first call adds to the process."
    )


def precision_table(rows: list[dict]) -> str:
    """Write a table for each machine: a tier's changes, the share of equal tokens with its error, a step's time."""
    measured = by_machine([row for row in rows if row["workload"] == "precision" and row["seconds"]])
    return "\n\n".join(map(_precision, measured.values())) or "Not measured yet."


def _precision(rows: list[dict]) -> str:
    lines = [
        "| tier | logits off by | of that arithmetic | KL, nats a token | same greedy token | a step |",
        "|---|---|---|---|---|---|",
    ]
    shape, device = rows[0]["shape"], rows[0]["device"]
    for row in rows:
        share = row["greedy"]
        deviation = (share * (1 - share) / (shape["candidates"] * shape["steps"])) ** 0.5
        lines.append(
            f"| {row['provider']} | {row['logits_error']:.2g} | {row['error']:.2g} | {row['kl']:.1e} | "
            f"{share:.1%} ± {100 * deviation:.1f} | {_seconds(row['seconds']['median'])} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{shape['candidates']} candidates, {shape['steps']} steps behind a prompt of {shape['prompt']}, "
            f"{shape['layers']} layers of {shape['width']} channels, on {label(device)}, threads: "
            f"{device['threads']}, torch {rows[0]['versions']['torch']}, at commit {rows[0]['commit']}.",
        ]
    )


def updated(text: str, rows: list[dict], make: Callable[[list[dict]], str] = table, part: str = "measured") -> str:
    """Return `text` with the section between the marks of `part` made from `rows` by `make`."""
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{make(rows)}\n{end}{after}"


def benchmarks(rows: list[dict]) -> str:
    return document.measured(rows, plots.lines_of(rows))


def scaling(rows: list[dict]) -> str:
    return scaling_document.document(rows, plots.lines_of(rows, "scaling"))


# A document, what makes a part of it from rows, and the part's name in its marks.
DOCUMENTS = (
    (README, front_page.gain, "gain"),
    (README, front_page.table, "measured"),
    (FIGURES, table, "measured"),
    (ARCHITECTURE, precision_table, "measured"),
    (BENCHMARKS, ahead_document.table, "ahead"),
    (BENCHMARKS, benchmarks, "measured"),
    (SCALING, scaling, "measured"),
)

if __name__ == "__main__":
    newest = newest_rows()
    plots.draw_all(newest)
    front_page.draw(newest)
    for path, make, part in DOCUMENTS:
        path.write_text(updated(path.read_text(encoding="utf-8"), newest, make, part), encoding="utf-8")
