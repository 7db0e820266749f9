"""A step is bound once: within it nothing is decided, and what it was bound to is noticed where it changes."""

import sys
from types import CodeType

import pytest
import torch
from torch import nn

from benchmarks.host_step import Requests, calls_of_a_step, random_runner
from benchmarks.precision import round_to_int8
from clvp_fast import native, ops
from clvp_fast.engine import runner as runner_module
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.engine.weights import DecoderWeights
from clvp_fast.models.common import plain
from clvp_fast.ops import checks, dispatch
from tests.engine.test_decoder import Loop, prompts, tiny
from tests.engine.test_runner import GREEDY, SAMPLED, Driver, expected_tokens
from tests.kit import isa

needs_own_attention = isa.needs("paged_attention_decode")


def deciding() -> set[CodeType]:
    """Return the code of all functions that ask which implementation serves a call, or whether a module is plain."""
    functions = [
        dispatch.Operator.choose,
        dispatch.Operator.bind,
        dispatch.Operator._choose,
        dispatch.Operator._refusal,
        dispatch.Operator._registered,
        dispatch.gradient,
        dispatch.interpreted,
        dispatch.missing_for_triton,
        checks.unserved_natively,
        *(value for value in vars(plain).values() if hasattr(value, "__code__")),
    ]
    for operator in dispatch.OPERATORS.values():
        for each in operator.implementations:
            functions += [each.why_not, each.why_not_type, each.missing, each.pays]
    return {function.__code__ for function in functions if hasattr(function, "__code__")}


def entered(call) -> list[CodeType]:
    """Return the code of every Python function that a call enters."""
    found: list[CodeType] = []
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: found.append(frame.f_code) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def decisions(call) -> list[str]:
    asked = deciding()
    return [code.co_qualname for code in entered(call) if code in asked]


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("options", [{}, {"weight_dtype": torch.int8}], ids=["own weights", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_decided_within_a_step(dtype, options, backend):
    """Watch the first step of a kind, which asks all questions, so that none was renamed meanwhile."""
    model = tiny().to(dtype)
    prompt_list = [prompt.to(dtype) for prompt in prompts(tiny())]
    driver = Driver(model, prompt_list, [SAMPLED, GREEDY, SAMPLED], **options)
    with ops.backend(backend):
        for slot in range(3):
            driver.admit(slot, slot)
        asked = decisions(driver.start)
        assert {"Operator.bind", "Operator._choose"} <= set(asked)
        # Without the native library it is its absence that is asked for.
        question = "_refusal" if isa.why_no_library() else "why_not"
        assert backend is not None or any(question in name for name in asked)
        assert "changed_module" not in asked, "the weights were taken when the runner was made"
        assert decisions(driver.start) == []


def test_a_step_of_the_random_checkpoint_enters_few_functions():
    """Bound the number of calls, which was 1968 before steps were bound."""
    if isa.why_unserved("paged_attention_decode", torch.float32):
        pytest.skip("torch's own attention is made of many calls")
    requests = Requests(random_runner(16, 20), 16, 20)
    assert 20 < calls_of_a_step(requests) <= 300


@isa.needs("linear")
def test_a_packed_step_calls_the_library_once_for_all_layers():
    driver = Driver(tiny(), prompts(tiny()), [GREEDY], packed=True)
    driver.admit(0, 0)
    driver.start()  # enters the prompt, too
    driver.start()
    (calls,) = driver.runner._bound.values()
    (together,) = [call for call in calls if isinstance(call, native.Joined)]
    assert len(together.kernels) == 7 * driver.runner.decoder.num_layers + 3


@needs_own_attention
def test_a_forced_backend_is_that_of_the_requests_under_way():
    """Compare their states bit for bit with a runner of that backend; the default's come back after."""
    model = tiny()
    (prompt,) = prompts(model, (9,))

    def states(driver):
        driver.admit(0, len(driver.tokens))
        driver.run()
        return driver.runner.states(0, 40)

    def driver():
        return Driver(model, [prompt] * 4, [GREEDY] * 4, states=True, max_batch=20)

    expected = {}
    for backend in (None, "reference", "torch"):
        with ops.backend(backend):
            expected[backend] = states(driver())
    assert not torch.equal(expected["torch"], expected[None]), "nothing would tell them apart"
    assert not torch.equal(expected["reference"], expected[None]), "nothing would tell them apart"
    bound = driver()
    bound.runner._min_rows = 16  # as in the other ones
    for backend in (None, "reference", "torch", None):
        with ops.backend(backend):
            assert torch.equal(states(bound), expected[backend]), backend


@needs_own_attention
def test_a_forced_backend_serves_all_operators(monkeypatch):
    """Look at the code that runs: references alone under "reference", and none before and after."""
    model = tiny()
    driver = Driver(model, prompts(model)[:1], [SAMPLED])
    names = ("embed", "add_norm", "linear", "gelu_mlp", "paged_attention_decode", "sample")
    references = {dispatch.OPERATORS[name].reference.__code__: name for name in names}

    def served():
        return {references[code] for code in entered(driver.step) if code in references}

    driver.admit(0, 0)
    assert served() == set() and served() == set()
    with ops.backend("reference"):
        assert served() == set(names) and served() == set(names)
    assert served() == set()
    for operator in dispatch.OPERATORS.values():  # what can run is looked up once a process, and other tests interpret
        monkeypatch.setattr(operator, "_refusals", {})
    with ops.backend("triton"), pytest.raises(RuntimeError, match="was forced and cannot serve on cpu"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        driver.step()
    driver.runner.reset()


def test_few_steps_are_kept(monkeypatch):
    monkeypatch.setattr(runner_module, "MAX_BOUND", 2)
    model = tiny()
    driver = Driver(model, prompts(model), [GREEDY] * 3)
    runner, bound = driver.runner, []
    bind = runner._bind
    monkeypatch.setattr(runner, "_bind", lambda rows, shortcuts: bound.append(rows) or bind(rows, shortcuts))
    with torch.inference_mode():
        for rows in (1, 2, 1, 3, 1, 2, 1):
            runner._step(rows)
    assert bound == [1, 2, 3, 2] and len(runner._bound) == 2


@pytest.mark.parametrize("name", ["attn.q_proj", "attn.out_proj", "mlp.c_fc", "input_layernorm"])
@pytest.mark.parametrize("way", ["in place", "moved", "replaced"])
def test_parameters_that_changed_are_those_of_the_next_request(way, name):
    model = tiny()
    (prompt,) = prompts(model, (9,))
    driver = Driver(model, [prompt] * 2, [GREEDY] * 2, states=True)
    driver.admit(0, 0)
    driver.run()
    before = driver.runner.states(0, 40)
    module = model.speech_decoder_model.model.decoder.layers[1].get_submodule(name)
    with torch.no_grad():
        if way == "in place":
            module.weight.mul_(1.5)
        elif way == "moved":
            module.weight.data = module.weight.data * 1.5
        else:
            module.weight = nn.Parameter(module.weight.detach() * 1.5)
    driver.admit(0, 1)
    found = driver.run()[1, 0]
    assert found == expected_tokens(model, prompt)
    assert not torch.allclose(driver.runner.states(0, 40), before, atol=1e-2)
    fresh = Driver(model, [prompt], [GREEDY], states=True)
    fresh.admit(0, 0)
    assert fresh.run()[0, 0] == found and torch.equal(fresh.runner.states(0, 40), driver.runner.states(0, 40))


def test_copies_of_parameters_that_moved_are_told():
    model = tiny()
    driver = Driver(model, prompts(model), [GREEDY] * 3, weight_dtype=torch.int8)
    driver.admit(0, 0)
    driver.run()
    weight = model.speech_decoder_model.model.decoder.layers[0].mlp.c_fc.weight
    weight.data = weight.data * 1.5
    driver.admit(0, 1)
    with pytest.raises(RuntimeError, match=r"moved after copies in 8 bits were made: call engine.refresh\(\)"):
        driver.start()


def test_weights_are_taken_or_the_reason_is_told():
    model = tiny().speech_decoder_model
    weights = DecoderWeights.take(model)
    assert {id(p) for p in weights.parameters()} == {id(p) for p in model.parameters()}
    assert weights.layers[0].mlp_in.weight.is_contiguous() and len(weights.layers[0].projections) == 1

    def told(change):
        other = tiny().speech_decoder_model
        change(other)
        reason = DecoderWeights.take(other)
        with pytest.raises(ValueError, match="^" + reason.split(" ")[0]):
            PagedDecoder(other)
        return reason

    layer = "model.decoder.layers.1"
    hook = told(lambda other: other.get_submodule(f"{layer}.attn").register_forward_hook(lambda *args: None))
    assert hook.startswith(f"module {layer}.attn has hooks or a forward of its own, and the engine reads")
    assert "an embedding does more" in told(
        lambda other: setattr(other.model.decoder.input_embeds_layer, "max_norm", 1.0)
    )

    def dropping(other):
        other.model.decoder.layers[0].mlp.dropout.p = 0.5
        other.train()

    assert "call its eval()" in told(dropping)
    assert "a layer norm has no weight" in told(lambda other: other.final_norm.register_parameter("weight", None))


@pytest.mark.parametrize("options", [{}, {"weight_dtype": torch.int8}], ids=["own weights", "int8"])
def test_an_activation_that_operators_do_not_know(options):
    """Call it between the two products, which are bound as usual."""
    model = tiny(activation_function="laplace")
    assert DecoderWeights.take(model.speech_decoder_model).layers[0].activation is None
    prompt_list = prompts(model)
    driver = Driver(model, prompt_list, [GREEDY] * 3, **options)
    for slot in range(3):
        driver.admit(slot, slot)
    driver.step()
    assert decisions(driver.step) == []
    found = driver.run()
    if options:
        round_to_int8(model.speech_decoder_model)
    assert [found[key, 0] for key in range(3)] == [expected_tokens(model, prompt) for prompt in prompt_list]


def test_a_norm_with_another_eps_is_followed():
    model = tiny()
    (prompt,) = prompts(model)[:1]
    driver = Driver(model, [prompt] * 2, [GREEDY] * 2)
    driver.admit(0, 0)
    driver.run()
    for module in model.speech_decoder_model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5
    driver.admit(0, 1)
    assert driver.run()[1, 0] == expected_tokens(model, prompt) != expected_tokens(tiny(), prompt)


def test_an_activation_with_another_slope_is_followed():
    model = tiny(activation_function="leaky_relu")
    prompt_list = prompts(model)[:1]
    driver = Driver(model, prompt_list * 2, [GREEDY] * 2, states=True)
    driver.admit(0, 0)
    driver.run()
    before = driver.runner.states(0, 40)
    for layer in model.speech_decoder_model.model.decoder.layers:
        layer.mlp.act.negative_slope = 3.0
    driver.admit(0, 1)
    assert driver.run()[1, 0] == expected_tokens(model, prompt_list[0])
    assert not torch.allclose(driver.runner.states(0, 40), before, atol=1e-2)


@pytest.mark.parametrize("options", [{"weight_dtype": torch.int8}, {"page_dtype": torch.float8_e4m3fn}])
def test_scales_have_one_type_whatever_torch_s_default_is(options):
    model = tiny()
    torch.set_default_dtype(torch.float64)
    try:
        driver = Driver(model, prompts(model)[:1], [GREEDY], **options)
    finally:
        torch.set_default_dtype(torch.float32)
    driver.admit(0, 0)
    assert driver.run()[0, 0]


def test_projections_that_cannot_lie_in_a_row():
    """Leave parameters made under inference mode where they are."""
    model = tiny()
    prompt_list = prompts(model)
    expected = [expected_tokens(model, prompt) for prompt in prompt_list]
    with torch.inference_mode():
        for module in model.speech_decoder_model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
        assert len(DecoderWeights.take(model.speech_decoder_model).layers[0].projections) == 3
        driver = Driver(model, prompt_list, [GREEDY] * 3)
    for slot in range(3):
        driver.admit(slot, slot)
    found = driver.run()
    assert [found[key, 0] for key in range(3)] == expected


@torch.inference_mode()
def test_one_step_alone_is_a_bound_one():
    """Leave the results of `PagedDecoder.step` to the caller: another step writes elsewhere."""
    model = tiny()
    loop = Loop(model.speech_decoder_model, prompts(model), [0, 1, 2])
    hidden, logits = loop.step()
    kept = hidden.clone(), logits.clone()
    loop.step()
    assert torch.equal(hidden, kept[0]) and torch.equal(logits, kept[1])
