"""Every benchmark of an operator runs, at small shapes, and each of its providers passes the gate."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    add_norm,
    corpus,
    decode_rivals,
    decode_step,
    end_to_end,
    first_token,
    geglu_mlp,
    gelu_mlp,
    generate,
    host_step,
    kernels,
    merge_norm,
    paged_attention,
    precision,
    rotary_attention,
    sample,
    scheduler,
    score,
    swin,
    tiers,
    window_attention,
)
from benchmarks.gpu.steps import KERNELS
from benchmarks.harness import all_rows
from benchmarks.models import stock_model
from benchmarks.providers import Absent
from clvp_fast import SamplingParams, ops
from clvp_fast.ops import dispatch, many_rows
from clvp_fast.ops.panels import unserved
from tests.kit import operators

OURS = {"clvp_fast torch", "clvp_fast reference"}
# Module, tasks of a smoke test, rivals that a CPU has, and what it has not.
OPERATORS = [
    (
        rotary_attention,
        2,
        {"SDPA, rotation compiled", "SDPA math, rotation compiled", "SDPA flash, rotation compiled"},
        {"SDPA efficient, rotation compiled", "SDPA cudnn, rotation compiled"},
    ),
    (
        window_attention,
        4,
        {"torch as Swin", "torch as Swin, compiled", "SDPA math, as Swin", "SDPA flash, as Swin"},
        {"SDPA efficient, as Swin", "SDPA cudnn, as Swin"},
    ),
    (swin, 4, {"torch as Swin", "torch as Swin, compiled", "clvp_fast"}, set()),
    (merge_norm, 2, {"torch as Swin", "torch as Swin, compiled"}, set()),
    (geglu_mlp, 2, {"torch, compiled"}, set()),
    (gelu_mlp, 2, {"torch, compiled"}, set()),
    (add_norm, 4, {"torch, compiled"}, set()),
    (
        paged_attention,
        1,
        {"SDPA over dense keys", "SDPA math, dense keys", "SDPA flash, dense keys"},
        {"SDPA efficient, dense keys", "SDPA cudnn, dense keys", *paged_attention.FLASHINFER},
    ),
    (sample, 1, {"transformers' processors"}, set()),
]

#: The workload of an operator that has none of its own name.
MEASURED_IN = {
    "double_layer_norm": "add_norm",
    "paged_attention_decode": "paged_attention",
    "paged_prefill": "paged_attention",
    "rotary_attention_ragged": "rotary_attention",
    "window_block": "swin",
    "mlp_block": "swin",
}
# Of the time of a model it is nothing that one could see.
UNMEASURED = {"embed"}
# Their providers are of their own kind, and have tests of their own.
TESTED_ELSEWHERE = {"linear", "log_mel"}


def test_every_operator_has_a_workload_that_is_tested_and_measured():
    names = {name for name in dispatch.OPERATORS if not name.startswith("test_")} - UNMEASURED
    workloads = {MEASURED_IN.get(name, name) for name in names}
    assert set(KERNELS) == workloads and len(set(KERNELS)) == len(KERNELS)
    assert {module.__name__.split(".")[1] for module, *_ in OPERATORS} == workloads - TESTED_ELSEWHERE


@pytest.mark.parametrize(
    ("module", "tasks", "here", "absent"), OPERATORS, ids=[module.__name__.split(".")[1] for module, *_ in OPERATORS]
)
def test_providers_agree(module, tasks, here, absent, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a forced kernel is a CPU's own
    for operator in dispatch.OPERATORS.values():
        operators.forget(monkeypatch, operator)
    rows = all_rows(module, "cpu", smoke=True)
    # Our kernel is measured, or it is told why not.
    kernel = {"clvp_fast kernel"} if any(row["provider"] == "clvp_fast kernel" for row in rows) else set()
    expected = OURS | here | kernel
    assert {row["provider"] for row in rows} == expected and len(rows) == tasks * len(expected)
    assert not [row for row in rows if row["seconds"] is None]
    assert all(row["bytes"] > 0 and row["ratio"] for row in rows)
    for row in rows:
        assert set(row["absent"]) == absent | ({"clvp_fast kernel"} - kernel)
        assert {row["absent"][name] for name in absent} <= {"for a GPU"}


def test_a_provider_that_is_off_is_refused(monkeypatch):
    monkeypatch.setattr(add_norm, "SHAPES", {"smoke": (("layer", 3, 40),)})
    case = next(add_norm.cases("cpu", smoke=True))
    case.providers = {"right": case.providers["clvp_fast torch"]}
    case.providers["wrong"] = lambda *arguments: [1.01 * x for x in case.providers["right"](*arguments)]
    right, wrong = kernels.task_of("add_norm", case, "cpu", repeats=1).rows()
    assert (right["provider"], wrong["provider"]) == ("right", "wrong")
    assert wrong["seconds"] is None and right["seconds"] is not None


def test_every_case_is_compiled():
    """Compile each case, as torch compiles eight of one function, and runs the others uncompiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def double(x):
        return 2 * x

    for size in range(2, 14):
        case = kernels.Case(
            shape=dict(size=size),
            dtype=torch.float32,
            inputs=lambda seed, size=size: (torch.ones(size),),
            reference=lambda x: 2 * x.double(),
            providers={"torch": double, "torch, compiled": torch.compile(double, backend=backend, dynamic=False)},
            bytes=1,
        )
        kernels.task_of("double", case, "cpu", repeats=1).rows()
    assert len(graphs) == 12


def test_a_corpus_gives_what_the_bare_engine_gives(monkeypatch):
    rows = all_rows(corpus, "cpu", smoke=True)
    assert [row["provider"] for row in rows] == ["clvp_fast engine", "clvp_fast batch"]
    assert all(row["error"] == 0 and row["ratio"] for row in rows)
    batch = corpus._Both.batch
    monkeypatch.setattr(corpus._Both, "batch", lambda self: batch(self) | {0: []})
    rows = all_rows(corpus, "cpu", smoke=True)
    assert [row["seconds"] is None for row in rows] == [False, True]  # what gives other codes gets no time


@pytest.fixture
def few_candidates(monkeypatch):
    cases = (scheduler.Case("queue", 4, 3, 5, 490), scheduler.Case("out of pages", 4, 2, 3, 490, pages=0.5))
    monkeypatch.setattr(scheduler, "CASES", cases)


def test_the_null_engine_serves_all_and_tells_how_slow_the_slow_steps_are(few_candidates):
    rows = all_rows(scheduler, "cpu")
    assert [row["provider"] for row in rows] == ["scheduler, lag 0", "scheduler, lag 1"] * 2
    assert all(row["error"] == 0 and 0 < row["seconds"]["median"] < 1 for row in rows)
    assert all(row["slow_step_seconds"] > 0 and row["shape"]["new_tokens"] == 500 for row in rows)
    assert not any("late_over_early" in row for row in rows)


def test_a_step_of_the_host_is_timed_and_its_calls_are_counted():
    rows = all_rows(host_step, "cpu", smoke=True)
    assert [row["shape"]["model"] for row in rows] == ["null", "random"]
    assert all(row["error"] == 0 and 0 < row["seconds"]["median"] < 1 for row in rows)
    null, demo = (row["python_calls"] for row in rows)
    assert 10 < null < demo


def test_growth_compares_the_end_of_a_long_run_with_its_beginning():
    assert scheduler.growth([1.0] * 6000) is None
    ramp, steady = [0.1] * 1000, [1.0] * 10_000
    assert scheduler.growth([*ramp, *steady, *ramp[:500]]) == 1.0
    assert scheduler.growth([*ramp, *steady[:5000], *[1.5] * 5000, *ramp[:500]]) == 1.5


def test_a_scheduler_that_keeps_pages_gets_no_time(few_candidates, monkeypatch):
    monkeypatch.setattr(scheduler.Scheduler, "_forget", lambda self, request: None)
    rows = all_rows(scheduler, "cpu")
    assert len(rows) == 4 and all(row["seconds"] is None and row["error"] > 0 for row in rows)


def served(of_engine, activations="activation_dtype") -> list[str]:
    """Return the names of tiers without those whose products of 8 bits have no kernel on this CPU."""
    here = unserved(torch.float32, torch.zeros(1, 32, dtype=torch.int8), int8_x=True) is None
    return [tier.name for tier in of_engine if here or getattr(tier, activations) is None]


@pytest.fixture
def small_decoder(monkeypatch):
    monkeypatch.setattr(precision, "SMOKE", precision.Shape(layers=6, width=128, candidates=2, steps=18, prompt=5))


@pytest.mark.filterwarnings("ignore:clvp_fast.paged_attention_decode takes")
def test_precision_tiers_lie_in_the_order_that_their_types_promise(small_decoder):
    rows = {row["provider"]: row for row in all_rows(precision, "cpu", smoke=True)}
    assert list(rows) == served(precision.TIERS, "activations")
    assert all(row["seconds"] for row in rows.values())
    off = {name: row["logits_error"] for name, row in rows.items()}
    for dtype in ("bfloat16", "float16"):
        wide, rounded = rows[dtype], rows[f"{dtype}, residual {dtype}"]
        assert rounded["error"] > 1.3 * wide["error"] and rounded["kl"] > wide["kl"]
        assert wide["error"] < wide["logits_error"]  # the rounding of the weights comes on top
    assert off["float32"] < 1e-5 < off["float16"] < off["bfloat16"] < off["bfloat16, float8 pages"]
    assert rows["float32"]["greedy"] == 1 and all(0.5 < row["greedy"] <= 1 for row in rows.values())


@torch.no_grad()
def test_precision_decodes_as_the_model_computes(small_decoder):
    shape = precision.SMOKE
    model = precision.random_model(shape, "cpu")
    tokens = torch.randint(100, (shape.steps, shape.candidates), generator=torch.Generator().manual_seed(0))
    found = torch.stack(list(precision.logits_along(model, shape, precision.Tier("", torch.float32, 0), tokens)), 1)
    tables, places = model.model.decoder, torch.arange(shape.steps)
    own = tables.input_embeds_layer(tokens.T) + tables.position_embeds_layer(places + (places > 0))
    embeds = torch.cat([precision.random_prompt(shape).expand(shape.candidates, -1, -1), own], 1)
    hidden = model.model(inputs_embeds=embeds, embeds_have_positions=True).last_hidden_state[:, shape.prompt :]
    expected = model.lm_head(model.final_norm(hidden))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 1


def test_a_tier_that_is_off_gets_no_time(small_decoder, monkeypatch):
    tier = precision.Tier("too coarse", torch.bfloat16, 1e-4)
    monkeypatch.setattr(precision, "TIERS", (tier,))
    (row,) = all_rows(precision, "cpu", smoke=True)
    assert row["seconds"] is None and "beyond 0.0001" in row["refused"] and row["logits_error"] > 1e-4


def test_divergence_of_known_distributions():
    exact = torch.tensor([[[0.0, 1.0, 3.0], [2.0, 0.0, -1.0]]]).double()
    same = precision.divergence(exact, exact)
    assert same == {"logits_error": 0.0, "kl": 0.0, "greedy": 1.0}
    moved = precision.divergence(exact + 0.1, exact)
    assert (
        abs(moved["kl"]) < 1e-12
        and moved["greedy"] == 1
        and moved["logits_error"] == pytest.approx(0.1 / float(exact.var(-1).mean()) ** 0.5)
    )
    other = exact.clone()
    other[0, 1] = torch.tensor([0.0, 2.0, -1.0])
    p, q = (torch.softmax(logits[0, 1], -1) for logits in (exact, other))
    found = precision.divergence(other, exact)
    assert found["greedy"] == 0.5 and found["kl"] == pytest.approx(float((p * (p / q).log()).sum()) / 2)


def test_scoring_providers_agree_at_one_length_and_at_their_own():
    found = all_rows(score, "cpu", smoke=True)
    assert len(found) == 5 + 7 and all(row["seconds"] for row in found)
    tokens = {row["provider"]: row["encoded_tokens"] for row in found[5:]}
    assert tokens["clvp_fast engine, trimmed, float32"] == 4 + 6 + 9 and tokens["transformers float32"] == 3 * 12
    assert all(row["flop"] > 0 and row["dtype"] in row["provider"] for row in found)
    ranked = {row["provider"] for row in found if "rank_correlation" in row}
    assert ranked == {f"clvp_fast engine, {mode}, bfloat16" for mode in ("padded", "trimmed")}


def test_ranks_are_compared_by_place():
    expected = torch.tensor([[0.1, 0.5, 0.3, 0.2], [1.0, 3.0, 2.0, 4.0]])
    found = expected.exp()  # the same places
    assert score.ranks(found, expected) == pytest.approx(dict(rank_correlation=1.0, same_best=1.0))
    found[1] = torch.tensor([4.0, 2.0, 3.0, 1.0])
    assert score.ranks(found, expected) == pytest.approx(dict(rank_correlation=0.0, same_best=0.5))
    found[0] = torch.tensor([0.1, 0.5, 0.2, 0.3])  # two places are exchanged: 1 - 6 * 2 / (4 * 15)
    assert score.ranks(found, expected)["rank_correlation"] == pytest.approx((0.8 - 1) / 2)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_generate_draws_every_token_and_tells_the_memory_of_the_engine_alone(monkeypatch, count):
    """Start a process for the memory of each tier."""
    monkeypatch.setitem(tiers.TIERS, "cpu", tiers.TIERS["cpu"][::3][:count])
    found = {row["provider"]: row for row in all_rows(generate, "cpu", smoke=True)}
    assert list(found) == [
        "transformers float32",
        "clvp_fast in transformers' loop, float32",
        "clvp_fast generate(), float32",
        "torch float32, static cache",
        *["clvp_fast engine, float32", "clvp_fast engine, bfloat16, int8 weights"][:count],
    ]
    assert all(row["seconds"] and row["tokens"] == 3 * 5 for row in found.values())
    assert all(row["absent"] == {generate.STATIC: "for a GPU"} for row in found.values())
    for name in list(found)[4:]:
        row = found[name]
        assert row["peak_bytes"] > row["import_bytes"] > 1e8 and row["weights_bytes"] > 1e6
        assert row["kv_bytes"] == (3 + 3) * 16 * 2 * 2 * 128 * (2 if "bfloat16" in name else 4)


def test_transformers_over_a_static_cache_is_judged_by_its_logits(monkeypatch):
    stock = stock_model("cpu", smoke=True)
    expected = generate._forced_logits(stock, "cpu", 9, {})
    static = {"cache_implementation": "static"}
    assert expected.shape == (3, 8194) and not torch.equal(expected[1], expected[2])
    assert tiers.furthest_logit(generate._forced_logits(stock, "cpu", 9, static), expected) < 1e-5
    shape = {"candidates": 2, "new_tokens": 3, "text_tokens": 9}
    arguments = ("name", lambda: stock, static, "cpu", torch.float32, shape, True)
    assert generate._class(*arguments).error < 1e-5
    forced = generate._forced_logits
    monkeypatch.setattr(
        generate, "_forced_logits", lambda *some: forced(*some) * (1.01 if some[-1] else 1)
    )  # a cache that leads elsewhere
    wrong = generate._class(*arguments)
    assert wrong.error > wrong.tolerance


def test_an_engine_that_computes_something_else_is_seen(monkeypatch):
    tier = tiers.TIERS["cpu"][0]
    assert tiers.engine_error(tier, "cpu", True, 30) < tier.tolerance
    step = tiers.PagedDecoder.step
    # Every token a place too late.
    monkeypatch.setattr(
        tiers.PagedDecoder, "step", lambda self, tokens, lens, *rest: step(self, tokens, lens + 1, *rest)
    )
    # It reads what no token has written, which may be NaN.
    assert not tiers.engine_error(tier, "cpu", True, 30) <= 10 * tier.tolerance


def test_a_candidate_without_all_its_tokens_is_no_measurement(monkeypatch):
    engine = tiers.engine_of(tiers.TIERS["cpu"][0], "cpu", True, 3, 5)
    shape = {"candidates": 3, "new_tokens": 5, "text_tokens": 30}
    assert generate.engine_generate(engine, "cpu", shape).codes.shape == (3, 5)
    monkeypatch.setattr(
        generate, "SamplingParams", lambda n, **options: SamplingParams(n, **options | {"max_new_tokens": 4})
    )
    with pytest.raises(RuntimeError, match="should have 5 tokens each"):
        generate.engine_generate(engine, "cpu", shape)


def test_a_voice_is_judged_and_a_first_token_is_the_engines(monkeypatch):
    monkeypatch.setitem(tiers.TIERS, "cpu", tiers.TIERS["cpu"][:2])
    every = {(*row["shape"], row["provider"]): row for row in all_rows(first_token, "cpu", smoke=True)}
    # tests/benchmarks/test_decode_rivals.py tests this rival.
    found = {name: row for name, row in every.items() if not name[1].startswith("ONNX Runtime")}
    assert list(found) == [
        ("clip_seconds", "transformers float32"),
        ("clip_seconds", "clvp_fast float32"),
        ("clip_seconds", "clvp_fast bfloat16"),
        ("text_tokens", "transformers float32"),
        ("text_tokens", "clvp_fast engine, float32"),
        ("text_tokens", "clvp_fast engine, bfloat16"),
    ]
    assert all(row["seconds"] for row in found.values())
    assert 0 < found["clip_seconds", "clvp_fast bfloat16"]["error"] < 5e-2
    assert first_token._voice("", _of_clips_turned_around, "cpu", torch.float32, True).error > 0.1


def _of_clips_turned_around(device, dtype, smoke):
    encoder = stock_model(device, dtype, smoke).conditioning_encoder

    def of_the_clip_turned_around(input_ids, input_features):
        return encoder(input_ids=input_ids, input_features=input_features.flip(2))

    return SimpleNamespace(conditioning_encoder=of_the_clip_turned_around)


def test_a_decode_step_begins_where_transformers_has_come_to():
    found = {row["provider"]: row for row in all_rows(decode_step, "cpu", smoke=True)}
    names = [f"clvp_fast {name}" for name in served(tiers.TIERS["cpu"])]
    rivals = ["transformers float32, no draw", "torch float32, no draw", "torch bfloat16, no draw"]
    here = {f"{one.name}, no draw": all(map(find_spec, one.module.PACKAGES)) for one in decode_rivals.RIVALS}
    assert set(found) == {*rivals, *(name for name, installed in here.items() if installed), *names}
    assert all(row["seconds"] and row["kl"] < 1e-3 and row["greedy"] > 0.9 for row in found.values())
    absent = [decode_step.COMPILED, decode_step.ONE_LAUNCH, *(name for name in here if not here[name])]
    absent += [f"clvp_fast {tier.name}" for tier in tiers.TIERS["cpu"] if f"clvp_fast {tier.name}" not in names]
    assert list(found[rivals[0]]["absent"]) == absent
    layers, head, prompt = 2 * (12 * 128 * 128 + 9 * 128 + 4 * 128), 8194 * 128, 5 + 3
    tokens = 3 * 19 + prompt
    for name, weight, other in ((names[0], 4, 4), (names[1], 2, 2), (names[3], 1, 2), (rivals[2], 2, 2)):
        expected = weight * layers + other * (head + 2 * tokens * 2 * 128 + 2 * 3 * 8194)
        assert found[name]["bytes"] == expected, name
        assert found[name]["flop"] == 2 * 3 * (layers + head) + 4 * 3 * (19 + prompt) * 2 * 128


@pytest.mark.filterwarnings("ignore:clvp_fast.paged_attention_decode takes")
@pytest.mark.parametrize("stored", [16, 31, 33])
def test_stored_candidates_fill_their_pages_in_every_type(stored, monkeypatch):
    monkeypatch.setitem(decode_step.STEPS, "cpu", 4)
    shape = {"candidates": 3, "text_tokens": 5, "stored": stored}
    float8 = tiers.Tier("float8", torch.bfloat16, 5e-2, page_dtype=tiers.FLOAT8)
    for tier in (tiers.TIERS["cpu"][0], float8):
        candidates = decode_step.StoredCandidates(tier, "cpu", True, shape, capture=False)
        assert 0 < decode_step.judged(candidates.logits, "cpu", True, shape)[0] < tier.tolerance
        candidates.run()
        state = candidates.runner.slots.tensors
        assert state["seq_lens"][:3].tolist() == [stored + 2] * 3  # from two before, none has stopped
        candidates.runner.pages.data.view(torch.uint8)[1, 0, 3].fill_(60)
        assert not decode_step.judged(candidates.logits, "cpu", True, shape)[0] < tier.tolerance


def test_transformers_compiled_over_a_static_cache_is_judged_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    monkeypatch.setitem(decode_step.STEPS, "cpu", 4)
    rival = decode_step._compiled_transformers("cpu", {"candidates": 3, "text_tokens": 5, "stored": 18}, True)
    assert rival.error < 1e-5 and rival.calls == 4 and rival.name.startswith(decode_step.COMPILED)
    rival.run()
    rival.run()


def test_a_step_of_one_launch_that_cannot_serve_says_why():
    shape = {"candidates": 3, "text_tokens": 5, "stored": 18}
    with pytest.raises(Absent, match="no persistent decode step"):
        decode_step._one_launch("x", "cpu", shape, True, False)


def test_parts_of_scoring_are_told():
    left, right = torch.randn(300, 300), torch.randn(300, 300)
    parts = score.parts_of(lambda: (left @ right).exp())
    assert set(parts) == {"products", "attention", "rest"} and parts["products"] > 0 and parts["rest"] > 0
    assert not parts["attention"]


def test_feed_forward_kernels_count_as_products():
    x, w = torch.randn(many_rows.FEW_ROWS + 1, 64), torch.randn(64, 64)
    if many_rows.unserved(x, "gelu", w, w):
        pytest.skip("this CPU has no kernel of many rows")
    with torch.inference_mode():
        parts = score.parts_of(lambda: ops.gelu_mlp(x, w, w[0], w, w[0], activation="gelu"))
    assert parts["products"] > parts["rest"]


def test_end_to_end_tells_where_the_time_goes(monkeypatch):
    monkeypatch.setitem(tiers.TIERS, "cpu", tiers.TIERS["cpu"][:1])
    stock, ours = all_rows(end_to_end, "cpu", smoke=True)
    assert list(stock["parts"]) == ["features", "generate"]
    assert list(ours["parts"]) == ["features", "voice", "prompt", "decode", "rank"]
    for row in (stock, ours):
        assert 0.5 * row["seconds"]["median"] < sum(row["parts"].values()) <= 1.001 * row["seconds"]["median"]
        assert row["tokens"] == 16 * 4 and all(part > 0 for part in row["parts"].values())
