"""`python -m benchmarks.report`: writes the measured tables from the newest rows of benchmarks/results/.

They stand in README.md and, of the precision tiers, in docs/architecture.md.
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import RESULTS, stored_rows, task_key

README = RESULTS.parent.parent / "README.md"
ARCHITECTURE = RESULTS.parent.parent / "docs/architecture.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
# What README shows: workload, and how a reader would call it.
SHOWN = {
    "generate": "generate {candidates} candidates of {new_tokens} tokens, whole call",
    "score": "embed {candidates} candidates of {length} tokens",
    "log_mel": "log-mel of {clips} clips of {seconds} s, threads: {threads}",
    "import_time": "import",
}
# Of a workload with several shapes, those that are shown.
SHAPES = {"log_mel": {"clips": 64, "n_fft": 1024}}


def newest_rows(folder: Path = RESULTS) -> list[dict]:
    """Of each device and task the rows of its last run, in the order of the files."""
    newest: dict[tuple, dict[str, dict]] = {}
    for path in sorted(folder.glob("*/*.jsonl")):
        for row in stored_rows(path):
            of_task = newest.setdefault((path.parent.name, *task_key(row)), {})
            if any(other["utc"] != row["utc"] for other in of_task.values()):
                of_task.clear()
            of_task[row["provider"]] = row
    return [row for of_task in newest.values() for row in of_task.values()]


def table(rows: list[dict]) -> str:
    lines = []
    for workload, title in SHOWN.items():
        lines += [
            f"| {title.format(**row['shape'])} | {row['provider']} | {_seconds(row['seconds']['median'])} | "
            f"{row['ratio']:.2f}x | {row['error']:.1e} | {_memory(row['peak_extra_bytes'])} |"
            for row in rows
            if row["workload"] == workload and row["seconds"]
            if SHAPES.get(workload, {}).items() <= row["shape"].items()
        ]
    if not lines:
        return "Not measured yet."
    head = ["| what | provider | median | speed | error | peak memory |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *lines, "", _context([row for row in rows if row["workload"] in SHOWN])])


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.5 else f"{seconds * 1000:.1f} ms"


def _memory(extra_bytes: int | None) -> str:
    return "not measured" if extra_bytes is None else f"+{extra_bytes / 2**20:.0f} MiB"


def _context(rows: list[dict]) -> str:
    measured = {}  # the workloads of each circumstances
    for row in rows:
        device, versions = row["device"], row["versions"]
        where = (
            f"on {device['name']}, {device['threads']} threads, torch {versions['torch']}, "
            f"transformers {versions['transformers']}, at commit {row['commit']}"
        )
        measured.setdefault(where, {})[row["workload"]] = None
    wheres = [where if len(measured) == 1 else f"{', '.join(names)} {where}" for where, names in measured.items()]
    return (
        f"Measured by `make bench-cpu` {'; '.join(wheres)}; models have random weights of the full size (665 million "
        "parameters). Speed is against the first row of each kind; error is relative, against transformers in float32, "
        "and of log-mel the largest difference from float64; memory is what a first call adds to the process. GPU: not "
        "measured yet."
    )


def precision_table(rows: list[dict]) -> str:
    """What each precision tier changes, the share of equal tokens with its standard error, and the time of a step."""
    rows = [row for row in rows if row["workload"] == "precision" and row["seconds"]]
    if not rows:
        return "Not measured yet."
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
            f"{shape['layers']} layers of {shape['width']} channels, on {device['name']}, threads: "
            f"{device['threads']}, torch {rows[0]['versions']['torch']}, at commit {rows[0]['commit']}.",
        ]
    )


def updated(document: str, rows: list[dict], make: Callable[[list[dict]], str] = table) -> str:
    """`document` with what stands between the marks made from `rows` by `make`."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{make(rows)}\n{END}{after}"


DOCUMENTS = ((README, table), (ARCHITECTURE, precision_table))

if __name__ == "__main__":
    for path, make in DOCUMENTS:
        path.write_text(updated(path.read_text(encoding="utf-8"), newest_rows(), make), encoding="utf-8")
