"""What a row says of the machine, and the clocks and counters of its device."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch


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
            seconds = min(seconds_of(partial(torch.matmul, a, b)) for _ in range(5))
            rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
        return cls(
            name=cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
            threads=torch.get_num_threads(),
            copy_bytes_per_s=2 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(5)),
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


def seconds_of(run: Callable[[], object]) -> float:
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


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
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
