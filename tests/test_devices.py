"""Work follows the device that its tensors lie on, which need not be torch's current one; `tests/gpu` has it for real.

A stand-in for `torch.cuda.device` records which device is current; the tensors are on a second GPU in name alone.
"""

import importlib
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from clvp_fast import native
from clvp_fast.engine.persistent import PersistentStep
from clvp_fast.ops import dispatch
from tests.engine.test_decoder import prompts, tiny
from tests.engine.test_runner import GREEDY, Driver
from tests.kit import operators

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Away(torch.Tensor):
    """A tensor without memory that says it lies on the second GPU; torch's dispatcher believes it."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (2, 2), dtype=torch.float32, device=SECOND)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


class Copied(Away):
    """One that can be copied to the host."""

    def detach(self):
        return self

    def to(self, *args, **kwargs):
        return torch.zeros(2, 2, dtype=torch.int64)


@pytest.fixture
def current(monkeypatch):
    """Give the devices that were made current and not left yet; the last one is the current one."""
    devices = [FIRST]

    class Device:
        def __init__(self, device):
            self.device = torch.device(device)

        def __enter__(self):
            devices.append(self.device)

        def __exit__(self, *error):
            devices.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    return devices


@pytest.fixture
def noted(current, monkeypatch):
    """Give the calls of torch's streams, events and graphs, each with the device that was current then."""
    asked = []

    def note(place, name, result=None):
        def asking(*args, **kwargs):
            asked.append((name, current[-1], kwargs))
            return result if result is not None else MagicMock(name=name)

        monkeypatch.setattr(place, name, asking)

    stream = MagicMock(name="stream", cuda_stream=7)
    for name in ("current_stream", "Stream"):
        note(torch.cuda, name, stream)
    for name in ("stream", "graph", "graph_pool_handle", "Event"):
        note(torch.cuda, name)
    graph = MagicMock(name="CUDAGraph")
    note(graph, "replay")
    note(torch.cuda, "CUDAGraph", graph)
    return asked


@pytest.fixture
def runner():
    """Make a runner of a small model, on the CPU."""
    model = tiny()
    return Driver(model, prompts(model, (4,)), [GREEDY]).runner


def arguments(operator, tensor):
    """Make arguments by the schema of an operator, without optional ones."""
    made = {"Tensor": tensor, "int": 1, "float": 1.0, "bool": False, "str": ""}
    return [made.get(str(argument.type)) for argument in operator.registered._schema.arguments]


@pytest.fixture(params=sorted(dispatch.OPERATORS))
def operator(request, monkeypatch):
    """Give each operator, as if its kernel served everything."""
    operator = dispatch.OPERATORS[request.param]
    operators.change(monkeypatch, operator, missing=lambda device: None, why_not=lambda *args: None)
    return operator


def test_a_kernel_is_launched_on_the_device_of_its_tensors(operator, current, monkeypatch):
    def kernel(*args):
        raise KeyError(args[0].device, current[-1])

    operators.change(monkeypatch, operator, run=kernel)
    with pytest.raises(KeyError) as raised:
        operator.registered(*arguments(operator, Away()))
    assert raised.value.args == (SECOND, SECOND) and current == [FIRST]


def test_on_a_cpu_no_device_is_asked_for(operator, monkeypatch):
    def kernel(*args):
        raise KeyError(args[0].device)

    operators.change(monkeypatch, operator, run=kernel)
    monkeypatch.setattr(dispatch, "device_guard", None)
    with pytest.raises(KeyError, match="cpu"):
        operator.registered(*arguments(operator, torch.zeros(2, 2)))


def test_streams_events_and_captures_of_a_runner(runner, current, noted, monkeypatch):
    """Run `warm_up` and `decode` of a runner that believes to be on the second GPU."""
    stepped = []
    monkeypatch.setattr(runner, "_step", lambda rows, **shortcuts: stepped.append((rows, current[-1])))
    monkeypatch.setattr(runner._prompts, "run", lambda: stepped.append(("prefill", current[-1])))
    monkeypatch.setattr(runner, "_result", lambda rows: Copied())
    monkeypatch.setattr(runner, "device", SECOND)
    runner._captures = True
    runner.warm_up()
    runner.decode(1)
    assert {device for _, device, _ in noted} | {device for _, device in stepped} == {SECOND}
    assert {"Stream", "current_stream", "graph", "replay", "Event"} <= {name for name, _, _ in noted}
    # A capture without a stream takes one of torch's own, which lies on the device of the first capture of all.
    side = torch.cuda.Stream()
    assert [options["stream"] is side for name, _, options in noted if name == "graph"] == [True] * (len(stepped) // 2)
    assert stepped and current == [FIRST]


def test_changes_of_slots(runner, current, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "slots", SimpleNamespace(apply=lambda step, params: seen.append(current[-1])))
    monkeypatch.setattr(runner, "device", SECOND)
    runner.apply(SimpleNamespace(freed_slots=[0], prefills=[], admitted=[], new_pages=[], moves=[]), {}, {})
    assert seen == [SECOND] and current == [FIRST]


def test_the_native_library_s_calls(current, noted, monkeypatch):
    """Launch the persistent step in its device's stream, and ask there for a block's shared memory."""
    seen = []

    def answer(*args):  # a call and its stream, or a length and room for words
        seen.append((args[1], current[-1]))
        return 0

    names = ("clvp_fast_persistent_decode_cuda", "clvp_fast_log_mel_cuda_missing")
    monkeypatch.setattr(native, "library", lambda part: SimpleNamespace(**dict.fromkeys(names, answer)))
    step = object.__new__(PersistentStep)
    step.decoder = SimpleNamespace(device=SECOND)
    step._launch(native.PersistentDecodeCall())
    assert importlib.import_module("clvp_fast.ops.log_mel")._short_of_memory.__wrapped__(1024, SECOND) is None
    assert seen[0] == (7, SECOND) and seen[1][1] == SECOND and noted[0][:2] == ("current_stream", SECOND)
    assert current == [FIRST]
