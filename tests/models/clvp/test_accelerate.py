"""`clvp_fast.accelerate`: ours over the parameters of a live model of transformers."""

import copy
import gc

import pytest
import torch
import transformers
from torch import nn

import clvp_fast
from clvp_fast import accelerate
from tests.models.clvp.builders import SHAPES, STOP, assert_same, clips, codes, composite_config, randomize, texts
from tests.models.clvp.test_parity_generation import TOKENS, oracle, prompt

PARTS = {
    "ClvpForCausalLM": "decoder_config",
    "ClvpModel": "decoder_config",
    "ClvpDecoder": "decoder_config",
    "ClvpEncoder": "speech_config",
}


def stock_model(shape: str = "heads64", class_name: str = "ClvpModelForConditionalGeneration", **changes):
    config = composite_config(transformers, shape, **changes)
    part = PARTS.get(class_name)
    return randomize(getattr(transformers, class_name)(getattr(config, part) if part else config)).eval()


def stored_bytes(*models) -> int:
    """Count the bytes of all different storages of the models' parameters."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("shape", SHAPES)
def test_same_parameters_and_same_tokens(shape):
    stock = stock_model(shape)
    size = stored_bytes(stock)
    ours = accelerate(stock)
    assert type(ours) is clvp_fast.ClvpModelForConditionalGeneration
    theirs = dict(stock.named_parameters())
    assert set(theirs) == {name for name, _ in ours.named_parameters()}
    assert all(parameter is theirs[name] for name, parameter in ours.named_parameters())

    cond = prompt(stock, texts(3), clips(3)).detach()
    settings = dict(do_sample=False, repetition_penalty=1.5, max_new_tokens=16)
    expected = oracle(stock, cond, **settings)
    for use_engine in (True, False):
        found = ours.generate(texts(3), clips(3), return_dict_in_generate=True, use_engine=use_engine, **settings)
        assert found.sequences.tolist() == expected.tolist() and len(expected.unique()) > 4
    with torch.no_grad():
        inputs = dict(input_ids=texts(), input_features=clips())
        assert_same(ours(**inputs).logits_per_text, stock(**inputs).logits_per_text)
    # Ours moves parameters into the storage that it likes: theirs are in it too, and it is no more of it.
    assert stored_bytes(stock, ours) == size
    assert oracle(stock, cond, **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("class_name", PARTS)
def test_parts(class_name):
    stock = stock_model(class_name=class_name)
    ours = accelerate(stock)
    assert type(ours) is getattr(clvp_fast, class_name)
    for found, expected in zip(ours.parameters(), stock.parameters(), strict=True):
        assert found is expected
    ids = codes(2, 9)
    with torch.no_grad():
        assert_same(ours(ids)[0], stock(ids)[0])
    assert ours.config.to_dict() | {"transformers_version": 0} == stock.config.to_dict() | {"transformers_version": 0}


def test_a_part_of_a_composite():
    stock = stock_model()
    decoder = accelerate(stock.speech_decoder_model)
    cond = prompt(stock, texts(), clips()).detach()
    found = decoder.generate(conditioning_embeds=cond, max_new_tokens=8, **TOKENS)
    assert found.tolist() == oracle(stock, cond, max_new_tokens=8, do_sample=False).tolist()


def test_ours_is_returned_as_it_is():
    for model in (accelerate(stock_model()), accelerate(stock_model(class_name="ClvpEncoder"))):
        assert accelerate(model) is model


def test_training_one_moves_the_other():
    stock = stock_model()
    frozen = stock.speech_decoder_model.lm_head.bias.requires_grad_(False)
    gradients = []
    stock.speech_decoder_model.lm_head.weight.register_hook(lambda gradient: gradients.append(gradient.norm().item()))
    ours = accelerate(stock)
    assert not frozen.requires_grad and not ours.speech_decoder_model.lm_head.bias.requires_grad
    assert sum(p.requires_grad for p in ours.parameters()) == len(list(ours.parameters())) - 1
    ours.generate(texts(), clips(), max_new_tokens=2)  # parameters move in memory here

    optimizer = torch.optim.SGD([p for p in stock.parameters() if p.requires_grad], lr=0.1)
    before = stock.speech_decoder_model(codes()).logits.detach().clone()
    ours.speech_decoder_model(codes(), labels=codes()).loss.backward()
    assert len(gradients) == 1 and gradients[0] > 0, "a parameter's own hooks must stay"
    optimizer.step()
    with torch.no_grad():
        after = stock.speech_decoder_model(codes()).logits
        assert (after - before).abs().max() > 1e-3
        assert_same(ours.speech_decoder_model(codes()).logits, after)
        stock.speech_decoder_model.lm_head.bias[STOP] += 100.0
    sequences = ours.generate(texts(), clips(), max_new_tokens=5, return_dict_in_generate=True).sequences
    assert sequences[:, 1].tolist() == [STOP, STOP], "what is set in one is seen in the other"


def test_modes_settings_and_dtypes_are_kept():
    stock = stock_model(dropout=0.1, resid_pdrop=0.1).train().double()
    stock.text_encoder_model.eval()
    stock.generation_config.update(max_new_tokens=7, repetition_penalty=3.0)
    stock.speech_decoder_model.generation_config.update(top_k=9)
    ours = accelerate(stock)
    assert ours.training and not ours.text_encoder_model.training and not ours.text_encoder_model.layers[0].training
    assert ours.dtype == torch.float64 and ours.device.type == "cpu"
    assert ours.generation_config.to_dict() == stock.generation_config.to_dict()
    assert ours.speech_decoder_model.generation_config.top_k == 9
    ours.generation_config.max_new_tokens = 3
    assert stock.generation_config.max_new_tokens == 7
    assert ours.eval().generate(texts(), clips(dtype=torch.float64))[0].shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_stay_in_float32(dtype):
    stock = stock_model()
    expected = copy.deepcopy(accelerate(stock)).to(dtype)
    ours = accelerate(stock.to(dtype))
    assert ours.dtype == dtype and not any(b.device.type == "meta" for b in ours.buffers())
    for name, buffer in expected.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(ours.get_buffer(name), buffer)
    with torch.no_grad():
        assert torch.equal(ours.get_text_features(texts()).embeds, expected.get_text_features(texts()).embeds)


def test_both_are_saved_and_loaded(tmp_path):
    stock = stock_model()
    ours = accelerate(stock)
    ours.generate(texts(), clips(), max_new_tokens=2)
    expected = {name: value.clone() for name, value in stock.state_dict().items()}
    for model in (stock, ours):
        model.save_pretrained(tmp_path / type(model).__module__)
        loaded = clvp_fast.ClvpModelForConditionalGeneration.from_pretrained(tmp_path / type(model).__module__)
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    stock.load_state_dict({name: value + 1 for name, value in expected.items()})
    assert torch.equal(ours.logit_scale, expected["logit_scale"] + 1)


def test_the_accelerated_model_is_not_kept_alive():
    stock = stock_model()
    ours = accelerate(stock)
    kept = [id(p) for p in ours.parameters()]
    del stock
    gc.collect()
    assert kept == [id(p) for p in ours.parameters()]
    assert ours.generate(texts(), clips(), max_new_tokens=2)[0].shape == (2, 2)


class Sub(transformers.ClvpEncoder):
    pass


@pytest.mark.parametrize("model", [None, "susnato/clvp_dev", nn.Linear(2, 2), torch.ones(1)], ids=str)
def test_other_models_are_refused(model):
    with pytest.raises(TypeError, match=r"takes a CLVP model of transformers \(ClvpModelForCond.* or a Text"):
        accelerate(model)


def test_subclasses_and_wrappers_are_refused():
    config = composite_config(transformers).text_config
    with pytest.raises(TypeError, match=r"not tests\.models\.clvp\.test_accelerate\.Sub"):
        accelerate(Sub(config))
    with pytest.raises(TypeError, match=r"not tests\.models\.clvp\.test_accelerate\.ClvpEncoder"):
        accelerate(type("ClvpEncoder", (Sub,), {"__module__": __name__})(config))
    with pytest.raises(TypeError, match="give the model inside"):
        accelerate(torch.compile(transformers.ClvpEncoder(config), backend="eager"))


class Adapter(nn.Linear):
    pass


def replaced(model):
    model.layers[1].self_attn.q_proj = Adapter(128, 128)


def added(model):
    model.layers[1].self_attn.q_proj.extra = nn.Linear(2, 2)


def hooked(model):
    model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: None)


def hooked_backward(model):
    model.layers[1].mlp.register_full_backward_hook(lambda module, inputs, output: None)


def overridden(model):
    model.layers[1].mlp.forward = model.layers[1].mlp.forward


def compiled(model):
    model.layers[1].mlp.compile(backend="eager")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (replaced, r"module layers\.1\.self_attn\.q_proj is a tests\..*Adapter, .* merge or take off"),
        (added, r"module layers\.1\.self_attn\.q_proj\.extra is a torch\.nn.*Linear, .* merge or take off"),
        (hooked, r"module layers\.1\.mlp has hooks, .* put them on what accelerate\(\) returns"),
        (hooked_backward, r"module layers\.1\.mlp has hooks"),
        (overridden, r"module layers\.1\.mlp has hooks, a forward of its own"),
        (compiled, r"module layers\.1\.mlp has hooks, a forward of its own, or is compiled"),
    ],
)
def test_modules_that_do_more_are_refused(change, match):
    model = stock_model(class_name="ClvpEncoder")
    change(model)
    with pytest.raises(ValueError, match=match):
        accelerate(model)


def test_parameters_that_the_configuration_does_not_describe():
    model = stock_model(class_name="ClvpForCausalLM")
    model.lm_head.weight = nn.Parameter(torch.ones(7, 128))
    with pytest.raises(ValueError, match=r"not those that the model's configuration describes(.|\n)*lm_head\.weight"):
        accelerate(model)
