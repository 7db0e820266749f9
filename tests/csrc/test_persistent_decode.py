"""The persistent decode step's blocks, run on the CPU by `persistent_emulator.cpp`, against `PagedDecoder.step`."""

import ctypes
import functools

import pytest
import torch

from clvp_fast import native
from clvp_fast.engine import runner
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.engine.persistent import PersistentStep, unserved
from clvp_fast.engine.sampling_params import SamplingParams
from tests.csrc import compiled
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
    scene_of,
    scene_of_width,
    tensors,
    with_pages,
)
from tests.engine.test_decoder import prompts, tiny
from tests.engine.test_runner import Driver, stopping


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    library = ctypes.CDLL(str(compiled.emulator("persistent_emulator.cpp", tmp_path_factory)))
    call, integer = ctypes.POINTER(native.PersistentDecodeCall), ctypes.c_int32
    library.emulate_persistent_decode.argtypes = [call, integer, integer, integer, ctypes.POINTER(ctypes.c_int64)]
    library.workspace_bytes.argtypes = [call]
    library.workspace_bytes.restype = ctypes.c_int64
    return library


class Emulated(OnHost):
    """By the blocks of the emulator.

    `waits` is how often all waited for all in the last step. With `skip` nobody waits the `skip`-th time.
    """

    def __init__(self, emulator, *made_of, blocks=3, seed=0, skip=-1):
        self.emulator, self.skip, self.waits = emulator, skip, 0
        super().__init__(emulator.workspace_bytes, *made_of, blocks=blocks, seed=seed)

    def _run(self, call):
        waits = ctypes.c_int64()
        code = self.emulator.emulate_persistent_decode(call, self.blocks, self.seed, self.skip, waits)
        self.waits = waits.value
        return code


@torch.inference_mode()
def emulated(emulator, scene, **options):
    step = Emulated(emulator, *made_of(scene), **options)
    return *step.step(*tensors(scene)), step.waits


def compare(emulator, scene, **options):
    hold_to_the_decoder(lambda ours: emulated(emulator, ours, **options), scene)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_equal_the_decoder_s(emulator, dtype, count):
    compare(emulator, scene_of(decoder_of(dtype), ROWS[:count]), seed=count)


@pytest.mark.parametrize("own", [0, 1, 31, 32, 127, 128, 300])
@pytest.mark.parametrize("prefix", [1, 100])
def test_any_length(emulator, own, prefix):
    """Give one block several rounds of parts."""
    decoder = decoder_of(torch.bfloat16, num_hidden_layers=1)
    compare(emulator, scene_of(decoder, [(own, 0), (3, -1)], [prefix]), blocks=1, seed=own)


@pytest.mark.parametrize(
    "sizes", [(64, 8), (1088, 1608), *(pytest.param(one, marks=pytest.mark.slow) for one in ((2048, 520), (320, 8192)))]
)
def test_any_width(emulator, sizes):
    """Use widths that leave lanes, warps or blocks without work, and that need several slices and batches of rows."""
    compare(emulator, scene_of_width(*sizes, ROWS[:2]), blocks=5)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_positions_and_biases(emulator, contiguous, bias):
    decoder = decoder_of(torch.bfloat16, contiguous_positions=contiguous)
    if not bias:
        for layer in decoder.model.model.decoder.layers:
            layer.attn.q_proj.bias = layer.attn.k_proj.bias = layer.attn.v_proj.bias = None
    compare(emulator, scene_of(decoder, [(0, 0), (7, 1)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_the_row_alone(emulator, dtype):
    """Vary the number of blocks, the order of threads, and the other rows."""
    scene = scene_of(decoder_of(dtype))
    together = emulated(emulator, with_pages(scene))[:2]
    for blocks, seed in ((1, 5), (2, 6), (8, 7)):
        found = emulated(emulator, with_pages(scene), blocks=blocks, seed=seed)[:2]
        assert all(torch.equal(mine, other) for mine, other in zip(found, together, strict=True))
    hold_rows_to_themselves(lambda one, seed: emulated(emulator, one, seed=seed)[:2], scene, together)


def test_all_wait_five_times_a_layer(emulator):
    for layers in (1, 3):
        decoder = decoder_of(torch.bfloat16, num_hidden_layers=layers)
        assert emulated(emulator, scene_of(decoder, ROWS[:1]))[2] == 5 * layers


@pytest.mark.parametrize("skip", range(10))
def test_every_wait_is_needed(emulator, skip):
    """Leave out each wait in turn: the emulator's order of blocks shows the fault."""
    scene = scene_of(decoder_of(torch.bfloat16))
    right = emulated(emulator, with_pages(scene))
    seen = [emulated(emulator, with_pages(scene), skip=skip, seed=seed) for seed in range(3)]
    assert any(not torch.equal(wrong[1][:2], right[1][:2]) for wrong in seen)


def test_ids_out_of_their_tables(emulator):
    """Spoil only the candidate of a bad token or position, and leave out keys on a page that does not exist."""
    decoder = decoder_of(torch.bfloat16)
    scene = scene_of(decoder, [(5, 1), (9, 0), (140, 0)])
    right = emulated(emulator, with_pages(scene))
    bad = with_pages(scene) | {"tokens": scene["tokens"].clone()}
    bad["tokens"][0] = 300
    found = emulated(emulator, bad)
    assert found[1][0].isnan().all() and torch.equal(found[1][1:], right[1][1:])
    for page in (-1, 10**6):
        missing = with_pages(scene) | {"block_table": scene["block_table"].clone()}
        missing["block_table"][2, 1] = page
        found = emulated(emulator, missing)
        assert torch.equal(found[1][:2], right[1][:2])
        assert found[1][2].isfinite().all() and not torch.equal(found[1][2], right[1][2])


@pytest.mark.parametrize("stored", [32, 33, 200])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_full_table(emulator, monkeypatch, blocks, stored):
    """Leave out a new token past its table: no page of the next row is written, and no query attends to it."""
    compare(emulator, full_table(stored, monkeypatch), blocks=blocks)


def test_a_new_token_without_a_page_is_left_out(emulator):
    """Leave it out as a stored token is: a row's first token then attends to nothing."""
    scene = scene_of(decoder_of(torch.bfloat16), [(0, -1), (5, 0)])
    right = emulated(emulator, with_pages(scene))
    other = with_pages(scene) | {"block_table": scene["block_table"].clone()}
    other["block_table"][0, 0] = -1
    before = other["pages"].data.clone()
    found = emulated(emulator, other)
    for mine, whole in zip(found[:2], right[:2], strict=True):
        assert torch.equal(mine[1], whole[1]) and mine[0].isfinite().all() and not torch.equal(mine[0], whole[0])
    changed = (other["pages"].data.view(torch.int16) != before.view(torch.int16)).nonzero()
    assert changed[:, 2].unique().tolist() == [scene["block_table"][1, 0]]


# Field: a value, and the code of csrc/clvp_fast.h that refuses it.
REFUSED = {
    "num_candidates": (5, -3),
    "num_layers": (0, -3),
    "hidden_size": (96, -3),
    "intermediate_size": (12, -3),
    "vocab_size": (0, -3),
    "page_size": (0, -3),
    "max_pages": (0, -3),
    "dtype": (native.FLOAT32, -4),
    "layers": (None, -1),
    "tokens": (None, -1),
    "prefix_lens": (None, -1),
    "head_weight": (1032, -2),
    "seq_lens": (1026, -2),
}


@pytest.mark.parametrize("field", REFUSED)
def test_calls_that_are_refused(emulator, field):
    scene = scene_of(decoder_of(torch.bfloat16), ROWS[:1])
    step = Emulated(emulator, *made_of(scene))
    value, code = REFUSED[field]

    def launch(call):
        setattr(call, field, value)
        assert emulator.emulate_persistent_decode(call, 1, 0, -1, ctypes.c_int64()) == code

    step._launch = launch
    step.step(*tensors(scene))


def test_tables_that_a_step_has_no_room_for(emulator):
    scene = scene_of(decoder_of(torch.bfloat16))
    step = Emulated(emulator, *made_of(scene))
    with pytest.raises(ValueError, match="1 to 4 candidates, not 5"):
        step.step(torch.zeros(5, dtype=torch.int64), *tensors(scene)[1:])
    wide = scene | {"block_table": scene["block_table"].repeat(1, 2)}
    with pytest.raises(ValueError, match="there is room for"):
        step.step(*tensors(wide))
    crosswise = scene | {"block_table": scene["block_table"].t().contiguous().t()}
    with pytest.raises(ValueError, match="contiguous"):
        step.step(*tensors(crosswise))


def hooked(decoder):
    decoder.model.model.decoder.layers[1].mlp.c_fc.register_forward_hook(lambda *args: None)
    return decoder


UNSERVED = {
    "float32": lambda: (decoder_of(torch.float32), None),
    "pages": lambda: (decoder_of(torch.bfloat16), torch.float8_e4m3fn),
    "residual": lambda: (PagedDecoder(decoder_of(torch.bfloat16).model, torch.bfloat16), None),
    "int8": lambda: (PagedDecoder(decoder_of(torch.bfloat16).model, weight_dtype=torch.int8), None),
    "heads": lambda: (decoder_of(torch.bfloat16, num_attention_heads=4), None),
    "inner size": lambda: (decoder_of(torch.bfloat16, n_inner=100), None),
    "activation": lambda: (decoder_of(torch.bfloat16, activation_function="relu"), None),
    "has hooks": lambda: (hooked(decoder_of(torch.bfloat16)), None),
}


@pytest.mark.parametrize("named", UNSERVED)
def test_decoders_that_are_not_served(named):
    decoder, page_dtype = UNSERVED[named]()
    assert named in unserved(decoder, page_dtype)
    with pytest.raises(ValueError, match=f"no persistent decode step: .*{named}"):
        PersistentStep(decoder, decoder.pages(4, PAGE_SIZE, page_dtype), 2, 2)


def test_a_cpu_is_refused():
    model = decoder_of(torch.bfloat16).model
    with pytest.raises(ValueError, match="it runs on a CUDA device, and the decoder is on cpu"):
        runner.Runner(model, 8, PAGE_SIZE, 2, 20, persistent=True)


def test_a_runner_takes_it_for_few_rows(emulator, monkeypatch):
    """Up to four rows and no more; what candidates draw is what the ordinary step draws."""
    counts = []

    class Counted(Emulated):
        def _launch(self, call):
            counts.append(call.num_candidates)
            super()._launch(call)

    monkeypatch.setattr(runner, "PersistentStep", functools.partial(Counted, emulator))
    model = stopping(tiny()).to(torch.float16)
    prompt_list = [prompt.half() for prompt in prompts(model.float(), (4, 23, 9))]
    params = [SamplingParams(do_sample=False, max_new_tokens=count, seed=0) for count in (6, 12, 9)]
    tokens = []
    for persistent in (True, False):
        driver = Driver(model.half(), prompt_list, params, persistent=persistent)
        for slot in range(5):
            driver.admit(slot, slot % 3, slot)
            driver.step()
        tokens.append(driver.run())
    assert tokens[0] == tokens[1]
    assert counts[:4] == [1, 2, 3, 4] and len(counts) > 4 and max(counts) == 4


def test_parameters_that_moved_are_told(emulator, monkeypatch):
    monkeypatch.setattr(runner, "PersistentStep", functools.partial(Emulated, emulator))
    model = tiny().to(torch.float16)
    prompt_list = [prompt.half() for prompt in prompts(model.float(), (4,))]
    driver = Driver(
        model.half(), prompt_list, [SamplingParams(do_sample=False, max_new_tokens=3, seed=0)], persistent=True
    )
    head = model.speech_decoder_model.lm_head.weight
    head.data = head.data.clone()
    driver.admit(0, 0)
    with pytest.raises(RuntimeError, match="moved"):
        driver.step()
    driver.runner.warm_up()
    driver.step()
