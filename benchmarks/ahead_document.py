"""The first table of docs/benchmarks.md: where a rival is ahead of ours at the same number of bits, from the rows."""

from benchmarks.document import seconds
from benchmarks.harness import task_key
from benchmarks.machine import by_machine
from benchmarks.providers import bits, group_of


def table(rows: list[dict]) -> str:
    """Write for each machine, task and number of bits the fastest rival, if it is faster than the fastest of ours.

    Faster: beyond the spread of both, from 20 % to 80 % of the repeats.
    """
    lines = []
    for machine, of_machine in by_machine(rows).items():
        for (workload, _), of_task in _tasks(of_machine).items():
            lines += [f"| {machine} | {workload}, {line}" for line in _lines(of_task)]
    if not lines:
        return "Nowhere, of what is measured."
    titles = "| machine | workload, shape | bits | rival | its time | ours | our time | behind by |"
    return "\n".join([titles, "|---" * titles.count(" | ") + "|---|", *lines])


def _tasks(rows: list[dict]) -> dict[tuple, list[dict]]:
    found = {}
    for row in rows:
        if row["seconds"]:
            found.setdefault(task_key(row), []).append(row)
    return found


def _lines(rows: list[dict]) -> list[str]:
    shape = ", ".join(f"{name} {value}" for name, value in rows[0]["shape"].items())
    lines = []
    for width in sorted({_bits(row) for row in rows}, reverse=True):
        sides = {True: [], False: []}
        for row in rows:
            if _bits(row) == width:
                sides[group_of(row["provider"]) == "ours"].append(row)
        if not all(sides.values()):
            continue
        ours, rival = (min(sides[mine], key=_median) for mine in (True, False))
        if rival["seconds"]["q80"] < ours["seconds"]["q20"]:
            cells = [shape, str(width), rival["provider"], seconds(_median(rival)), ours["provider"]]
            behind = f"{_median(ours) / _median(rival):.2f}x"
            lines.append(" | ".join([*cells, seconds(_median(ours)), behind]) + " |")
    return lines


def _bits(row: dict) -> int:
    return bits(f"{row['provider']} {row.get('dtype', '')} {row['shape'].get('dtype', '')}")


def _median(row: dict) -> float:
    return row["seconds"]["median"]
