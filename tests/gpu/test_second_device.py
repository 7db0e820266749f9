"""On a machine with two GPUs: what lies on the second is computed there, while the first is torch's current one."""

import pytest
import torch

from tests.csrc.persistent_scene import decoder_of, hold_to_the_decoder, scene_of
from tests.gpu import test_persistent_on_gpu as persistent
from tests.gpu.test_runner_on_gpu import driver_of, replayed_alone, run
from tests.kernels import test_capture as calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]


@pytest.fixture(autouse=True)
def first_is_current():
    with torch.cuda.device(0):
        yield
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("make", calls.CALLS, ids=[make.__name__ for make in calls.CALLS])
@torch.no_grad()
def test_every_operator(monkeypatch, make):
    found = []
    for device in ("cuda:0", "cuda:1"):
        monkeypatch.setattr(calls, "DEVICE", device)
        found.append(make()[1]())
        assert found[-1].device == torch.device(device)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert torch.equal(found[0].cpu(), found[1].cpu())
    else:
        torch.testing.assert_close(found[0].cpu(), found[1].cpu())


def test_captured_steps_of_engines_on_both():
    """Capture on the second device after the first, and replay the same steps there."""
    tokens = []
    for device, capture in (("cuda:0", True), ("cuda:1", True), ("cuda:1", False)):
        driver = driver_of(device=device, capture=capture, deterministic=True, states=True)
        driver.runner.warm_up()
        if capture:
            replayed_alone(driver.runner)
        for slot in range(3):
            driver.admit(slot, slot)
        tokens.append(run(driver))
        assert all(states.device == torch.device(device) for _, states in tokens[-1].values())
    for name, (drawn, states) in tokens[1].items():
        assert drawn == tokens[2][name][0] and torch.equal(states, tokens[2][name][1])


def test_the_persistent_step(monkeypatch):
    monkeypatch.setattr(persistent, "DEVICE", "cuda:1")
    hold_to_the_decoder(persistent.run, scene_of(decoder_of(torch.bfloat16)))
