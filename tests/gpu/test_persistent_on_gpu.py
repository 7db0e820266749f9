"""The persistent decode step on a GPU: the decoder's numbers, the same bits every time, eager and captured."""

import copy

import pytest
import torch

from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.engine.persistent import PersistentStep
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.sampling_params import SamplingParams
from tests.csrc.persistent_scene import (
    DTYPES,
    ROWS,
    decoder_of,
    full_table,
    hold_rows_to_themselves,
    hold_to_the_decoder,
    scene_of,
    scene_of_width,
    tensors,
    with_pages,
)
from tests.engine.small_engine import make, request
from tests.gpu.test_runner_on_gpu import driver_of, replayed_alone

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FULL = dict(hidden_size=1024, num_attention_heads=16, vocab_size=8194)


def on_gpu(scene):
    """Return the scene on a GPU: its step, its arguments, and its pages."""
    decoder = PagedDecoder(copy.deepcopy(scene["decoder"].model).to(DEVICE))
    pages = decoder.pages(scene["pages"].data.shape[2], scene["pages"].page_size)
    pages.data.copy_(scene["pages"].data)
    arguments = [tensor.to(DEVICE) for tensor in tensors(scene)]
    return PersistentStep(decoder, pages, arguments[2].shape[1], arguments[3].shape[1]), arguments, pages


def run(scene):
    """Run one step there and bring it back; the scene's pages then equal those on the GPU."""
    step, arguments, pages = on_gpu(scene)
    with torch.inference_mode():
        hidden, logits = step.step(*arguments)
    scene["pages"].data.copy_(pages.data)
    return hidden.cpu(), logits.cpu()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_equal_the_decoder_s(dtype, count):
    hold_to_the_decoder(run, scene_of(decoder_of(dtype), ROWS[:count]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_of_full_width(dtype):
    rows = [(499, 0), (250, 1), (0, -1), (128, 1)]
    hold_to_the_decoder(run, scene_of(decoder_of(dtype, num_hidden_layers=3, **FULL), rows, (62, 400)))


@pytest.mark.parametrize("sizes", [(64, 8), (1088, 1608), (2048, 520), (320, 8192)])
def test_any_width(sizes):
    hold_to_the_decoder(run, scene_of_width(*sizes, ROWS[:2]))


def test_a_full_table(monkeypatch):
    hold_to_the_decoder(run, full_table(32, monkeypatch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_the_row_alone(dtype):
    scene = scene_of(decoder_of(dtype, num_hidden_layers=3, **FULL))
    hold_rows_to_themselves(lambda one, seed: run(one), scene, run(with_pages(scene)))


@torch.no_grad()
def test_a_thousand_launches_have_the_same_bits():
    """Launch often, as a faulty barrier would show sooner or later."""
    step, arguments, _ = on_gpu(scene_of(decoder_of(torch.bfloat16, num_hidden_layers=6, **FULL)))
    active = arguments[1] >= 0
    hidden, logits = step.step(*arguments)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again = step.step(*arguments)
        different += (again[0][active] != hidden[active]).sum() + (again[1][active] != logits[active]).sum()
    assert int(different) == 0


@torch.no_grad()
def test_a_captured_step_sees_new_inputs():
    scene = scene_of(decoder_of(torch.bfloat16, num_hidden_layers=3, **FULL))
    step, arguments, _ = on_gpu(scene)
    step.step(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.step(*arguments)
    for token in (3, 200):
        arguments[0].fill_(token)
        for result in captured:
            result.fill_(torch.nan)
        graph.replay()
        replayed = [result.clone() for result in captured]
        eager = step.step(*arguments)
        active = arguments[1] >= 0
        for mine, other in zip(replayed, eager, strict=True):
            assert torch.equal(mine[active], other[active]) and mine[active].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_runner_captures_it(dtype):
    """Run candidates alone and in fours, captured and eager."""
    found = []
    for capture in (True, False):
        driver = driver_of(dtype, capture=capture, persistent=True, max_batch=4, states=True)
        driver.runner.warm_up()
        if capture:
            replayed_alone(driver.runner)
        else:
            driver.runner._rows_of = lambda num_slots: min(size for size in (1, 2, 4) if size >= num_slots)
            driver.runner.slots.shortcuts = lambda rows: {}
        for slot in range(4):
            driver.admit(slot, slot, slot)
            driver.step()
        found.append(driver.run())
    assert found[0] == found[1]
    assert any(len(tokens) > 4 for tokens in found[0].values())


def test_the_engine_takes_it_for_few_candidates(parts, monkeypatch):
    """Draw the same candidates every time, by one launch while there are up to four of them."""
    model, processor = parts
    engine = make((copy.deepcopy(model).to("cuda", torch.bfloat16), processor), max_batch=4, persistent=True)
    steps, launched = [], []
    decode, launch = Runner.decode, PersistentStep._launch
    monkeypatch.setattr(Runner, "decode", lambda self, num_slots: steps.append(num_slots) or decode(self, num_slots))
    monkeypatch.setattr(
        PersistentStep, "_launch", lambda self, call: launched.append(call.num_candidates) or launch(self, call)
    )
    params = SamplingParams(num_candidates=3, max_new_tokens=12, seed=1)
    results = [next(engine.generate(request(0), params)) for _ in range(2)]
    assert steps and launched == steps
    assert results[0].error is None and (results[0].codes == results[1].codes).all()
