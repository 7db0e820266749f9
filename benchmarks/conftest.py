"""Every workload as a module of pytest-benchmark: `pytest benchmarks/NAME.py --benchmark-only`.

`--smoke` measures tiny sizes, `--device cuda` a GPU, `-k "kernel and rows=16"` some of them. A shape is a group, and a
provider of it a test, behind the gate of `clvp-fast bench`: a wrong one fails, one that cannot be had is skipped with
the reason. Rows are not written; `--benchmark-json` keeps what was measured.
"""

import importlib
import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks.harness import Task
from benchmarks.providers import Absent, group_of
from benchmarks.run import WORKLOADS


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured (default: %(default)s)")
    group.addoption("--smoke", action="store_true", help="tiny sizes, once: whether it runs")


def pytest_configure(config):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs an NVIDIA GPU and a torch that sees it")


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".py" and file_path.stem in WORKLOADS and file_path.parent == parent.path:
        return Workload.from_parent(parent, path=file_path)
    return None


class Workload(pytest.Module):
    """A test for each provider of each of a workload's tasks."""

    def collect(self) -> Iterator[pytest.Function]:
        module = importlib.import_module(f"benchmarks.{self.path.stem}")
        for task in module.tasks(self.config.getoption("--device"), smoke=self.config.getoption("--smoke")):
            shape = " ".join(f"{name}={value}" for name, value in task.shape.items())
            for name in [*task.makers, *task.absent]:
                clock = Clock()
                test = pytest.Function.from_parent(self, name=f"{shape} {name}", callobj=_test(task, name, clock))
                test.add_marker(pytest.mark.benchmark(group=f"{self.path.stem} {shape}", timer=clock.read))
                yield test


class Clock:
    """Seconds of a provider's single call, where a run of it makes `calls`."""

    calls = 1

    def read(self) -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() / self.calls


def _test(task: Task, name: str, clock: Clock):
    def test(benchmark):
        if name in task.absent:
            pytest.skip(task.absent[name])
        with task.around():
            try:
                provider = task.makers[name]()
            except Absent as reason:
                pytest.skip(str(reason))
            except Exception as error:
                if group_of(name) == "ours":
                    raise
                pytest.skip(f"{type(error).__name__}: {error}")
            if not provider.error <= provider.tolerance:
                pytest.fail(f"error {provider.error:.3g} is beyond {provider.tolerance:.3g}: not timed", pytrace=False)
            benchmark.extra_info.update(provider.counted, error=provider.error)
            benchmark.name, clock.calls = name, provider.calls
            benchmark.pedantic(provider.run, rounds=task.repeats, warmup_rounds=1)

    return test
