"""Torch's operations on models: export, compilation, gradient checkpointing, moves between types and devices."""

import copy
from functools import partial

import pytest
import torch
import transformers

import clvp_fast
from tests.models.clvp.builders import (
    SHAPES,
    assert_same,
    clips,
    codes,
    composite_config,
    gradients,
    padding,
    pair,
    texts,
)

HALVES = [torch.bfloat16, torch.float16]


def inputs_of(name: str, batch: int = 2) -> dict:
    if name == "ClvpModelForConditionalGeneration":
        return dict(input_ids=texts(batch), input_features=clips(batch))
    return dict(input_ids=texts(batch) if name == "ClvpEncoder" else codes(batch))


def main_output(outputs) -> torch.Tensor:
    for name in ("logits_per_text", "logits", "embeds", "last_hidden_state"):
        if getattr(outputs, name, None) is not None:
            return getattr(outputs, name)
    raise AssertionError("no main output")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["ClvpEncoder", "ClvpForCausalLM", "ClvpModelForConditionalGeneration"])
def test_export(name, shape):
    stock, ours = pair(name, shape)
    inputs = inputs_of(name)
    if name == "ClvpForCausalLM":
        inputs["use_cache"] = False
    with torch.no_grad():
        exported = torch.export.export(ours, (), inputs, strict=False)
        assert_same(main_output(exported.module()(**inputs)), main_output(stock(**inputs)))


@pytest.mark.parametrize("name", ["ClvpEncoder", "ClvpForCausalLM"])
def test_export_with_mask_and_free_sizes(name):
    stock, ours = pair(name)
    inputs = inputs_of(name) | dict(attention_mask=torch.ones(2, inputs_of(name)["input_ids"].shape[1]))
    if name == "ClvpForCausalLM":
        inputs["use_cache"] = False
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=70)
    free = {key: {0: batch, 1: length} if isinstance(value, torch.Tensor) else None for key, value in inputs.items()}
    with torch.no_grad():
        exported = torch.export.export(ours, (), inputs, dynamic_shapes=free, strict=False).module()
        other = inputs | dict(input_ids=texts(3, 11), attention_mask=padding(3, 11, "right").float())
        assert_same(main_output(exported(**other))[:, :5], main_output(stock(**other))[:, :5])


# The whole model has the other two as parts.
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ClvpEncoder", "ClvpForCausalLM")),
        "ClvpModelForConditionalGeneration",
    ],
)
def test_compile_in_one_graph(name, grad):
    torch._dynamo.reset()
    stock, ours = pair(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    # Another size is compiled anew, with free sizes: once, where it is cheap.
    sizes = (2, 3) if name != "ClvpModelForConditionalGeneration" and not grad else (2,)
    with torch.set_grad_enabled(grad):
        for inputs in map(partial(inputs_of, name), sizes):
            if name == "ClvpForCausalLM":
                inputs["use_cache"] = False
            assert_same(main_output(compiled(**inputs)), main_output(stock(**inputs)))
    if grad:
        for model in (compiled, stock):
            main_output(model(**inputs_of(name))).sin().sum().backward()
        assert_same(gradients(ours), gradients(stock), tolerance=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["ClvpEncoder", "ClvpForCausalLM", "ClvpModelForConditionalGeneration"])
def test_gradient_checkpointing(name, reentrant):
    stock, ours = pair(name, dtype=torch.float64)
    inputs = inputs_of(name)
    if "input_features" in inputs:
        inputs["input_features"] = inputs["input_features"].double()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert ours.is_gradient_checkpointing
    if reentrant:
        ours.enable_input_require_grads()
    for model in (stock, ours):
        main_output(model.train()(**inputs)).sin().sum().backward()
    assert_same(gradients(ours), gradients(stock))
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing


def test_gradient_checkpointing_of_the_conditioning_encoder():
    stock, ours = pair(dtype=torch.float64)
    ours.gradient_checkpointing_enable()
    features = clips(dtype=torch.float64)
    for model in (stock, ours):
        model.train().conditioning_encoder(features, texts()).sin().sum().backward()
    assert_same(gradients(ours), gradients(stock))


@pytest.mark.parametrize("name", ["ClvpEncoder", "ClvpForCausalLM"])
def test_dropout_in_training(name):
    """Try each rate in its place: with all mass dropped the rest is known, and a medium rate changes the output."""
    rates = dict(dropout=0.4, attention_dropout=0.3, resid_pdrop=0.4, embd_pdrop=0.2)
    stock, ours = pair(name, dtype=torch.float64, **rates)
    plain = main_output(ours(**inputs_of(name)))
    torch.manual_seed(0)
    noisy = main_output(ours.train()(**inputs_of(name)))
    assert (noisy - plain).abs().max() > 1e-2
    often = {key: value.repeat(300, 1) for key, value in inputs_of(name).items()}  # each row drops on its own
    with torch.no_grad():
        samples = [main_output(model.train()(**often)).unflatten(0, (300, -1)) for model in (stock, ours)]
    (mean, spread), (own_mean, own_spread) = ((sample.mean(0), sample.std(0)) for sample in samples)
    assert (own_mean - mean).abs().mean() < 0.15 * spread.mean()
    assert abs(own_spread.mean() / spread.mean() - 1) < 0.05


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["ClvpEncoder", "ClvpForCausalLM", "ClvpModelForConditionalGeneration"])
@torch.no_grad()
def test_half_types_lose_only_their_own_precision(name, dtype, tmp_path):
    """Cast by `.to()` and on loading; rotary angles stay in float32 (transformers' raise, or lose them)."""
    _, ours = pair(name)
    inputs = inputs_of(name)
    expected = main_output(ours(**inputs))
    frequencies = {key: value for key, value in ours.state_dict().items() if key.endswith("inv_freq")}
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path, dtype=dtype)
    moved = copy.deepcopy(ours).to(dtype)
    short = copy.deepcopy(ours).half() if dtype == torch.float16 else copy.deepcopy(ours).bfloat16()
    if "input_features" in inputs:
        inputs["input_features"] = inputs["input_features"].to(dtype)
    outputs = [main_output(model(**inputs)) for model in (loaded, moved, short)]
    rounding = torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    for model, output in zip((loaded, moved, short), outputs, strict=True):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype} and output.dtype == dtype
        assert torch.equal(output, outputs[0])
        if name != "ClvpModelForConditionalGeneration":  # its argmax over the prompt may fall to another code
            assert (output.float() - expected).abs().max() < 12 * rounding
        for key, value in frequencies.items():
            assert torch.equal(model.state_dict()[key], value)


@torch.no_grad()
def test_there_and_back():
    stock, ours = pair("ClvpForCausalLM")
    ours(codes())
    for move in (
        lambda model: model.double(),
        lambda model: model.float(),
        lambda model: model.to(torch.float64).to(torch.float32),
        lambda model: model.to("cpu", non_blocking=True),
        copy.deepcopy,
    ):
        ours = move(ours)
        dtype = ours.dtype
        assert_same(ours(codes()).logits, stock.to(dtype)(codes()).logits)
        stock.float()


@pytest.mark.parametrize("name", ["ClvpEncoder", "ClvpForCausalLM", "ClvpModelForConditionalGeneration"])
@torch.no_grad()
def test_meta_device_and_back(name):
    stock, _ = pair(name)
    config = copy.deepcopy(composite_config(clvp_fast))
    if name != "ClvpModelForConditionalGeneration":
        config = config.text_config if name == "ClvpEncoder" else config.decoder_config
    with torch.device("meta"):
        ours = getattr(clvp_fast, name)(config).eval()
    inputs = inputs_of(name)
    outputs = ours(**{key: value.to("meta") for key, value in inputs.items()})
    assert main_output(outputs).device.type == "meta"
    assert main_output(outputs).shape == main_output(stock(**inputs)).shape

    ours = ours.to_empty(device="cpu")
    ours.load_state_dict(stock.state_dict())
    assert_same(main_output(ours(**inputs)), main_output(stock(**inputs)))
    ours.load_state_dict({key: value.clone() for key, value in stock.state_dict().items()}, assign=True)
    assert_same(main_output(ours(**inputs)), main_output(stock(**inputs)))


def test_training_step_after_inference():
    """Train weights that inference has packed, as any others."""
    stock, ours = pair("ClvpForCausalLM", dtype=torch.float64)
    with torch.inference_mode():
        ours(codes())
    losses = []
    for model in (stock, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(codes(), labels=codes(seed=5)).loss
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model(codes())
        losses.append(loss)
    assert_same(losses[1], losses[0])
    assert_same(ours.state_dict(), stock.state_dict())


def test_resized_embeddings():
    stock, ours = pair("ClvpForCausalLM")
    for model in (stock, ours):
        model.resize_token_embeddings(310)
    assert ours.get_input_embeddings().weight.shape == (310, 128) and ours.config.vocab_size == 310
    # transformers leaves the head behind.
    assert ours.lm_head.weight.shape == (310, 128) and stock.lm_head.weight.shape == (300, 128)
    assert ours(codes()).logits.shape[-1] == 310
    assert isinstance(stock, transformers.ClvpForCausalLM)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["ClvpModelForConditionalGeneration", "ClvpForCausalLM", "ClvpEncoder"])
def test_autocast(name, grad):
    """Get stock's dtypes, numbers as near as bfloat16 comes, and gradients in the parameters' own dtype."""
    models = pair(name)
    outputs = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            outputs.append(model(**inputs_of(name))[0])
        if grad:
            outputs[-1].float().square().sum().backward()
    theirs, ours = outputs
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    if grad:
        for key, gradient in gradients(models[1]).items():
            assert gradient is None or (gradient.dtype == torch.float32 and gradient.isfinite().all()), key
