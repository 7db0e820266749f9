"""`python -m benchmarks.report`: writes the measured table of README.md from the newest rows of benchmarks/results/."""

import json
from pathlib import Path

from benchmarks.harness import RESULTS

README = RESULTS.parent.parent / "README.md"
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
    """The last row of each device, workload, shape and provider, in the order of the files."""
    newest = {}
    for path in sorted(folder.glob("*/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            newest[(path.parent.name, row["workload"], json.dumps(row["shape"]), row["provider"])] = row
    return list(newest.values())


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


def updated(readme: str, rows: list[dict]) -> str:
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8"), newest_rows()), encoding="utf-8")
