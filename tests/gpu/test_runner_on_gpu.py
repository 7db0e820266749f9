"""The runner's captured steps: the bits of eager ones, and nothing allocated."""

import pytest
import torch

from tests.engine.test_decoder import prompts, tiny
from tests.engine.test_runner import VARIED, Driver

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_equal_eager_ones(dtype, deterministic):
    """Over admissions and steps of several buckets; with the same number of rows, so that the products are the same."""
    model = tiny().to("cuda", dtype)
    prompt_list = [prompt.to("cuda", dtype) for prompt in prompts(tiny(), (4, 23, 9, 40, 15))]
    results = []
    for capture in (True, False):
        driver = Driver(model, prompt_list, VARIED, latents=True, capture=capture, deterministic=deterministic)
        runner, progress = driver.runner, []
        runner.warm_up(lambda *counts, progress=progress: progress.append(counts))
        sizes = [6] if deterministic else [1, 2, 4, 6]
        assert progress == ([(count, len(sizes)) for count in range(1, len(sizes) + 1)] if capture else [])
        if not capture:
            runner._rows_of = lambda num_slots, sizes=sizes: min(size for size in sizes if size >= num_slots)
            runner.slots.shortcuts = lambda rows: {}
        for slot in range(6):
            driver.admit(slot, slot % 5, slot)
            driver.step()
        kept = [runner.latents(slot, 1).clone() for slot in sorted(driver.held)]
        results.append((driver.run(), kept))
    (captured, latents), (eager, eager_latents) = results
    assert captured == eager
    assert all(torch.equal(*pair) for pair in zip(latents, eager_latents, strict=True))


def test_replays_allocate_nothing():
    model = tiny().to("cuda")
    driver = Driver(model, [prompt.to("cuda") for prompt in prompts(tiny())], VARIED)
    driver.runner.warm_up()
    driver.admit(0, 0)
    driver.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        driver.start()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_parameters_that_moved_are_noticed():
    model = tiny().to("cuda")
    driver = Driver(model, [prompt.to("cuda") for prompt in prompts(tiny())], VARIED)
    driver.runner.warm_up()
    weight = model.speech_decoder_model.lm_head.weight
    before, weight.data = weight.data, weight.data.clone()
    assert before.data_ptr() != weight.data_ptr()
    driver.admit(0, 0)
    with pytest.raises(RuntimeError, match="moved after warm_up"):
        driver.start()


def test_warm_up_while_candidates_run_is_refused():
    driver = Driver(tiny().to("cuda"), [prompt.to("cuda") for prompt in prompts(tiny())], VARIED)
    driver.admit(0, 0)
    driver.step()
    with pytest.raises(RuntimeError, match="while no candidate holds a slot"):
        driver.runner.warm_up()
