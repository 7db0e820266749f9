"""The persistent decode step on its PTX, a few blocks in a random order, against `PagedDecoder.step`."""

from dataclasses import replace

import pytest
import torch

from clvp_fast.engine.decoder import PagedDecoder
from tests.csrc.persistent_scene import (
    DTYPES,
    PAGE_SIZE,
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

# Hidden and inner width: lanes, warps and blocks without work (three slices leave one of 16 warps), and rows of several
# batches.
SHAPES = [(128, 512), (64, 8), (192, 320), (1088, 520), (64, 1288)]
# A key alone; as many as fill four parts; more; a first token behind a prompt; others, some in three parts. The
# new token's place is each of the eight that a lane holds.
FEW_AND_MANY = [(0, -1), (380, 1), (534, 1), (0, 0), (5, -1), (9, -1), (13, -1), (273, -1)]


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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(run, dtype, sizes, count):
    scene = scene_of_width(*sizes, ROWS[:count], dtype)
    hold_to_the_decoder(lambda scene: run(scene, seed=sizes[0], blocks=5), scene)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("sizes", [(2048, 8), (64, 2048)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_products(run, dtype, sizes, count):
    """Let every thread have all channels that it has room for, in each compiled form.

    Two such layers are too much for bfloat16, whose error would be as large as what is compared.
    """
    scene = scene_of_width(*sizes, ROWS[:count], dtype, layers=1 + (dtype == torch.float16))
    hold_to_the_decoder(lambda scene: run(scene, blocks=5), scene)


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


@pytest.mark.parametrize("rows", [FEW_AND_MANY[:4], FEW_AND_MANY[4:], *([row] for row in FEW_AND_MANY)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_and_many_keys(run, dtype, rows):
    """Let also the first token of the vocabulary and the first page of the pool be used."""
    sizes = dict(hidden_size=64, num_attention_heads=1, n_inner=72, num_hidden_layers=1)
    scene = scene_of(decoder_of(dtype, **sizes), rows)
    scene["tokens"][0] = 0
    hold_to_the_decoder(run, with_first_page(scene))


@pytest.mark.parametrize("count", [1, 4])
def test_scores_that_no_power_of_two_can_hold(run, count):
    """Exponentials of scores without the largest subtracted would be infinite."""
    sizes = dict(hidden_size=64, num_attention_heads=1, n_inner=72, num_hidden_layers=1)
    decoder = decoder_of(torch.float16, **sizes)
    with torch.no_grad():
        decoder.model.model.decoder.layers[0].attn.q_proj.weight.mul_(100)
    hold_to_the_decoder(run, scene_of(PagedDecoder(decoder.model), ROWS[:count]))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_far_from_zero(run, dtype, count):
    """Let the threads without a channel add nothing to a variance: zero is far from the mean."""
    decoder = decoder_of(dtype, hidden_size=64, num_attention_heads=1, n_inner=72, num_hidden_layers=1)
    with torch.no_grad():
        decoder.model.model.decoder.input_embeds_layer.weight.add_(8)
    hold_to_the_decoder(run, scene_of(PagedDecoder(decoder.model), ROWS[:count]))


def with_first_page(scene):
    """Return the scene with the last row's new token in the pool's first page."""
    table, data = scene["block_table"], scene["pages"].data
    page = table[-1, scene["seq_lens"][-1] // PAGE_SIZE].item()
    renamed = torch.arange(data.shape[2], dtype=table.dtype)
    renamed[0], renamed[page] = page, 0
    data.copy_(data[:, :, renamed.long()])
    return scene | {name: renamed[scene[name].long()] for name in ("block_table", "prefix_table")}


@pytest.mark.parametrize("prefix", [80, 96])
@pytest.mark.parametrize("stored", [32, 200])
def test_a_full_table(run, monkeypatch, stored, prefix):
    hold_to_the_decoder(run, full_table(stored, monkeypatch, prefix))


@pytest.mark.parametrize("rows", [[(40, 1)], [(40, 1), (9, 0)]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_out_of_their_tables(run, dtype, rows):
    """Spoil only the row of a bad token or position, and leave out keys on a page that does not exist."""
    decoder = decoder_of(dtype, hidden_size=64, num_attention_heads=1, n_inner=72, num_hidden_layers=1)
    scene, far = scene_of(decoder, rows), scene_of(decoder, [(decoder.model.config.max_position_embeddings - 1, -1)])
    right = run(with_pages(scene))[1]
    tokens = scene["tokens"].clone()
    tokens[0] = decoder.vocab_size
    found = run(with_pages(scene) | {"tokens": tokens})[1]
    assert found[0].isnan().all() and torch.equal(found[1:], right[1:])
    for page in (-1, scene["pages"].data.shape[2]):
        for name, missing in (("block_table", (0, 1)), ("block_table", 0), ("prefix_table", 1)):
            table = scene[name].clone()
            table[missing] = page
            found = run(with_pages(scene) | {name: table})[1]
            assert found[0].isfinite().all() and not torch.equal(found[0], right[0])
            assert torch.equal(found[1:], right[1:])
    assert run(far)[1][0].isnan().all()


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
