"""The persistent decode step on its PTX, a few blocks in a random order, against `PagedDecoder.step`."""

from dataclasses import replace

import pytest
import torch

from tests.csrc.persistent_scene import (
    DTYPES,
    ROWS,
    OnHost,
    decoder_of,
    full_table,
    hold_rows_to_themselves,
    hold_to_the_decoder,
    made_of,
    same_bits,
    scene_of,
    scene_of_width,
    tensors,
    with_pages,
)
from tests.ptx.mutants import Mutant, mutants
from tests.ptx.regions import Fault

# Hidden and inner width: lanes, warps and blocks without work, and rows of several batches.
SHAPES = [(128, 512), (64, 8), (192, 320), (576, 72)]


class Executed(OnHost):
    """By the blocks of the PTX."""

    def __init__(self, launcher, scene, blocks, seed):
        self.launcher = launcher
        workspace_bytes = launcher.library.clvp_fast_persistent_decode_workspace
        super().__init__(workspace_bytes, *made_of(scene), blocks=blocks, seed=seed)

    def _run(self, call):
        self.launcher.options.seed = self.seed
        return self.launcher.call("clvp_fast_persistent_decode_cuda", call, self.blocks)


@pytest.fixture
def run(launcher, monkeypatch):
    """Do `run(scene, seed, blocks)`: hidden states and logits; new keys and values are in the scene's pages."""
    monkeypatch.setattr(launcher.options, "seed", 0)  # and what it was again, behind the test

    @torch.inference_mode()
    def step(scene, seed=0, blocks=4):
        return Executed(launcher, scene, blocks, seed).step(*tensors(scene))

    return step


def small(count):
    """Give a scene of so many rows over the smallest decoder."""
    sizes = dict(hidden_size=64, num_attention_heads=1, n_inner=72, num_hidden_layers=1)
    return scene_of(decoder_of(torch.bfloat16, **sizes), ROWS[:count])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_equal_the_decoder_s(run, dtype, count):
    hold_to_the_decoder(lambda scene: run(scene, seed=count), scene_of(decoder_of(dtype), ROWS[:count]))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_shapes(run, sizes, count):
    scene = scene_of_width(*sizes, ROWS[:count])
    hold_to_the_decoder(lambda scene: run(scene, seed=sizes[0], blocks=5), scene)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("sizes", [(2048, 8), (64, 2048)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_products(run, dtype, sizes, count):
    """Let every thread have all channels that it has room for, in each compiled form."""
    hold_to_the_decoder(lambda scene: run(scene, blocks=5), scene_of_width(*sizes, ROWS[:count], dtype))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_bits_do_not_depend_on_the_order_of_blocks(run, count):
    """Nor on their number."""
    scene = small(count)
    first = run(with_pages(scene))
    for seed in range(1, 20):
        assert same_bits(scene, run(with_pages(scene), seed=seed, blocks=4 + seed % 5), first), seed


def test_a_row_alone(run):
    scene = small(4)
    hold_rows_to_themselves(run, scene, run(with_pages(scene)))


@pytest.mark.parametrize("stored", [32, 200])
def test_a_full_table(run, monkeypatch, stored):
    hold_to_the_decoder(run, full_table(stored, monkeypatch))


def is_seen(run, scene, right, seed):
    """Tell whether a fault stops the launch, or changes its results."""
    try:
        return not same_bits(scene, run(with_pages(scene), seed=seed), right)
    except Fault:
        return True


@pytest.mark.parametrize(
    ("what", "places", "count"),
    [("wait removed", 5, 1), ("wait removed", 5, 2), ("order relaxed", 10, 1)],
)
def test_all_that_orders_blocks_is_needed(run, launcher, monkeypatch, what, places, count):
    """Let a block look once at the counter and go on; or let the counter be neither released nor acquired."""
    scene = small(count)
    right = run(with_pages(scene))
    program = launcher.reports[-1].program
    faults = [mutant for mutant in mutants(program) if mutant.what == what]
    assert len(faults) == places
    monkeypatch.setattr(launcher, "reports", [])  # what runs with a fault is no part of the coverage
    for fault in faults:
        monkeypatch.setattr(launcher.options, "swap", (program, fault.build()))
        assert any(is_seen(run, scene, right, seed) for seed in range(3)), str(fault.instruction)


def test_written_memory_may_not_be_read_as_constant(run, launcher, monkeypatch):
    """Load the residual, which other blocks wrote, by ld.global.nc."""
    scene = small(1)
    run(with_pages(scene))
    program = launcher.reports[-1].program
    found = [
        (number, place, i)
        for number, block in enumerate(program.kernel.blocks)
        for place, i in enumerate(block.body)
        if i.op[:3] == ["ld", "global", "cg"] and number in launcher.reports[-1].blocks
    ]
    monkeypatch.setattr(launcher, "reports", [])
    for number, place, i in found[:: max(1, len(found) // 5)]:
        changed = replace(i, op=["ld", "global", "nc", *i.op[3:]])
        fault = Mutant(program, number, place, "non-coherent", changed)
        monkeypatch.setattr(launcher.options, "swap", (program, fault.build()))
        with pytest.raises(Fault, match="non-coherent"):
            run(with_pages(scene))
