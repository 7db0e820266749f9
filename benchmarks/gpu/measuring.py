"""A worker that measures rows, one provider at a time: `python -m benchmarks.gpu.measuring`, from the supervisor.

A provider's memory is freed before the next is made, and torch gives no process more than `MOST_BYTES`; a worker that
cannot give enough of it back ends, and another one goes on behind it. The first shape of each workload comes first, so
that a run that ends early has something of each.
"""

import argparse
import gc
import importlib
import itertools
import json
import math
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.supervise import DEVICE_LOST, device_is_lost, end_with_the_supervisor
from benchmarks.harness import Machine, Task, folder_of, with_context, write_rows
from benchmarks.providers import Absent, group_of, parsed

#: Device memory that providers may take, of a GPU that may be shared.
MOST_BYTES = 70e9
#: And of these what may stay with torch's allocator, in nobody's use, when a provider is gone.
MOST_KEPT_BYTES = MOST_BYTES / 4
_COMMAND = "make gpu-bench"


@dataclass(frozen=True)
class Item:
    """One provider of one shape of one workload."""

    workload: str
    task: Task
    provider: str

    @property
    def name(self) -> str:
        """As in the journal."""
        return f"{self.workload} {json.dumps(self.task.shape)} {self.provider}"


def items_of(workloads: list[str], groups: tuple[str, ...], names: str, device: str, smoke: bool) -> Iterator[Item]:
    """Return the items to measure, in their order.

    workloads: modules of `benchmarks`, or of another package by their whole name. names: what a provider's name must
        match, an expression.
    """
    tasks = []
    for workload in workloads:
        tasks.append([(workload, task) for task in _tasks_of(workload, device, smoke)])
    for turn in itertools.zip_longest(*tasks):
        for workload, task in filter(None, turn):
            for name in [*task.makers, *task.absent]:
                if group_of(name) in groups and re.search(names, name):
                    yield Item(workload, task, name)


def _tasks_of(workload: str, device: str, smoke: bool) -> list[Task]:
    """Return a workload's tasks; where they cannot be made, one whose row tells why."""
    try:
        module = importlib.import_module(workload if "." in workload else f"benchmarks.{workload}")
        return list(module.tasks(device, smoke=smoke))
    except Exception as error:
        found = error

    def row(name: str) -> dict:
        raise found

    return [Task({}, lambda: [], {"clvp_fast tasks": lambda: row("")}, row=row)]


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measuring", description=__doc__)
    parser.add_argument("workload", nargs="+")
    parser.add_argument("--groups", type=parsed, required=True)
    parser.add_argument("--names", default="")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rows", type=Path, help="folder for the rows")
    for name in ("--journal", "--mark", "--step", "--worker", "--share"):
        parser.add_argument(name)
    return parser.parse_args(argv)


def main() -> int:
    arguments = arguments_of()
    end_with_the_supervisor()
    device, step = arguments.device, arguments.step
    journal = Journal(Path(arguments.journal), arguments.mark)
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else math.inf
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(MOST_BYTES / memory, 1.0))
    machine = Machine.measure(device, arguments.smoke)
    folder = folder_of(machine, device, arguments.rows)
    ended = journal.ended(step)
    for item in items_of(arguments.workload, arguments.groups, arguments.names, device, arguments.smoke):
        if item.name in ended:
            continue
        journal.write(step, "begin", item=item.name, worker=arguments.worker)
        outcome, why = _measure(item, machine, folder, memory)
        # Asked first: where it never answers, the row is open still, and hangs.
        lost = outcome == "failed" and device == "cuda" and device_is_lost(torch.cuda.synchronize)
        kept = 0 if lost else _free(device)
        journal.write(step, "end", item=item.name, worker=arguments.worker, outcome=outcome, why=why)
        if kept > MOST_KEPT_BYTES:
            print(f"a new worker: {kept / 1e9:.0f} GB that nobody uses are not given back", flush=True)
        if lost or kept > MOST_KEPT_BYTES:
            return DEVICE_LOST
    journal.write(step, "done", worker=arguments.worker)
    return 0


def _measure(item: Item, machine: Machine, folder: Path, memory: float) -> tuple[str, str]:
    """Write the item's row; what it came to, and why. memory: bytes of the device."""
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        row = item.task.row(item.provider)
    except Absent as reason:
        return "absent", str(reason)
    except torch.OutOfMemoryError as error:
        small = memory < MOST_BYTES
        return "absent" if small else "failed", f"a device of {memory / 1e9:.0f} GB: {error}"[:3000]
    except Exception as error:  # this row; the others are measured
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"[:3000]
    held = {"held_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {}
    write_rows(with_context([row | held], machine, _COMMAND), folder)
    return ("measured", "") if row["seconds"] else ("failed", row["refused"])


def _free(device: str) -> int:
    """Give back what the last provider held, and tell how many bytes stay though nobody uses them.

    Models and inputs that several share stay, and are in use.
    """
    torch.compiler.reset()  # its captured graphs hold memory
    gc.collect()
    if device == "cpu":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


if __name__ == "__main__":
    sys.exit(main())
