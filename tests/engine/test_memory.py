"""Plans of pages and slots: arithmetic, held against what a runner really has."""

import dataclasses
import os
import platform
import re
from pathlib import Path

import pytest
import torch

from clvp_fast import ClvpProcessor
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.engine import engine, runner as runner_module
from clvp_fast.engine.memory import DecoderSizes, MemoryPlan, human_bytes, plan, trim_heap
from clvp_fast.engine.runner import Runner
from clvp_fast.engine.step import Prompt
from clvp_fast.ops.binding import Scratch
from tests.engine.test_decoder import tiny
from tests.kit import isa

# The trained decoder in bfloat16 on a GPU.
FULL = DecoderSizes(
    num_layers=30,
    num_heads=16,
    hidden_size=1024,
    intermediate_size=4096,
    vocab_size=8194,
    itemsize=2,
    page_itemsize=2,
    on_cpu=False,
)
MIB = 2**20
PAGE = 2 * 30 * 16 * 1024 * 2
OWN, PREFIX = 32, 26


def full(free, **options):
    return plan(FULL, free, **({"max_prefix_len": 405} | options))


def test_a_large_device_has_room_for_all_that_slots_can_use():
    found = full(140 * 10**9)
    assert found.max_batch == 512 and found.num_pages == 512 * (OWN + PREFIX)
    assert found.parts["pages"] == found.num_pages * PAGE and found.total <= found.budget == 126 * 10**9
    assert full(140 * 10**9, max_batch=100).max_batch == 100


@pytest.mark.parametrize("gigabytes", [1, 2, 5, 10, 20, 40])
def test_free_memory_bounds_slots_and_pages(gigabytes):
    found = full(gigabytes * 10**9, memory_fraction=0.8)
    assert found.total <= found.budget == gigabytes * 8 * 10**8
    assert found.num_pages >= found.max_batch * OWN + PREFIX, "all slots come to their end at once"
    assert found.budget - found.total < PAGE or found.num_pages == found.max_batch * (OWN + PREFIX)
    larger = full(gigabytes * 10**9 * 2, memory_fraction=0.8)
    assert larger.max_batch > found.max_batch or found.max_batch == 512


def test_smaller_pages_give_more_slots():
    usual = full(10 * 10**9)
    float8 = plan(dataclasses.replace(FULL, page_itemsize=1), 10 * 10**9, max_prefix_len=405)
    assert float8.max_batch > 1.7 * usual.max_batch
    assert full(10 * 10**9, states=True).num_pages < usual.num_pages
    assert full(10 * 10**9, max_new_tokens=100).max_batch > 3 * usual.max_batch


def test_too_little_memory_is_refused_with_sizes():
    one = OWN + PREFIX
    with pytest.raises(
        ValueError, match=r"one candidate of 500 tokens after a prompt of 405 needs (\d+ MB) \("
    ) as error:
        full(10**8)
    assert human_bytes(one * PAGE) + " pages" in str(error.value) and "90 MB may be used" in str(error.value)
    assert full(10**9).max_batch >= 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(memory_fraction=0), "memory_fraction must be above 0"),
        (dict(memory_fraction=1.1), "memory_fraction must be above 0"),
        (dict(max_batch=0), "max_batch must be a whole number from 1 up, not 0"),
        (dict(max_batch=True), "max_batch must be a whole number from 1 up, not True"),
        (dict(max_new_tokens=2.0), "max_new_tokens must be a whole number from 1 up, not 2.0"),
        (dict(page_size=0), "page_size must be a whole number from 1 up, not 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be a whole number from 1 up, not 0"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        full(10**10, **options)


@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
@pytest.mark.parametrize("page_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype, max_batch", [(torch.float32, 40), (torch.float32, 3), (torch.bfloat16, 40)])
def test_parts_are_those_of_a_runner(dtype, max_batch, page_dtype, weight_dtype):
    model = tiny().speech_decoder_model.to(dtype)
    options = dict(page_dtype=page_dtype, states=True, weight_dtype=weight_dtype)
    found = plan(model, 2 * 10**7, max_batch=max_batch, max_new_tokens=50, **options)
    assert 1 <= found.max_batch <= max_batch and found.total <= found.budget
    runner = Runner(model, found.num_pages, found.page_size, found.max_batch, found.max_new_tokens, **options)
    assert found.parts["pages"] == runner.pages.data.nbytes
    assert found.parts["states"] == runner._states.nbytes
    assert found.max_prefix_len == runner.max_prefix_len == 65
    layers = runner.decoder.weights.layers
    products = [one for layer in layers for one in (*layer.projections, layer.out, layer.mlp_in, layer.mlp_out)]
    copies = [one for one in products if one.scale is not None]
    assert found.parts["weights"] == sum(one.weight.nbytes + one.scale.nbytes for one in copies)
    assert bool(copies) == (weight_dtype is not None)
    state = runner.slots._arena.nbytes + runner._arrivals.nbytes
    results = runner._result(max(found.max_batch, runner._min_rows)).nbytes
    assert found.parts["slots"] == state + results


def test_a_step_stays_within_its_part():
    """Compare the plan with the tensors of a step on a CPU, and with the peak that torch's profiler counts."""
    model = tiny().speech_decoder_model
    found = plan(model, 10**8, max_batch=64, max_new_tokens=50)
    runner = Runner(model, found.num_pages, found.page_size, found.max_batch, found.max_new_tokens)
    with torch.inference_mode():
        runner._step(64)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            runner._step(64)
    held = peak = sum(block.nbytes for block in runner._scratch._blocks.values())
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.1 * found.parts["step"] < peak <= found.parts["step"]


@isa.needs("linear")
def test_a_prompt_that_joins_a_step_stays_within_its_part(monkeypatch):
    """Compare the plan with all tensors that such a step keeps: those of the longest prompt, and of the slots."""
    model, made = tiny().speech_decoder_model, []
    found = plan(model, 10**8, max_batch=64, max_new_tokens=50, packed=True)
    runner = Runner(model, found.num_pages, found.page_size, found.max_batch, found.max_new_tokens, packed=True)
    monkeypatch.setattr(runner_module, "Scratch", lambda *sizes: made.append(Scratch(*sizes)) or made[0])
    embeds = torch.zeros(found.max_prefix_len, model.config.hidden_size)
    table = torch.zeros(1, -(-len(embeds) // found.page_size), dtype=torch.int32)
    with torch.inference_mode():
        runner._bind(64, {}, Prompt(embeds, torch.tensor([0, len(embeds)], dtype=torch.int32), table))
    held = sum(block.nbytes for block in made[0]._blocks.values())
    assert 0.1 * found.parts["prefill"] < held <= found.parts["prefill"]


def test_a_plan_prints_as_a_table():
    text = str(full(20 * 10**9, states=True))
    lines = text.splitlines()
    assert re.fullmatch(r"\d+ candidates at once, of up to 500 tokens", lines[0])
    assert [line.split()[0] for line in lines[1:]] == [
        "pages",
        "weights",
        "panels",
        "slots",
        "states",
        "step",
        "prefill",
        "total",
    ]
    assert "of 16 tokens" in lines[1] and lines[-1].endswith("of 18 GB")
    assert isinstance(full(10**10), MemoryPlan)


def test_human_bytes():
    counts = (0, 999, 1000, 12_345, 999_600, 1_234_567, 18_000_000_000, 999_700_000_000, 2_000_000_000_000)
    expected = ["0 B", "999 B", "1 kB", "12.3 kB", "1000 kB", "1.23 MB", "18 GB", "1000 GB", "2000 GB"]
    assert [human_bytes(count) for count in counts] == expected


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="trims the heap of glibc")
def test_holes_between_what_is_kept_go_back_to_the_system():
    blocks = [bytearray(MIB // 16) for _ in range(1600)]
    del blocks[::2]
    before = resident_bytes()
    trim_heap()
    assert before - resident_bytes() > 25 * MIB


def test_an_engine_arranges_weights_before_it_plans():
    """Later, freed weights would lie between what the run needs."""
    checkpoint = load_checkpoint("random")
    attention = checkpoint.model.text_encoder_model.layers[0].self_attn
    arranged = []

    def planned(*args, **options):
        linears = attention.q_proj, attention.k_proj, attention.v_proj
        arranged.append(len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1)
        return plan(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "plan", planned)
        engine.CandidateEngine(checkpoint.model, ClvpProcessor(checkpoint.feature_extractor, checkpoint.tokenizer))
    assert arranged and all(arranged)
