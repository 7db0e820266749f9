"""The persistent decode step's blocks, run on the CPU by `persistent_emulator.cpp`, against `PagedDecoder.step`."""

import copy
import ctypes
import functools

import pytest
import torch

import clvp_fast
from clvp_fast import ClvpDecoderConfig, ClvpForCausalLM, native
from clvp_fast.engine import runner, step as step_module
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.engine.persistent import PersistentStep, unserved
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.ops.binding import copying
from tests.csrc import compiled
from tests.engine.test_decoder import prompts, tiny
from tests.engine.test_runner import Driver, stopping
from tests.kit import assert_within_budget
from tests.models.clvp.builders import randomize

DTYPES = [torch.bfloat16, torch.float16]
PAGE_SIZE, GUARD = 16, 4096
# Own tokens stored (-1: inactive), and whose prompt is continued (-1: none).
ROWS = [(5, 1), (140, 0), (-1, 0), (16, -1)]
PREFIXES = (20, 131)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    library = ctypes.CDLL(str(compiled.emulator("persistent_emulator.cpp", tmp_path_factory)))
    call, integer = ctypes.POINTER(native.PersistentDecodeCall), ctypes.c_int32
    library.emulate_persistent_decode.argtypes = [call, integer, integer, integer, ctypes.POINTER(ctypes.c_int64)]
    library.workspace_bytes.argtypes = [call]
    library.workspace_bytes.restype = ctypes.c_int64
    return library


class Emulated(PersistentStep):
    """On host memory, by `blocks` blocks.

    `waits` is how often all waited for all in the last step. With `skip` nobody waits the `skip`-th time.
    """

    def __init__(self, emulator, *made_of, blocks=3, seed=0, skip=-1):
        self.emulator, self.blocks, self.seed, self.skip, self.waits = emulator, blocks, seed, skip, 0
        super().__init__(*made_of)

    def _require(self):
        pass

    def _workspace_bytes(self, call):
        return self.emulator.workspace_bytes(call) + GUARD

    def _launch(self, call):
        # NaN: every element is written, and nothing is left over from the step before.
        self._workspace[256:] = 0xFF
        for result, width in ((call.hidden, call.hidden_size), (call.logits, call.vocab_size)):
            ctypes.memset(result, 0xFF, 2 * call.num_candidates * width)
        waits = ctypes.c_int64()
        code = self.emulator.emulate_persistent_decode(call, self.blocks, self.seed, self.skip, waits)
        assert code == 0, code
        assert (self._workspace[-GUARD:] == 0xFF).all(), "written behind the workspace"
        self.waits = waits.value


@torch.no_grad()
def decoder_of(dtype, seed=0, **changes):
    sizes = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, vocab_size=300) | changes
    config = ClvpDecoderConfig(use_attention_bias=True, **sizes)
    return PagedDecoder(randomize(ClvpForCausalLM(config), seed).to(dtype).eval())


def scene_of(decoder, rows=ROWS, prefixes=PREFIXES, seed=0):
    """Make the inputs of a step: pages dealt at random, and NaN in every slot that is not a stored token's."""
    generator = torch.Generator().manual_seed(seed)
    widths = [max(own // PAGE_SIZE for own, _ in rows) + 2, max(prefixes) // PAGE_SIZE + 2]
    counts = len(rows) * widths[0], len(prefixes) * widths[1]
    deal = torch.randperm(sum(counts) + 3, generator=generator).int()
    block_table, prefix_table = deal[: counts[0]].view(-1, widths[0]), deal[counts[0] : -3].view(-1, widths[1])
    pages = decoder.pages(len(deal), PAGE_SIZE)
    values = torch.randn(pages.data.shape, generator=generator).to(decoder.dtype)
    pages.data.fill_(torch.nan)
    for table, lengths in ((block_table, [own for own, _ in rows]), (prefix_table, prefixes)):
        for pages_of_row, length in zip(table.tolist(), lengths, strict=True):
            for place in range(length):
                at = (slice(None), slice(None), pages_of_row[place // PAGE_SIZE], place % PAGE_SIZE)
                pages.data[at] = values[at]
    return dict(
        decoder=decoder,
        pages=pages,
        tokens=torch.randint(decoder.vocab_size, (len(rows),), generator=generator),
        seq_lens=torch.tensor([own for own, _ in rows], dtype=torch.int32),
        block_table=block_table,
        prefix_table=prefix_table,
        prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
        prefix_index=torch.tensor([request for _, request in rows], dtype=torch.int32),
    )


def tensors(scene):
    return [value for name, value in scene.items() if name not in ("decoder", "pages")]


def step_of(emulator, scene, **options):
    tables = scene["block_table"].shape[1], scene["prefix_table"].shape[1]
    return Emulated(emulator, scene["decoder"], scene["pages"], *tables, **options)


def with_row(scene, n):
    """Return the scene of one row alone."""
    alone = dict(scene)
    for name in ("tokens", "seq_lens", "block_table", "prefix_index"):
        alone[name] = scene[name][n : n + 1]
    return alone


def with_pages(scene, dtype=None):
    """Return the scene over pages of its own, perhaps in another dtype."""
    decoder = scene["decoder"] if dtype is None else PagedDecoder(copy.deepcopy(scene["decoder"].model).to(dtype))
    other = scene | {"decoder": decoder, "pages": decoder.pages(scene["pages"].data.shape[2], PAGE_SIZE)}
    other["pages"].data.copy_(scene["pages"].data)
    return other


@torch.inference_mode()
def expected(scene):
    with clvp_fast.backend("reference"):
        return scene["decoder"].step(*tensors(scene), scene["pages"])


@torch.inference_mode()
def emulated(emulator, scene, **options):
    step = step_of(emulator, scene, **options)
    return *step.step(*tensors(scene)), step.waits


def compare(emulator, scene, **options):
    hold_to_the_decoder(lambda ours: emulated(emulator, ours, **options), scene)


def hold_to_the_decoder(run, scene):
    """Hold `run(scene)` to the decoder: hidden states and logits, and new keys and values in the scene's pages."""
    exact, plain, ours = with_pages(scene, torch.float64), with_pages(scene), with_pages(scene)
    active = scene["seq_lens"] >= 0
    reference, baseline, got = expected(exact), expected(plain), run(ours)
    for name, mine, right, other in zip(("hidden", "logits"), got, reference, baseline, strict=False):
        assert_within_budget(mine[active], right[active], other[active], name)
    data, right, other = (one["pages"].data for one in (ours, exact, plain))
    untouched = other.isnan()
    assert torch.equal(data.isnan(), untouched)
    stored_before = with_pages(scene)["pages"].data
    new = stored_before.isnan() & ~untouched
    stores = active & (scene["seq_lens"] < scene["block_table"].shape[1] * PAGE_SIZE)
    assert new.sum() == stores.sum() * data[:, :, 0, 0].numel()
    assert_within_budget(data[new], right[new], other[new], "new keys and values")
    kept = ~stored_before.isnan()
    assert torch.equal(data[kept], stored_before[kept])


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
    hidden, inner = sizes
    changes = dict(hidden_size=hidden, num_attention_heads=hidden // 64, n_inner=inner, num_hidden_layers=1)
    compare(emulator, scene_of(decoder_of(torch.float16, vocab_size=301, **changes), ROWS[:2]), blocks=5)


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
    together = emulated(emulator, with_pages(scene))
    for blocks, seed in ((1, 5), (2, 6), (8, 7)):
        found = emulated(emulator, with_pages(scene), blocks=blocks, seed=seed)
        for mine, other in zip(found[:2], together[:2], strict=True):
            assert torch.equal(mine, other)
    for n, (own, _) in enumerate(ROWS):
        alone = emulated(emulator, with_row(with_pages(scene), n), seed=n)
        if own >= 0:
            assert torch.equal(alone[0][0], together[0][n]) and torch.equal(alone[1][0], together[1][n])


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


def full_table(stored, monkeypatch):
    """Give a scene whose first row has no place for its new token, which the decoder's own step omits too.

    128 keys fill both tables: one more would be a second part of every head, for which there is no room.
    """
    scene = scene_of(decoder_of(torch.bfloat16), [(32, 0), (5, 0)], [96])
    for name, width in (("block_table", 2), ("prefix_table", 6)):
        scene[name] = scene[name][:, :width].contiguous()
    scene["seq_lens"][0] = stored

    def left_out(q, k_new, v_new, *, k_pages, v_pages, block_table, seq_lens, **tables):
        """Row 0 stores and attends to the last token of its table once more, in the place of the new one."""
        last, news = (block_table[0, -1], PAGE_SIZE - 1), (k_new.clone(), v_new.clone())
        for new, pages in zip(news, (k_pages, v_pages), strict=True):
            new[0] = pages[last]
        lengths = torch.cat((seq_lens.new_tensor([31]), seq_lens[1:]))
        return clvp_fast.ops.paged_attention_decode(q, *news, k_pages, v_pages, block_table, lengths, **tables)

    def bind(out, room, *args, **tables):
        return copying(functools.partial(left_out, *args, **tables), out)

    monkeypatch.setattr(step_module, "bind_paged_attention_decode", bind)
    return scene


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
    step = step_of(emulator, scene)
    value, code = REFUSED[field]

    def launch(call):
        setattr(call, field, value)
        assert emulator.emulate_persistent_decode(call, 1, 0, -1, ctypes.c_int64()) == code

    step._launch = launch
    step.step(*tensors(scene))


def test_tables_that_a_step_has_no_room_for(emulator):
    scene = scene_of(decoder_of(torch.bfloat16))
    step = step_of(emulator, scene)
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
