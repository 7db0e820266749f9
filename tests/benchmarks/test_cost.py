"""The model of cost counts what the code does: its launches, bytes and instructions are held against other sources."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from benchmarks.cost import tables
from benchmarks.cost.devices import H200
from benchmarks.cost.machine_code import MATRIX, Loop, arms
from benchmarks.cost.recording import missing
from benchmarks.harness import ROOT
from benchmarks.scaling_model import BESIDE_TEXT
from clvp_fast import ClvpConfig, ops
from clvp_fast.models.clvp.causal_lm import ClvpForCausalLM
from tests.engine.test_decoder import prompts, tiny
from tests.engine.test_runner import SAMPLED, Driver

LAYERS = 2
needs_compiler = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def in_new_process(*words: str) -> list[dict]:
    """Return the rows of `python -m benchmarks.cost`, in a process whose kernels are compiled and not interpreted."""
    return [json.loads(line) for line in _lines("-m", "benchmarks.cost", "--steps-only", "--json", *words)]


def in_python(script: str) -> list[str]:
    """Return the lines that a script prints, in such a process."""
    return _lines("-c", script)


def _lines(*words: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def rows() -> dict[tuple[int, bool], dict]:
    """Return predicted steps of two layers, by candidates and setting."""
    found = in_new_process("--candidates", "1", "4", "64", "300", "--layers", str(LAYERS))
    return {(row["shape"]["candidates"], row["deterministic"]): row for row in found}


def kernels_of(row: dict) -> Counter:
    found = Counter()
    for kind in row["kinds"]:
        found[kind["kernel"]] += kind["number"]
    return found


@needs_compiler
def test_launches_are_those_of_a_step_that_runs(rows):
    """Count the kernels of a step in the interpreter, and the calls of torch that it was bound to."""
    model = tiny()
    ran: Counter = Counter()
    run = GridExecutor.__call__

    def counting(self, *args, **options):
        ran[self.fn.__name__] += 1
        return run(self, *args, **options)

    counted = mock.patch.object(GridExecutor, "__call__", counting)
    with torch.inference_mode(), ops.backend("triton"), counted:
        driver = Driver(model, prompts(model), [SAMPLED] * 3)
        for slot in range(3):
            driver.admit(slot, slot)
        driver.start()  # prefills too
        ran.clear()
        calls = driver.runner._bind(3, {"typical_mass": 1.0})
        for call in calls:
            call()
    layers = driver.runner.decoder.num_layers
    predicted = kernels_of(rows[4, False])
    ours = {name: number for name, number in predicted.items() if name in ran}
    per_layer = {"_linear_kernel": 4, "_add_norm_kernel": 2, "paged_attention_decode_kernel": 1}
    assert ours == {name: number + (LAYERS - layers) * per_layer.get(name, 0) for name, number in ran.items()}
    bound = [call.func for call in calls if isinstance(call, partial)]
    of_torch = sum(not (function.__module__ or "").startswith("clvp_fast") for function in bound)
    assert sum(predicted.values()) - sum(ours.values()) == of_torch


@needs_compiler
@pytest.mark.parametrize("setting", [(1, False), (4, False), (64, False), (64, True), (300, False)], ids=str)
def test_bytes_are_those_of_parameters_and_pages(rows, setting):
    """Count each parameter once, of the tables a row for each candidate, and each key and value once."""
    row = rows[setting]
    candidates, stored = row["shape"]["candidates"], row["shape"]["stored"]
    config = ClvpConfig().decoder_config
    config.num_hidden_layers = LAYERS
    with torch.device("meta"):
        model = ClvpForCausalLM(config).to(torch.bfloat16)
    decoder = model.model.decoder
    modules = (*decoder.layers, decoder.layer_norm, model.final_norm, model.lm_head)
    parameters = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    embeddings = decoder.input_embeds_layer, decoder.position_embeds_layer
    looked_up = candidates * sum(table.weight[0].nbytes for table in embeddings)
    tokens = candidates * (stored + 1) + row["shape"]["text_tokens"] + BESIDE_TEXT
    pages = tokens * LAYERS * 2 * config.hidden_size * torch.bfloat16.itemsize
    assert row["bytes"] == parameters + looked_up + pages


@needs_compiler
@pytest.mark.parametrize("setting", [(1, False), (4, False), (64, False), (64, True)], ids=str)
def test_products_are_those_of_the_weights(rows, setting):
    """Padding to tiles is the only work beyond the weights' own products."""
    row = rows[setting]
    config = ClvpConfig().decoder_config
    hidden, inner = config.hidden_size, config.inner_size
    weights = LAYERS * (4 * hidden * hidden + 2 * hidden * inner) + config.vocab_size * hidden
    made = sum(kind["flop"] * kind["number"] for kind in row["kinds"] if "linear" in kind["kernel"])
    padded = {1: 16, 4: 16, 64: 64 if setting[1] else 128}[row["shape"]["candidates"]]
    assert 2 * weights * row["shape"]["candidates"] <= made <= 1.02 * 2 * weights * padded


@needs_compiler
def test_instructions_of_the_matrix_unit_do_the_work_that_is_counted():
    """Walk through the compiled loops: each `wgmma` of four warps, half a program, multiplies 64 × 8 × 16."""
    script = f"""
import json
from benchmarks.cost import recording, work
launches = recording.step(4, 63, 271, False, {LAYERS})
for launch in launches:
    if launch.kernel == "_linear_kernel":
        (arm,) = [arm for arm in launch.code.arms if arm.multiplies]
        given = launch.arguments
        steps = -(-given["depth"] // given["PARTS"] // given["BLOCK_K"])
        trips = (steps, *[1] * (len(arm.loops) - 1))
        issued = arm.issued(trips, kinds={MATRIX!r}) * launch.programs * launch.warps
        print(json.dumps([issued / 4 * 2 * 64 * 8 * 16, work.of(launch, work.Stored(250, 63)).flop]))
"""
    found = [json.loads(line) for line in in_python(script)]
    assert len(found) == 4 * LAYERS + 1
    assert all(counted == multiplied > 0 for counted, multiplied in found), found


@needs_compiler
def test_products_of_a_deterministic_step_do_not_know_its_rows(rows):
    """Find one kernel and order of sums in every size of step; a step of 300 makes each product twice."""

    def products(candidates: int, deterministic: bool) -> Counter:
        found = Counter()
        for kind in rows[candidates, deterministic]["kinds"]:
            if "linear" in kind["kernel"]:
                _, shape = kind["what"].split(" rows, ")
                found[kind["kernel"], shape, *kind["order"]] += kind["number"]
        return found

    one, several = products(1, True), {candidates: products(candidates, True) for candidates in (4, 64, 300)}
    assert {kernel for kernel, *_ in one} == {"_linear_kernel"}
    assert sum(one.values()) == 4 * LAYERS + 1
    assert {kind[-1] for kind in one} == {"HGMMA"} and {len(kind) for kind in one} == {6}
    assert several[4] == several[64] == one
    assert several[300] == Counter({kind: 2 * number for kind, number in one.items()})
    assert len({frozenset(products(candidates, False)) for candidates in (1, 64, 300)}) == 3, "others do know them"


@needs_compiler
def test_launches_of_a_prefill_do_not_know_its_prompts():
    """Find the same products for each group of prompts, so that they can be captured, and a few other launches."""
    script = f"""
import json
from benchmarks.cost import __main__, recording
for prompts in ([5], [63, 500], [400] * 8):
    for deterministic in (True, False):
        launches = recording.prefill(prompts, deterministic, {LAYERS})
        products = [one for one in launches if "linear" in one.kernel]
        tiles = sorted({{str([one.kernel, __main__.what(one), *__main__._tile(one)]) for one in products}})
        print(json.dumps([deterministic, tiles, len(products), len(launches)]))
"""
    found = [json.loads(line) for line in in_python(script)]
    for deterministic in (True, False):
        one, two, several = ([*row] for setting, *row in found if setting is deterministic)
        assert one[0] == two[0] == several[0]
        assert ({tiles.split("'")[1] for tiles in one[0]} == {"_linear_kernel"}) == deterministic
        assert (one[1], several[1]) == (two[1], 4 * two[1]), "two prompts of 400 tokens fit into a group"
        assert two[2] == one[2] + 1, "a prompt's copy"


@needs_compiler
def test_written_predictions_are_those_of_this_code():
    """A changed kernel, launcher, step or constant needs `python -m benchmarks.cost --write`."""
    written = [row for row in tables.read() if row["workload"] == "decode_step" and row["shape"]["candidates"] == 16]
    found = in_new_process("--candidates", "16")
    if written[0]["triton"] != found[0]["triton"]:
        pytest.skip(f"the rows are of triton {written[0]['triton']}, and this is {found[0]['triton']}")
    assert found == written, "run: python -m benchmarks.cost --write"


def test_the_document_shows_the_rows():
    document = tables.DOCUMENT.read_text()
    assert tables.with_tables(document) == document, "run: python -m benchmarks.cost --write"


def test_measured_rows_stand_beside_their_prediction():
    row = next(row for row in tables.read() if row["shape"] == {"rows": 64, "width": 1024, "inner": 4096})
    ours = {
        "workload": "gelu_mlp",
        "provider": tables.KERNEL,
        "seconds": {"median": 2.5 * row["seconds"]},
        "shape": row["shape"] | {"dtype": "bfloat16"},
        "device": {"name": f"NVIDIA {H200.name}"},
        "commit": "abc",
    }
    others = [
        ours | {"seconds": None},
        ours | {"device": {"name": "NVIDIA A100"}},
        ours | {"provider": "clvp_fast torch"},
        ours | {"shape": ours["shape"] | {"rows": 65}},
    ]
    assert tables.measured(row, others) is None
    assert tables.measured(row, [*others, ours]) is ours
    assert " | 2.50 | abc |" in tables.calls([row], [ours])[-1]
    assert " | no row |" in tables.calls([row], others)[-1]


CODE = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/              @P1 BRA `(.L_x_1) ;
        /*0040*/              @P0 BRA `(.L_x_0) ;
        /*0050*/                   ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR4][R6.64], R9 ;
        /*0060*/               @P2 EXIT ;
        /*0070*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   STG.E desc[UR4][R2.64], R5 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def test_loops_and_ends_of_machine_code():
    first, second = arms(CODE)
    assert first.loops == (Loop(1, 4), Loop(2, 3)) and first.multiplies and first.arrival == 6
    assert second.loops == () and not second.multiplies and second.issued(()) == 2
    assert first.issued((1, 1)) == 9 and first.issued((1, 1), last=0.25) == 7.5
    assert first.issued((2, 3)) == 9 + (2 - 1) * 2 + (2 * 3 - 1) * 2
    assert first.issued((2, 3), kinds=MATRIX) == 6
    with pytest.raises(ValueError, match="2 loops, and the model knows 1"):
        first.issued((1,))
    with pytest.raises(ValueError, match="no instruction"):
        arms(".text.kernel:")
