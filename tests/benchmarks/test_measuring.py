"""A worker that measures rows on a GPU, on a CPU: memory that stays, and captures that cannot be."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernels
from benchmarks.gpu import measuring
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.supervise import DEVICE_LOST

ROWS = ['{"n": 2} torch, first', '{"n": 2} clvp_fast last']


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Go through two rows; return how the worker ended, and its journal."""
    journal = Journal(tmp_path / "journal.jsonl", "mark")
    places = ["--journal", str(journal.path), "--mark", "mark", "--step", "rows", "--rows", str(tmp_path / "rows")]
    words = ["tests.benchmarks.planted", "--groups", "ours,torch", "--device", "cpu", "--smoke", *places]
    arguments = measuring.arguments_of([*words, "--worker", "w"])
    monkeypatch.setattr(measuring, "arguments_of", lambda: arguments)
    monkeypatch.setattr(measuring, "end_with_the_supervisor", lambda: None)
    monkeypatch.setattr(measuring.Machine, "measure", lambda *args: SimpleNamespace(name="here"))
    items = measuring.items_of
    chosen = (lambda *args: [item for item in items(*args) if item.task.shape == {"n": 2}],)
    monkeypatch.setattr(measuring, "items_of", *chosen)
    monkeypatch.setattr(measuring, "_measure", lambda item, *args: ("measured", ""))
    prefix = "tests.benchmarks.planted "
    return lambda: (measuring.main(), [name.removeprefix(prefix) for name in journal.ended("rows")])


def test_a_worker_that_cannot_give_memory_back_ends_and_another_goes_on(worker, monkeypatch, capsys):
    kept = measuring.MOST_KEPT_BYTES
    monkeypatch.setattr(measuring, "_free", lambda device: kept + 1.4e9)
    assert worker() == (DEVICE_LOST, ROWS[:1])
    assert "19 GB that nobody uses are not given back" in capsys.readouterr().out
    monkeypatch.setattr(measuring, "_free", lambda device: kept)
    assert worker() == (0, ROWS)


def test_free_memory_counts_the_unused_cache(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 6)
    assert measuring._free("cuda") == 64 and emptied
    assert measuring._free("cpu") == 0


class Device:
    """In the place of `torch.cuda`: notes captures, and knows whether an operation that waits must raise."""

    def __init__(self, capture=nullcontext):
        self.mode, self.captures, self._capture = 1, 0, capture

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    @contextmanager
    def graph(self, graph):
        self.captures += 1
        with self._capture():
            yield

    def wait(self):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.fixture
def device_of(monkeypatch):
    def pretend(**options):
        device, stream = Device(**options), SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in dict(
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda stream: nullcontext(),
            get_sync_debug_mode=lambda: device.mode,
            set_sync_debug_mode=device.set_sync_debug_mode,
            CUDAGraph=lambda: SimpleNamespace(replay="replay"),
            graph=device.graph,
            synchronize=lambda: None,
        ).items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        return device

    return pretend


def test_calls_that_wait_are_never_captured(device_of):
    """Avoid a failing capture, which would cost all later rows their memory."""
    device = device_of()
    assert kernels.captured(device.wait) is None
    assert device.captures == 0 and device.mode == 1


def test_calls_that_do_not_wait_are_captured(device_of):
    device, runs = device_of(), []
    assert kernels.captured(lambda: runs.append(device.mode)) == "replay"
    assert device.captures == 1 and runs == [1, "error", 1]


def test_a_capture_that_fails_is_none_and_one_without_memory_says_so(device_of):
    @contextmanager
    def failing(error):
        yield
        raise error

    device = device_of(capture=lambda: failing(RuntimeError("capture invalidated")))
    assert kernels.captured(lambda: None) is None and device.captures == 1
    device_of(capture=lambda: failing(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        kernels.captured(lambda: None)


def test_a_way_that_fails_is_no_way_that_cannot_be_captured(device_of):
    device_of()

    def broken():
        raise RuntimeError("a planted fault")

    with pytest.raises(RuntimeError, match="planted"):
        kernels.captured(broken)
