"""The persistent decode step on its PTX, a few blocks in a random order, against `PagedDecoder.step`."""

import ctypes
from dataclasses import replace

import pytest
import torch

from clvp_fast.engine.persistent import PersistentStep
from tests.csrc.test_persistent_decode import (
    GUARD,
    ROWS,
    decoder_of,
    full_table,
    hold_to_the_decoder,
    scene_of,
    tensors,
    with_pages,
    with_row,
)
from tests.ptx.mutants import Mutant, mutants
from tests.ptx.regions import Fault

# Hidden and inner width: lanes, warps and blocks without work, and rows of several batches.
SHAPES = [(128, 512), (64, 8), (192, 320), (576, 72)]

SMALL = dict(hidden_size=64, num_attention_heads=1, n_inner=72, num_hidden_layers=1)


class Executed(PersistentStep):
    """On host memory, by `blocks` blocks of the PTX."""

    def __init__(self, launcher, *made_of, blocks=4):
        self.launcher, self.blocks = launcher, blocks
        super().__init__(*made_of)

    def _require(self):
        pass

    def _workspace_bytes(self, call):
        return self.launcher.library.clvp_fast_persistent_decode_workspace(call) + GUARD

    def _launch(self, call):
        # NaN: every element is written, and nothing is left over from the step before.
        self._workspace[256:] = 0xFF
        for result, width in ((call.hidden, call.hidden_size), (call.logits, call.vocab_size)):
            ctypes.memset(result, 0xFF, 2 * call.num_candidates * width)
        assert self.launcher.call("clvp_fast_persistent_decode_cuda", call, self.blocks) == 0


@pytest.fixture
def run(launcher, monkeypatch):
    """Do `run(scene, seed, blocks)`: hidden states and logits; new keys and values are in the scene's pages."""

    @torch.inference_mode()
    def step(scene, seed=0, blocks=4):
        monkeypatch.setattr(launcher.options, "seed", seed)
        tables = scene["block_table"].shape[1], scene["prefix_table"].shape[1]
        return Executed(launcher, scene["decoder"], scene["pages"], *tables, blocks=blocks).step(*tensors(scene))

    return step


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_equal_the_decoder_s(run, dtype, count):
    hold_to_the_decoder(lambda scene: run(scene, seed=count), scene_of(decoder_of(dtype), ROWS[:count]))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_shapes(run, sizes, count):
    hidden, inner = sizes
    changes = dict(hidden_size=hidden, num_attention_heads=hidden // 64, n_inner=inner, num_hidden_layers=1)
    scene = scene_of(decoder_of(torch.float16, vocab_size=301, **changes), ROWS[:count])
    hold_to_the_decoder(lambda scene: run(scene, seed=hidden, blocks=5), scene)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_bits_do_not_depend_on_the_order_of_blocks(run, count):
    """Nor on their number."""
    scene = scene_of(decoder_of(torch.bfloat16, **SMALL), ROWS[:count])
    first = run(with_pages(scene))
    for seed in range(1, 20):
        again = run(with_pages(scene), seed=seed, blocks=4 + seed % 5)
        active = scene["seq_lens"] >= 0
        for mine, other in zip(again, first, strict=True):
            assert torch.equal(mine[active], other[active])


def test_a_row_alone(run):
    scene = scene_of(decoder_of(torch.bfloat16, **SMALL))
    together = run(with_pages(scene))
    for n, (own, _) in enumerate(ROWS):
        alone = run(with_row(with_pages(scene), n), seed=n)
        if own >= 0:
            assert torch.equal(alone[0][0], together[0][n]) and torch.equal(alone[1][0], together[1][n])


@pytest.mark.parametrize("stored", [32, 200])
def test_a_full_table(run, monkeypatch, stored):
    hold_to_the_decoder(run, full_table(stored, monkeypatch))


def is_seen(run, scene, right, seed):
    """Tell whether a fault stops the launch, or changes its results."""
    try:
        found = run(with_pages(scene), seed=seed)
    except Fault:
        return True
    active = scene["seq_lens"] >= 0
    return any(not torch.equal(mine[active], other[active]) for mine, other in zip(found, right, strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_each_wait_of_all_blocks_is_needed(run, launcher, monkeypatch, count):
    """Let a block look once, and go on."""
    scene = scene_of(decoder_of(torch.bfloat16, **SMALL), ROWS[:count])
    right = run(with_pages(scene))
    program = launcher.reports[-1].program
    waits = [mutant for mutant in mutants(program) if mutant.what == "wait removed"]
    assert len(waits) == 5
    for mutant in waits:
        monkeypatch.setattr(launcher.options, "swap", (program, mutant.build()))
        assert any(is_seen(run, scene, right, seed) for seed in range(3)), str(mutant.instruction)


def test_the_order_that_a_wait_makes_is_needed(run, launcher, monkeypatch):
    """A counter that is neither released nor acquired."""
    scene = scene_of(decoder_of(torch.bfloat16, **SMALL), ROWS[:1])
    right = run(with_pages(scene))
    program = launcher.reports[-1].program
    relaxed = [mutant for mutant in mutants(program) if mutant.what == "order relaxed"]
    assert len(relaxed) == 10
    for mutant in relaxed:
        monkeypatch.setattr(launcher.options, "swap", (program, mutant.build()))
        assert any(is_seen(run, scene, right, seed) for seed in range(3)), str(mutant.instruction)


def test_written_memory_may_not_be_read_as_constant(run, launcher, monkeypatch):
    """Load the residual, which other blocks wrote, by ld.global.nc."""
    scene = scene_of(decoder_of(torch.bfloat16, **SMALL), ROWS[:1])
    run(with_pages(scene))
    program = launcher.reports[-1].program
    found = [
        (number, place, i)
        for number, block in enumerate(program.kernel.blocks)
        for place, i in enumerate(block.body)
        if i.op[:3] == ["ld", "global", "cg"] and number in launcher.reports[-1].blocks
    ]
    for number, place, i in found[:: max(1, len(found) // 5)]:
        changed = replace(i, op=["ld", "global", "nc", *i.op[3:]])
        fault = Mutant(program, number, place, "non-coherent", changed)
        monkeypatch.setattr(launcher.options, "swap", (program, fault.build()))
        with pytest.raises(Fault, match="non-coherent"):
            run(with_pages(scene))
