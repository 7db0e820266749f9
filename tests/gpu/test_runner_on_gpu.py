"""The runner's captured steps: the bits of eager ones in all that they write; nothing is allocated or left behind."""

import pytest
import torch

from tests.engine.test_decoder import prompts, tiny
from tests.engine.test_mixes import Setting, same_bits
from tests.engine.test_runner import VARIED, Driver, stopping

pytestmark = pytest.mark.gpu
LENGTHS = (4, 23, 9, 40, 15)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = pytest.param(
    torch.float8_e4m3fn,
    marks=pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
        reason="pages of float8 need compute capability 8.9 or newer",
    ),
)


def driver_of(dtype=torch.float32, params=VARIED, device="cuda", **options):
    model = stopping(tiny())
    prompt_list = [prompt.to(device, dtype) for prompt in prompts(model, LENGTHS)]
    return Driver(model.to(device, dtype), prompt_list, params, **options)


def replayed_alone(runner):
    """Fail on every later step that is not a replay."""

    def eager(*args, **options):
        raise AssertionError("a step ran eagerly behind warm_up()")

    runner._step = eager


def run(driver):
    """Run to the end, and return each candidate's tokens and the states behind them."""
    found = {}
    while driver.held:
        held = {slot: (key, candidate) for slot, (key, candidate, *_) in driver.held.items()}
        driver.step()
        for slot, name in held.items():
            if slot not in driver.held:
                tokens = driver.tokens[name]
                found[name] = tokens, driver.runner.states(slot, len(tokens))
    return found


@pytest.mark.parametrize("page_dtype", [None, FLOAT8], ids=["own pages", "float8 pages"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_steps_equal_eager_ones(dtype, deterministic, page_dtype):
    """Over admissions, moves and steps of every bucket; with the same number of rows, so that products are the same."""
    results = []
    for capture in (True, False):
        options = dict(states=True, capture=capture, deterministic=deterministic, page_dtype=page_dtype)
        driver = driver_of(dtype, **options)
        runner, progress = driver.runner, []
        runner.warm_up(lambda *counts, progress=progress: progress.append(counts))
        sizes = [1, 2, 4, 6]
        assert progress == ([(count, len(sizes)) for count in range(1, len(sizes) + 1)] if capture else [])
        if capture:
            replayed_alone(runner)
        else:
            runner._rows_of = lambda num_slots, sizes=sizes: min(size for size in sizes if size >= num_slots)
            runner.slots.shortcuts = lambda rows: {}
        for slot in range(6):
            driver.admit(slot, slot % 5, slot)
            driver.step()
        first, last = min(driver.held), max(driver.held)
        driver.free(first)
        driver.move(last, first)
        driver.step()
        results.append(run(driver))
    captured, eager = results
    assert captured.keys() == eager.keys() and len(captured) > 1
    for name, (tokens, states) in captured.items():
        assert tokens == eager[name][0] and torch.equal(states, eager[name][1]), name
    assert len({len(tokens) for tokens, _ in captured.values()}) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_shortcuts_change_no_token(dtype):
    """Compare eager steps, which take numbers in place of tensors, with captured steps, which take none."""
    tokens = []
    for capture in (True, False):
        driver = driver_of(dtype, capture=capture, deterministic=True)
        driver.runner.warm_up()
        for slot, key in enumerate((0, 2, 1)):
            driver.admit(slot, key)
        tokens.append(driver.run())
    assert tokens[0] == tokens[1]


def test_replays_allocate_nothing():
    """Count allocations on the device, also in a step that enters pages, which only copies the changes."""
    driver = driver_of()
    driver.runner.warm_up()
    replayed_alone(driver.runner)
    for slot in range(3):
        driver.admit(slot, slot)
    driver.step()
    torch.cuda.synchronize()

    def allocations():
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before, memory = allocations(), torch.cuda.memory_allocated()
    for _ in range(5):
        driver.start()
    assert allocations() == before and torch.cuda.memory_allocated() == memory
    for _ in range(20):
        driver.start()
    torch.cuda.synchronize()
    assert allocations() > before, "the count would stay where it is whatever is allocated"
    assert torch.cuda.memory_allocated() == memory


def test_warming_up_leaves_no_trace():
    """Run steps over free slots: the state stays as it was, and no page is written."""
    driver = driver_of()
    runner = driver.runner
    runner.pages.data.fill_(torch.nan)
    state, arrivals = runner.slots._arena.clone(), runner._arrivals.clone()
    runner.warm_up()
    torch.cuda.synchronize()
    assert torch.equal(runner.slots._arena, state) and torch.equal(runner._arrivals, arrivals)
    assert runner.pages.data.isnan().all()


def test_results_are_read_late():
    """Copy results before the next replay, which writes to the same place."""
    expected = driver_of(capture=False, deterministic=True)
    expected.admit(0, 2)
    tokens = expected.run()[2, 0]
    driver = driver_of(deterministic=True)
    driver.runner.warm_up()
    driver.admit(0, 2)
    handles = [driver.start() for _ in range(len(tokens))]
    assert [int(driver.runner.tokens(handle)[0]) for handle in handles] == tokens


def test_weights_that_change_in_place_are_seen():
    driver = driver_of(params=[VARIED[1]] * 5)
    runner = driver.runner
    runner.warm_up()
    with torch.no_grad():
        runner.decoder.model.lm_head.bias[7] = 1e4
    driver.admit(0, 0)
    driver.step()
    assert driver.tokens[0, 0] == [7]


@pytest.mark.parametrize("page_dtype", [None, FLOAT8], ids=["own pages", "float8 pages"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_company(dtype, page_dtype, happened):
    """Random mixes on captured steps: the bits that a request has alone."""
    options = dict(deterministic=True, max_batch=20, page_dtype=page_dtype)
    setting, finished = Setting(dtype, device="cuda", **options), 0
    for seed in range(8):
        for number, job in setting.mixed(seed):
            assert same_bits(job, setting.alone(number)), f"request {number} in mix {seed}"
            finished += 1
    assert finished > 24 and happened["preempted"] > 0 and happened["moved"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_slots(dtype):
    """Compare two numbers of slots, of which one makes each product twice in a step."""
    settings = [Setting(dtype, device="cuda", max_batch=max_batch) for max_batch in (6, 300)]
    for number in range(4):
        assert same_bits(*(setting.alone(number) for setting in settings)), f"request {number}"


def test_parameters_that_moved_are_noticed():
    driver = driver_of()
    driver.runner.warm_up()
    weight = driver.runner.decoder.model.lm_head.weight
    before, weight.data = weight.data, weight.data.clone()
    assert before.data_ptr() != weight.data_ptr()
    driver.admit(0, 0)
    with pytest.raises(RuntimeError, match="moved after warm_up"):
        driver.start()


def test_warm_up_while_candidates_run_is_refused():
    driver = driver_of()
    driver.admit(0, 0)
    driver.step()
    with pytest.raises(RuntimeError, match="while no candidate holds a slot"):
        driver.runner.warm_up()
