"""Measures providers of one workload side by side, in one process on the same inputs, and writes rows of JSON.

A row is written for a provider that passed the workload's own check, with its error and its time. Providers run in
turns, so that a slow minute of the machine affects all of them. A missing one does not cost others their rows.
"""

import gc
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import sleep

import numpy as np
import torch

from benchmarks.machine import Machine, label, peak_extra_bytes, seconds_of
from benchmarks.providers import Absent, group_of, is_chosen
from clvp_fast.versions import versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
# The folders that a measurement depends on, without documents and results.
SOURCES = ("benchmarks", "clvp_fast", "kernels", "csrc")
# Packages of rivals, whose versions rows have where they are installed.
RIVALS = (
    *("flashinfer-python", "torchaudio", "flashmel", "asrfront"),
    *("onnxruntime", "openvino", "nncf", "llama_cpp_python", "ctranslate2"),
)


@dataclass
class Provider:
    """One way to do the workload.

    name: as in the row. run: does it `calls` times. error: how far its result is from the reference, and the most
        that is allowed. counted: what of the row is this provider's alone (its dtype, the bytes that it must move);
        its runs may add to it.
    """

    name: str
    run: Callable[[], object]
    error: float
    tolerance: float
    calls: int = 1
    counted: dict = field(default_factory=dict)


@dataclass
class Task:
    """One shape of a workload: a run writes its rows as soon as they are measured, and can leave out what it has.

    shape: as in its rows, which no other task of the workload has. rows: measures them. row: measures one provider
        alone, by its name, and raises `Absent` where it cannot be had. makers: by name, what makes
        each provider and judges it; the first is what the others are compared with. repeats: how often each is timed.
        absent: by name, why a provider cannot be had. around: what a provider must be made and run in.
    """

    shape: dict
    rows: Callable[[], list[dict]]
    makers: dict[str, Callable[[], Provider]] = field(default_factory=dict)
    repeats: int = 1
    absent: dict[str, str] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager] = nullcontext
    row: Callable[[str], dict] | None = None


def task(
    workload: str,
    shape: dict,
    makers: dict[str, Callable[[], Provider]],
    repeats: int,
    absent: dict[str, str] | None = None,
    around: Callable[[], AbstractContextManager] = nullcontext,
    parties: list[list[str]] | None = None,
    rest: float = 0.0,
    read: torch.Tensor | None = None,
    **counted,
) -> Task:
    """Make a task whose rows are those of the providers that `makers` make; see `Task` and `measure`.

    parties: of names in `makers`. Those of a party are made and run in turns, and are gone before the next party is
        made, as not all of them fit into memory together. None: they do.
    rest, read: as for `measure`.
    """
    absent = absent or {}

    def rows() -> list[dict]:
        found, missing, told = [], {}, dict(absent)
        for party in parties or [list(makers)]:
            with around():
                providers, gone = made({name: makers[name] for name in party})
                told |= gone
                found += measure(workload, shape, providers, repeats, absent=told, rest=rest, read=read, **counted)
            missing, told = missing | told, {}
            del providers
            gc.collect()
        found.sort(key=lambda row: list(makers).index(row["provider"]))
        missing = {name: missing[name] for name in (*absent, *makers) if name in missing}
        return _against_first([row | {"absent": missing} for row in found])

    def row(name: str) -> dict:
        if name in absent:
            raise Absent(absent[name])
        with around():
            providers, missing = made({name: makers[name]})
            found = measure(workload, shape, providers, repeats, absent=missing, rest=rest, read=read, **counted)
        if not found:
            raise Absent(missing[name])
        # The provider that it is compared with may come later, or be missing, so ratios are computed from the rows.
        return found[0] | {"alone": True, "ratio": None, "compared_with": next(iter(makers))}

    return Task(shape, rows, makers, repeats, absent, around, row)


def _against_first(rows: list[dict]) -> list[dict]:
    """Return the rows, those with a time compared with the first of them."""
    first = next((row for row in rows if row["seconds"]), None)
    return [
        row | {"ratio": first["seconds"]["median"] / row["seconds"]["median"], "compared_with": first["provider"]}
        if row["seconds"]
        else row
        for row in rows
    ]


def made(makers: dict[str, Callable[[], Provider]]) -> tuple[list[Provider], dict[str, str]]:
    """Return the providers that are asked for, and by name why a rival is missing. A failure of ours is an error."""
    providers, absent = [], {}
    for name, make in makers.items():
        if not is_chosen(name):
            continue
        try:
            providers.append(make())
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:
            if group_of(name) == "ours":
                raise
            absent[name] = f"{type(error).__name__}: {error}"
    return providers, absent


def measure(
    workload: str,
    shape: dict,
    providers: list[Provider],
    repeats: int,
    absent: dict[str, str] | None = None,
    rest: float = 0.0,
    read: torch.Tensor | None = None,
    **counted,
) -> list[dict]:
    """Measure rows of one workload; the others are compared with the first provider that is timed.

    Args:
        shape: what the workload was made of, for the row.
        absent: by name, why a provider cannot be had, for the row.
        rest: seconds to wait before each run, while the threads of the one before still spin for more work.
        read: summed at the beginning of each turn; rows have the best rate of that, as "read_bytes_per_s", and their
            limit follows it. Other work on a machine leaves a CPU's memory half or twice as fast within minutes.
        counted: bytes and operations that must move, for the row.

    A provider whose error is beyond its tolerance gets a row that says so, without a time: no green, no speed. A rival
    that breaks when it is run is added to `absent`. Providers that are not asked for (`providers.only`) have no part.
    """
    absent = {} if absent is None else absent
    for name in [name for name in absent if not is_chosen(name)]:
        del absent[name]
    providers = [provider for provider in providers if is_chosen(provider.name)]
    rows = []

    def add(provider: Provider, **found) -> None:
        row = {"workload": workload, "shape": shape, "provider": provider.name, **found, "absent": absent}
        rows.append(row | counted | provider.counted)

    for provider in providers:
        if not provider.error <= provider.tolerance:
            reason = f"error {provider.error:.3g} is beyond {provider.tolerance:.3g}: not timed"
            print(f"{workload:>18} {provider.name:<44} {reason}", flush=True)
            add(provider, seconds=None, refused=reason, error=provider.error)
    providers = [provider for provider in providers if provider.error <= provider.tolerance]
    memory = _warmed_up(providers, absent)
    providers = [provider for provider in providers if provider.name in memory]
    for name, why in absent.items():
        print(f"{workload:>18} {name:<44} absent: {why}", flush=True)
    seconds = {provider.name: [] for provider in providers}
    sums = []
    for _ in range(repeats):
        if read is not None:
            sleep(rest)
            sums.append(seconds_of(read.sum))
        for provider in providers:
            sleep(rest)
            seconds[provider.name].append(seconds_of(provider.run) / provider.calls)
    baseline = float(np.median(seconds[providers[0].name])) if providers else None
    for provider in providers:
        low, median, high = (float(q) for q in np.quantile(seconds[provider.name], [0.2, 0.5, 0.8]))
        add(
            provider,
            seconds={"q20": low, "median": median, "q80": high, "repeats": repeats},
            ratio=baseline / median,
            compared_with=providers[0].name,
            error=provider.error,
            peak_extra_bytes=memory[provider.name],
            **({} if read is None else {"read_bytes_per_s": read.nbytes / min(sums)}),
        )
        print(
            f"{workload:>18} {provider.name:<44} {_readable(median)} ({_readable(low)} to {_readable(high)})"
            f" {baseline / median:6.2f}x"
            f"  error {provider.error:.2g}",
            flush=True,
        )
    return rows


def _warmed_up(providers: list[Provider], absent: dict[str, str]) -> dict[str, int | None]:
    """Return, by name, the memory that each provider's first run adds; a rival that breaks is put into `absent`."""
    memory = {}
    for provider in providers:
        try:
            memory[provider.name] = peak_extra_bytes(provider.run)
        except Exception as error:
            if group_of(provider.name) == "ours":
                raise
            absent[provider.name] = f"{type(error).__name__}: {error}"
    return memory


def _readable(seconds: float) -> str:
    for unit, size in (("s ", 1), ("ms", 1e-3)):
        if seconds >= 0.5 * size:
            return f"{seconds / size:7.2f} {unit}"
    return f"{seconds * 1e6:7.1f} us"


def all_rows(module, device: str, **options) -> list[dict]:
    """Return the rows of every task of a workload's module."""
    return [row for task in module.tasks(device, **options) for row in task.rows()]


@cache
def source(*more: str) -> str:
    """Return a hash of the measured code, sixteen hex digits; rows with another hash are of another program.

    more: further folders, beside `SOURCES`.
    """
    digest = hashlib.sha256()
    for folder in (*SOURCES, *more):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def commit() -> str:
    """Return the short name of the commit, with a `+` if the code differs from it; or "unknown"."""
    changed = git("status", "--porcelain", "--", *SOURCES, ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


def git(*arguments: str) -> str:
    """Return git's output; "" without git or a repository."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""


def folder_of(machine: Machine, device: str, results: Path) -> Path:
    """Return the folder for rows of a device; all CPUs share one, and `label` tells them apart."""
    return results / (device if device == "cpu" else "-".join(machine.name.lower().split()))


def stored_rows(folder: Path) -> Iterator[dict]:
    """Return the rows of a device's folder or of one file, in the order of the files, without torn lines."""
    for path in [folder] if folder.is_file() else sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # a run that was killed while it wrote


def newest_rows(folder: Path = RESULTS) -> list[dict]:
    """Return, for each machine and task, the rows of its last complete run, in the order of the files."""
    newest: dict[tuple, dict[str, dict]] = {}
    for path in sorted(folder.glob("*/*.jsonl")):
        for row in stored_rows(path):
            if row.get("chosen_providers"):
                continue  # a part of a task, and no new run of it
            of_task = newest.setdefault((path.parent.name, label(row["device"]), *task_key(row)), {})
            if any(_run_of(other) != _run_of(row) for other in of_task.values()):
                of_task.clear()
            of_task[row["provider"]] = row
    return [row for of_task in newest.values() for row in _compared(of_task)]


def _run_of(row: dict) -> str:
    """Return the fields that the rows of one run share; for providers measured alone, those of the same code."""
    return row["source"] if row.get("alone") else row["utc"]


def _compared(of_task: dict[str, dict]) -> list[dict]:
    """Return the rows of a task; those measured alone get their ratio to the first."""
    rows = list(of_task.values())
    baseline = of_task.get(rows[0].get("compared_with")) if rows[0].get("alone") else None
    if baseline is None or not baseline["seconds"]:
        return rows
    median = baseline["seconds"]["median"]
    rows.sort(key=lambda row: row is not baseline)
    return [row | {"ratio": median / row["seconds"]["median"]} if row["seconds"] else row for row in rows]


def task_key(row: dict) -> tuple[str, str]:
    """Return a key of a row's task and workload."""
    return row["workload"], json.dumps(row["shape"], sort_keys=True)


def measured_tasks(folder: Path, machine: Machine, chosen: tuple[str, ...] | None = None) -> set[tuple[str, str]]:
    """Return the tasks measured on such a machine with the present code, by the keys of `task_key`.

    chosen: the groups of providers that are asked for; rows of others' alone do not count.
    """
    enough, here = (None, list(chosen)) if chosen else (None,), label(machine.described())
    return {
        task_key(row)
        for row in stored_rows(folder)
        if row.get("source") == source() and row.get("chosen_providers") in enough and label(row["device"]) == here
    }


@cache
def _versions_of_rivals() -> dict[str, str]:
    found = {}
    for name in RIVALS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def with_context(rows: list[dict], machine: Machine, command: str, chosen: tuple[str, ...] | None = None) -> list[dict]:
    """Add fraction of the limit, device, versions, commit, time and command to `rows`.

    chosen: the groups of providers that were asked for, where not all were; documents leave such rows out.
    """
    context = {"chosen_providers": list(chosen)} if chosen else {}
    context |= {
        "device": machine.described(),
        "versions": versions()
        | _versions_of_rivals()
        | ({"cuda": torch.version.cuda} if torch.cuda.is_initialized() else {}),
        "commit": commit(),
        "source": source(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }
    found = []
    for row in rows:
        limit = machine.limit_seconds(row) if row["seconds"] else None
        against_limit = {} if limit is None else {"fraction_of_limit": limit / row["seconds"]["median"]}
        found.append(row | against_limit | context)
    return found


def write_rows(rows: list[dict], folder: Path) -> Path:
    """Append rows of one workload to its file in `folder`, in one piece; a line that was cut off stays alone."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rows[0]['workload']}.jsonl"
    before = path.read_bytes() if path.exists() else b""
    cut_off = bool(before) and not before.endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + "".join(json.dumps(row) + "\n" for row in rows))
    return path
