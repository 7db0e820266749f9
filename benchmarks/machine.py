"""The fields of a row on the machine, and the clocks and counters of its device."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from clvp_fast import native
from clvp_fast.engine.memory import trim_heap
from clvp_fast.ops import linear

# The variables that hold torch's libraries down to an instruction set on a CPU.
TORCH_LIMITS = {"ATEN_CPU_CAPABILITY": "ATen", "ONEDNN_MAX_CPU_ISA": "oneDNN", "MKL_ENABLE_INSTRUCTIONS": "MKL"}
# Keys in /proc/cpuinfo that tell CPUs of one name apart: the first two on x86-64, the others on aarch64.
_MODEL_KEYS = ("cpu family", "model", "CPU implementer", "CPU part")


@dataclass
class Machine:
    """The fields of a row on the device, measured once a run.

    copy_bytes_per_s, read_bytes_per_s: of a copy, reads and writes together; of a sum, which only reads.
    matmul_flop_per_s: by dtype the rate of the fastest known product: torch's or, on a CPU, ours, as torch's in float32
        has a fifth of the rate of ours on some CPUs, and would be no bound.
    cpu: of a CPU, as `cpu_facts` tells; empty for a GPU.
    """

    name: str
    threads: int
    copy_bytes_per_s: float
    matmul_flop_per_s: dict[str, float]
    cpu: dict = field(default_factory=dict)
    read_bytes_per_s: float = 0.0

    @classmethod
    def measure(cls, device: str, smoke: bool = False) -> "Machine":
        """Measure bandwidths, and the rate of a product in each dtype, as the best of several tries."""
        source = read_bytes(device, smoke)
        target = torch.empty_like(source)
        size = 128 if smoke else 1024 if device == "cpu" else 8192
        products = (torch.matmul, linear) if device == "cpu" else (torch.matmul,)
        rates = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a, b = torch.randn(2, size, size, device=device).to(dtype)
            tries = [partial(product, a, b) for product in products for _ in range(5)]
            rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / min(map(seconds_of, tries))
        return cls(
            name=cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
            threads=torch.get_num_threads(),
            copy_bytes_per_s=2 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(5)),
            read_bytes_per_s=source.nbytes / min(seconds_of(source.sum) for _ in range(10)),
            matmul_flop_per_s=rates,
            cpu=cpu_facts() if device == "cpu" else {},
        )

    def described(self) -> dict:
        """Return the machine as rows have it, under "device"."""
        measured = asdict(self)
        return measured | measured.pop("cpu")

    def limit_seconds(self, row: dict) -> float | None:
        """Return the least time for the bytes and operations that a row counts, or None where it counts none."""
        rate = row.get("read_bytes_per_s") or bandwidth(self.described())
        times = [row["bytes"] / rate] if "bytes" in row else []
        if "flop" in row:
            times.append(row["flop"] / self.matmul_flop_per_s[row.get("dtype", "float32")])
        return max(times, default=None)


def read_bytes(device: str, smoke: bool = False) -> torch.Tensor:
    """Return numbers whose sum shows how fast memory is read: more than caches hold."""
    return torch.randn((1 if smoke else 256 if device == "cpu" else 2048) * 1024 * 1024 // 4, device=device)


def bandwidth(device: dict) -> float:
    """Return the bytes a second of a row's device. Rows from before 2026-11-30 have only those of a copy."""
    return max(device["copy_bytes_per_s"], device.get("read_bytes_per_s", 0.0))


def label(device: dict) -> str:
    """Return a row's machine and instruction set, in words by which rows are also sorted.

    Two rows may stand in one table, and be compared, where their labels are equal.

    device: of a row, as `Machine.described` gives it. Rows of a GPU have its name alone.
    """
    model = ", ".join(f"{key} {number}" for key, number in device.get("cpu_model", {}).items())
    words = [f"{device['name']} ({model})" if model else device["name"]]
    if "isa" in device:
        words.append((device["isa"] or "no native library") + " forced" * device["isa_forced"])
    words += [f"{TORCH_LIMITS[name]} at {value.lower()}" for name, value in device.get("torch_limits", {}).items()]
    return ", ".join(words)


def is_forced(device: dict) -> bool:
    """Tell whether the device of a row was held down below its best."""
    return bool(device.get("isa_forced") or device.get("torch_limits"))


def by_machine(rows: list[dict]) -> dict[str, list[dict]]:
    """Return the rows of each label: CPUs first, and among these the ones at their best."""
    found = {}
    for row in sorted(rows, key=lambda row: _rank(row["device"])):
        found.setdefault(label(row["device"]), []).append(row)
    return found


def _rank(device: dict) -> tuple:
    return "NVIDIA" in device["name"], is_forced(device), label(device)


def cpu_facts() -> dict:
    """Return the fields of a row on a CPU besides its name.

    isa: the instruction set of the native library's kernels; None without a library. isa_forced: whether it is less
    than the CPU has. torch_isa: that of torch's own kernels. torch_limits: the variables that hold torch's libraries
    down, where they are set. cpu_model: by the keys of /proc/cpuinfo, what tells CPUs of one name apart. l2_bytes: of
    a core.
    """
    isa = None if native.missing("cpu") else native.isa()
    return {
        "isa": isa,
        "isa_forced": isa is not None and native.is_held_down(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch_limits": {name: os.environ[name] for name in TORCH_LIMITS if os.environ.get(name)},
        "cpu_model": {key: value for key, value in _first_cpu().items() if key in _MODEL_KEYS},
        "l2_bytes": _l2_bytes(),
    }


def cpu_name() -> str:
    return _first_cpu().get("model name") or platform.processor() or platform.machine()


def _first_cpu() -> dict[str, str]:
    """Return the fields of the first CPU in /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _l2_bytes() -> int | None:
    """Return the bytes of a core's second cache, or None where they are unknown."""
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (cache / "level").read_text().strip() == "2":
                return int((cache / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return None


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds of one run; on a GPU by its own clock."""
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
    """Return by how much `run` raises memory: a GPU's in use, else the process's; None where it is unknown."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    trim_heap()  # else memory that earlier calls freed would hide what this one takes
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = process_memory("VmRSS")
    except OSError:
        run()
        return None
    run()
    return max(process_memory("VmHWM") - before, 0)


def process_memory(field: str) -> int:
    """Return the bytes that Linux counts for this process: `VmRSS` now, `VmHWM` at most. Raises `OSError` elsewhere."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(field)
