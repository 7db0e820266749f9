"""The predicted time of launches.

A launch takes the time between two launches, the waits of its longest program, and the longest of what its units need:

    seconds = launch + waits + max(memory, L2 cache, matrix unit, instructions)

Programs are spread evenly; instructions take the longer of what the fullest multiprocessor issues and what one warp
issues alone. Memory is slower where too few bytes are on their way for its latency.
"""

from dataclasses import dataclass
from math import ceil

from benchmarks.cost.devices import Chip
from benchmarks.cost.recording import Launch
from benchmarks.cost.work import Stored, Work, of


@dataclass(frozen=True)
class Predicted:
    """The seconds of a launch, and which unit bounds it: memory, cache, products or instructions."""

    seconds: float
    bound: str
    work: Work


def resident(launch: Launch, chip: Chip) -> int:
    """Return how many programs of a launch fit on one multiprocessor."""
    if launch.code is None:
        return 1
    of_registers = chip.registers // (launch.code.registers * 32 * launch.warps)
    # A program takes 1 KB of shared memory beside its own.
    of_shared = chip.shared_bytes // (launch.code.shared_bytes + 1024)
    return max(min(of_registers, of_shared, chip.most_warps // launch.warps, chip.most_programs), 1)


def predict(launch: Launch, stored: Stored, chip: Chip) -> Predicted:
    """Predict one launch."""
    work = of(launch, stored)
    units = {
        "memory": work.bytes / _rate(launch, work, chip),
        "L2 cache": work.cache_bytes / chip.cache_bytes_per_s,
        "products": work.flop / chip.flop_per_s,
        "instructions": _issuing(launch, work, chip),
    }
    bound = max(units, key=lambda name: units[name])
    waits = work.waits
    waiting = waits.memory * chip.memory_latency + waits.cache * chip.cache_latency + waits.barriers * chip.barrier
    return Predicted(chip.launch + waiting + units[bound], bound, work)


def _rate(launch: Launch, work: Work, chip: Chip) -> float:
    """Return bytes a second from memory, which bytes on their way may bound."""
    if not work.in_flight:
        return chip.bytes_per_s
    programs = min(launch.programs, resident(launch, chip) * chip.multiprocessors)
    return min(chip.bytes_per_s, programs * work.in_flight / chip.memory_latency)


def _issuing(launch: Launch, work: Work, chip: Chip) -> float:
    if not launch.programs:
        return 0.0
    fullest = ceil(launch.programs / chip.multiprocessors) / launch.programs  # the share of the fullest multiprocessor
    together = work.issued * fullest / chip.schedulers
    waves = ceil(launch.programs / (resident(launch, chip) * chip.multiprocessors))
    return max(together, work.longest * waves * chip.cycles_alone) / chip.hertz
