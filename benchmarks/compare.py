"""Two sets of rows side by side: the ratio of their medians, and what differs beyond the spread of its repeats."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import git, stored_rows, task_key
from benchmarks.machine import label


@dataclass(frozen=True)
class Difference:
    """One provider's row of a task in two sets.

    ratio: the median of the second over that of the first. verdict: "slower" or "faster" if the sets are apart after
        leaving out the fifth of each that is nearest to the other; else "".
    """

    device: str
    name: str
    ratio: float
    before: float
    after: float
    verdict: str


def compare(first: str, second: str, results: Path) -> list[Difference]:
    """Compare the tasks that both have measured, in the order of the first.

    Args:
        first, second: each a file of rows, a folder with such files, or a commit with rows in `results`.

    Raises:
        ValueError: a name that is none of these, or no task that both have.
    """
    before, after = timed_rows(first, results), timed_rows(second, results)
    found = [_difference(key, row, after[key]) for key, row in before.items() if key in after]
    if not found:
        raise ValueError(
            f"{first} and {second} have no row of one device, instruction set, shape and provider in common"
        )
    return found


def timed_rows(name: str, results: Path) -> dict[tuple, dict]:
    """Return the newest row of each device, task and provider, without refused ones."""
    path = Path(name)
    if path.exists():
        folders = [path] if path.is_file() or not any(path.glob("*/*.jsonl")) else sorted(path.iterdir())
        rows = [row for folder in folders for row in stored_rows(folder)]
    else:
        names = {name, git("rev-parse", "--short", name)} - {""}
        rows = [
            row for path in sorted(results.glob("*/*.jsonl")) for row in stored_rows(path) if row["commit"] in names
        ]
        if not rows:
            raise ValueError(f"{name} is no file or folder of rows, and {results} has no rows of a commit {name}")
    return {(label(row["device"]), *task_key(row), row["provider"]): row for row in rows if row["seconds"]}


def _difference(key: tuple, before: dict, after: dict) -> Difference:
    device, workload, shape, provider = key
    old, new = before["seconds"], after["seconds"]
    verdict = "slower" if new["q20"] > old["q80"] else "faster" if new["q80"] < old["q20"] else ""
    name = f"{workload} {shape} {provider}"
    return Difference(device, name, new["median"] / old["median"], old["median"], new["median"], verdict)


def printed(differences: list[Difference]) -> str:
    lines = [f"{'B / A':>7}  {'A':>10}  {'B':>10}"]
    for one in differences:
        lines.append(f"{one.ratio:6.2f}x {one.before:10.4g}s {one.after:10.4g}s {one.verdict:<6}  {one.name}")
    slower = sum(one.verdict == "slower" for one in differences)
    faster = sum(one.verdict == "faster" for one in differences)
    lines.append(
        f"{slower} slower and {faster} faster beyond the spread, of {len(differences)}; a ratio above 1 is slower"
    )
    return "\n".join(lines)
