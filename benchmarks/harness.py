"""Measures providers of one workload side by side, in one process on the same inputs, and writes rows of JSON.

A row is written for a provider that passed the workload's own check; its error stands beside its time. Providers are
run in turns, so that a slow minute of the machine falls on all of them.
"""

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from clvp_fast.cli.versions import versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
# What a measurement depends on, and no document or result does.
SOURCES = ("benchmarks", "clvp_fast", "kernels", "csrc")


@dataclass
class Task:
    """One shape of a workload: a run writes its rows as soon as they are measured, and can leave out what it has.

    shape: as in its rows, which no other task of the workload has. rows: measures them.
    """

    shape: dict
    rows: Callable[[], list[dict]]


@dataclass
class Provider:
    """One way to do the workload.

    name: as in the row. run: does it `calls` times. error: how far its result is from the reference, and the most
        that is allowed. counted: what of the row is this provider's alone (its dtype, the bytes that it must move).
    """

    name: str
    run: Callable[[], object]
    error: float
    tolerance: float
    calls: int = 1
    counted: dict = field(default_factory=dict)


@dataclass
class Machine:
    """What a row says of the device, measured once a run."""

    name: str
    threads: int
    copy_bytes_per_s: float
    matmul_flop_per_s: dict[str, float]

    @classmethod
    def measure(cls, device: str, smoke: bool = False) -> "Machine":
        """Copy bandwidth, and the rate of a product in each dtype, the best of several tries."""
        source = torch.randn((1 if smoke else 256 if device == "cpu" else 2048) * 1024 * 1024 // 4, device=device)
        target = torch.empty_like(source)
        size = 128 if smoke else 1024 if device == "cpu" else 8192
        rates = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a, b = torch.randn(2, size, size, device=device).to(dtype)
            seconds = min(_time(partial(torch.matmul, a, b)) for _ in range(5))
            rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
        return cls(
            name=cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
            threads=torch.get_num_threads(),
            copy_bytes_per_s=2 * source.nbytes / min(_time(lambda: target.copy_(source)) for _ in range(5)),
            matmul_flop_per_s=rates,
        )

    def limit_seconds(self, row: dict) -> float | None:
        """The least time for the bytes and operations that a row counts, or None where it counts none."""
        times = [row["bytes"] / self.copy_bytes_per_s] if "bytes" in row else []
        if "flop" in row:
            times.append(row["flop"] / self.matmul_flop_per_s[row.get("dtype", "float32")])
        return max(times, default=None)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _time(run: Callable[[], object]) -> float:
    """Seconds of one run; on a GPU by its own clock."""
    if torch.cuda.is_initialized():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """How far `run` raises memory above where it stood: a GPU's in use, else the process's; None where no one tells."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = process_memory("VmRSS")
    except OSError:
        run()
        return None
    run()
    return max(process_memory("VmHWM") - before, 0)


def process_memory(field: str) -> int:
    """Bytes that Linux counts for this process: `VmRSS` now, `VmHWM` at most. Raises `OSError` elsewhere."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(field)


def measure(workload: str, shape: dict, providers: list[Provider], repeats: int, **counted) -> list[dict]:
    """Rows of one workload; the first provider that is timed is the one that the others are compared with.

    Args:
        shape: what the workload was made of, for the row.
        counted: bytes and operations that must move, for the row.

    A provider whose error is beyond its tolerance gets a row that says so, without a time: no green, no speed.
    """
    rows = []
    for provider in providers:
        if not provider.error <= provider.tolerance:
            reason = f"error {provider.error:.3g} is beyond {provider.tolerance:.3g}: not timed"
            print(f"{workload:>18} {provider.name:<44} {reason}", flush=True)
            rows.append(
                {
                    "workload": workload,
                    "shape": shape,
                    "provider": provider.name,
                    "seconds": None,
                    "refused": reason,
                    "error": provider.error,
                    **counted,
                    **provider.counted,
                }
            )
    providers = [provider for provider in providers if provider.error <= provider.tolerance]
    # The first run of each warms up and is looked at for memory.
    memory = {provider.name: _peak_extra_bytes(provider.run) for provider in providers}
    seconds = {provider.name: [] for provider in providers}
    for _ in range(repeats):
        for provider in providers:
            seconds[provider.name].append(_time(provider.run) / provider.calls)
    baseline = float(np.median(seconds[providers[0].name])) if providers else None
    for provider in providers:
        low, median, high = (float(q) for q in np.quantile(seconds[provider.name], [0.2, 0.5, 0.8]))
        rows.append(
            {
                "workload": workload,
                "shape": shape,
                "provider": provider.name,
                "seconds": {"q20": low, "median": median, "q80": high, "repeats": repeats},
                "ratio": baseline / median,
                "compared_with": providers[0].name,
                "error": provider.error,
                "peak_extra_bytes": memory[provider.name],
                **counted,
                **provider.counted,
            }
        )
        print(
            f"{workload:>18} {provider.name:<44} {_readable(median)} ({_readable(low)} to {_readable(high)})"
            f" {baseline / median:6.2f}x"
            f"  error {provider.error:.2g}",
            flush=True,
        )
    return rows


def _readable(seconds: float) -> str:
    for unit, size in (("s ", 1), ("ms", 1e-3)):
        if seconds >= 0.5 * size:
            return f"{seconds / size:7.2f} {unit}"
    return f"{seconds * 1e6:7.1f} us"


def all_rows(module, device: str, **options) -> list[dict]:
    """The rows of every task of a workload's module."""
    return [row for task in module.tasks(device, **options) for row in task.rows()]


@cache
def source() -> str:
    """A mark of the code that is measured: another one, and rows are of another program. Sixteen hex digits."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def commit() -> str:
    """Short name of the commit, with a `+` behind it where the code is not the commit's; or "unknown"."""
    changed = git("status", "--porcelain", "--", *SOURCES, ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


def git(*arguments: str) -> str:
    """What git prints; "" where there is none, or no repository."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""


def folder_of(machine: Machine, device: str, results: Path) -> Path:
    """Where the rows of a device are."""
    return results / (device if device == "cpu" else "-".join(machine.name.lower().split()))


def stored_rows(folder: Path) -> Iterator[dict]:
    """The rows of a device's folder or of one file, in the order of the files. A line that was cut off is left out."""
    for path in [folder] if folder.is_file() else sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # a run that was killed while it wrote


def task_key(row: dict) -> tuple[str, str]:
    """Which task of which workload a row belongs to."""
    return row["workload"], json.dumps(row["shape"], sort_keys=True)


def measured_tasks(folder: Path) -> set[tuple[str, str]]:
    """The tasks that were measured here with the code as it is, by the keys of `task_key`."""
    return {task_key(row) for row in stored_rows(folder) if row.get("source") == source()}


def with_context(rows: list[dict], machine: Machine, command: str) -> list[dict]:
    """`rows` with fraction of the limit, device, versions, commit, time and command."""
    context = {
        "device": machine.__dict__,
        "versions": versions() | ({"cuda": torch.version.cuda} if torch.cuda.is_initialized() else {}),
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
    """Append rows of one workload to its file in `folder`, in one piece."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rows[0]['workload']}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path
