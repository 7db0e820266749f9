"""The measured part of docs/benchmarks.md: a section for each machine and instruction set, in it a table a workload.

All from the newest rows.
"""

from benchmarks.machine import bandwidth, by_machine
from benchmarks.run import WORKLOADS


def seconds(value: float) -> str:
    """Write a time in a unit that leaves about three digits."""
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if value >= 0.5 * size:
            return f"{value / size:.2f} {unit}" if value < 10 * size else f"{value / size:.1f} {unit}"
    return f"{value * 1e6:.1f} µs"


def speed(row: dict) -> str:
    """Write by how much this is faster than the provider it is compared with; "" where that has no time."""
    return "" if row["ratio"] is None else f"{row['ratio']:.2f}x"


def thousands(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 10 else f"{value:.1f}"


def _beyond(row: dict) -> str:
    return f"{(row['peak_bytes'] - row['weights_bytes'] - row['kv_bytes']) / 2**20:.0f} MiB"


def _more_word_errors(row: dict) -> str:
    return f"{row['more_word_errors']:+.3f} ± {row['more_word_errors_error']:.3f}"


# Columns that appear if a row has their key: title, key, and formatter.
_MORE = (
    ("tokens/s", "tokens", lambda row: thousands(row["tokens"] / row["seconds"]["median"])),
    ("memory beyond weights, keys and values", "peak_bytes", _beyond),
    ("memory of its process", "process_bytes", lambda row: f"{row['process_bytes'] / 2**20:.0f} MiB"),
    ("where the time goes", "parts", lambda row: ", ".join(f"{n} {seconds(part)}" for n, part in row["parts"].items())),
    ("logits off by", "logits_error", lambda row: f"{row['logits_error']:.1e}"),
    ("KL, nats a token", "kl", lambda row: f"{row['kl']:.1e}"),
    ("same greedy token", "greedy", lambda row: f"{row['greedy']:.1%}"),
    ("ranks correlate by", "rank_correlation", lambda row: f"{row['rank_correlation']:.3f}"),
    ("same best candidate", "same_best", lambda row: f"{row['same_best']:.0%}"),
    ("word errors", "word_errors", lambda row: f"{row['word_errors']:.3f}"),
    ("more than the first", "more_word_errors", _more_word_errors),
    ("of the best-scored", "picked_word_errors", lambda row: f"{row['picked_word_errors']:.3f}"),
    ("equal candidates", "same_codes", lambda row: f"{row['same_codes']:.0%}"),
    ("slowest hundredth", "slow_step_seconds", lambda row: seconds(row["slow_step_seconds"])),
    ("Python calls a step", "python_calls", lambda row: thousands(row["python_calls"])),
    ("last fifth over first", "late_over_early", lambda row: f"{row['late_over_early']:.2f}"),
    (
        "what became of the requests",
        "ended",
        lambda row: ", ".join(f"{name} {thousands(count)}" for name, count in row["ended"].items()),
    ),
    ("faults planted", "planted", lambda row: thousands(row["planted"])),
    ("memory grew by", "grown_bytes", lambda row: f"{row['grown_bytes'] / 2**20:.1f} MiB"),
    ("first call adds", "peak_extra_bytes", lambda row: f"{row['peak_extra_bytes'] / 2**20:.0f} MiB"),
)

# Workloads that are not part of `benchmarks.run`.
_BY_HAND = {
    "stress": (
        "`make stress`: one engine under tasks of asyncio and threads, with faults planted at random in its steps, "
        "cancellations and timeouts. The time is that of a request from its task's call to its result, and the error "
        "counts requests that were lost, wrong or hanging"
    )
}


def measured(rows: list[dict], figures: dict[str, str]) -> str:
    """Write sections of every machine and instruction set that has rows, CPUs first.

    Args:
        rows: the newest of each task.
        figures: by the label of a machine, the figures' lines.
    """
    machines = by_machine(rows)
    parts = [_section(name, of_machine, figures) for name, of_machine in machines.items()]
    if not any("NVIDIA" in name for name in machines):
        parts.append("## NVIDIA GPU\n\nNot measured: none was at hand.")
    return "\n\n".join(parts)


def _section(name: str, rows: list[dict], figures: dict[str, str]) -> str:
    parts, without = [f"## {name}", *([figures[name]] if name in figures else [])], []
    for workload, what in (WORKLOADS | _BY_HAND).items():
        of_workload = [row for row in rows if row["workload"] == workload]
        if of_workload:
            parts.append(f"### {workload}\n\n{what[0].upper()}{what[1:]}.\n\n{_table(of_workload)}")
        elif workload in WORKLOADS:
            without.append(workload)
    return "\n\n".join([*parts, *([f"Not measured here: {', '.join(without)}."] if without else [])])


def _table(rows: list[dict]) -> str:
    timed = [row for row in rows if row["seconds"]]
    more = [column for column in _MORE if any(row.get(column[1]) is not None for row in timed)]
    limited = any("fraction_of_limit" in row for row in timed)
    titles = ["shape", "provider", "median (20 % to 80 %)", "speed", *["of the limit"] * limited, "error"]
    titles += [title for title, *_ in more]
    gains = [_over_float32(row, timed) for row in rows]
    titles += ["against float32"] * any(gains)
    common = _common([row["shape"] for row in rows])
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    shown = None
    for row, gain in zip(rows, gains, strict=True):
        shape = _words({name: value for name, value in row["shape"].items() if name not in common})
        cells = ["" if shape == shown else shape, row["provider"]]
        shown = shape
        if row["seconds"] is None:
            lines.append(f"| {' | '.join([*cells, row['refused'], *[''] * (len(titles) - 3)])} |")
            continue
        spread = row["seconds"]
        cells += [f"{seconds(spread['median'])} ({seconds(spread['q20'])} to {seconds(spread['q80'])})"]
        cells += [speed(row)]
        if limited:
            cells.append(f"{row['fraction_of_limit']:.1%}" if "fraction_of_limit" in row else "")
        cells.append(f"{row['error']:.1e}")
        cells += [say(row) if row.get(key) is not None else "" for _, key, say in more]
        cells += [gain] * any(gains)
        lines.append(f"| {' | '.join(cells)} |")
    everywhere = [f"{_words(common)[0].upper()}{_words(common)[1:]}.", ""] if common else []
    return "\n".join([*everywhere, *lines, "", *_absent(rows), _circumstances(rows)])


def _over_float32(row: dict, rows: list[dict]) -> str:
    """Write by how much a bfloat16 row is faster than the same provider in float32 at the same shape; "" for others."""
    name = row["provider"].replace("bfloat16", "float32")
    if name == row["provider"] or not row["seconds"]:
        return ""
    twins = [one["seconds"]["median"] for one in rows if (one["shape"], one["provider"]) == (row["shape"], name)]
    return f"{twins[0] / row['seconds']['median']:.2f}x" if twins else ""


def _common(shapes: list[dict]) -> dict:
    """Return the settings that all shapes share, where there are several."""
    first = shapes[0]
    if all(shape == first for shape in shapes):
        return {}
    return {name: value for name, value in first.items() if all(shape.get(name) == value for shape in shapes)}


def _words(shape: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())


def _absent(rows: list[dict]) -> list[str]:
    absent = {name: why for row in rows for name, why in row.get("absent", {}).items()}
    return ["Absent: " + "; ".join(f"{name} ({why})" for name, why in absent.items()) + ".", ""] if absent else []


def _circumstances(rows: list[dict]) -> str:
    found = {}
    for row in rows:
        versions, device = row["versions"], row["device"]
        threads = row["shape"].get("threads", device["threads"])
        where = (
            f"commit {row['commit']}, {row['utc'][:10]}, torch {versions['torch']}, transformers "
            f"{versions['transformers']}, memory at {bandwidth(device) / 1e9:.1f} GB/s"
        )
        found.setdefault(where, set()).add(threads)
    return (
        "; ".join(f"{where}, threads: {' and '.join(map(str, sorted(threads)))}" for where, threads in found.items())
        + "."
    )
