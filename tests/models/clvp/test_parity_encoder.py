"""`ClvpEncoder` computes what transformers' does."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import clvp_fast
from tests.models.clvp.builders import SHAPES, assert_same, composite_config, gradients, padding, pair, texts

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("part", ["text_config", "speech_config"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_every_output(shape, part, side, dtype):
    stock, ours = pair("ClvpEncoder", shape, part, dtype)
    for length in (4, 13):
        inputs = dict(input_ids=texts(3, length), attention_mask=padding(3, length, side))
        inputs |= dict(output_hidden_states=True, output_attentions=True)
        expected = stock(**inputs)
        assert expected.embeds.std() > 0.1
        assert_same(ours(**inputs), expected)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_single_token(shape):
    stock, ours = pair("ClvpEncoder", shape)
    assert_same(ours(texts(1, 1)), stock(texts(1, 1)))


@torch.no_grad()
def test_embeddings_in_place_of_ids():
    stock, ours = pair("ClvpEncoder")
    embeds = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
    assert_same(ours(inputs_embeds=embeds), stock(inputs_embeds=embeds))
    for model in (stock, ours):
        with pytest.raises(ValueError, match="exactly one of"):
            model()
        with pytest.raises(ValueError, match="exactly one of"):
            model(input_ids=texts(), inputs_embeds=embeds)


@torch.no_grad()
def test_positions():
    """Agree below the length, where transformers' positions end, and go on beyond it."""
    stock, ours = pair("ClvpEncoder", dtype=torch.float64)
    ids = texts(2, 5)
    positions = torch.tensor([[4, 0, 1, 3, 3]])
    expected = stock(ids, position_ids=positions)
    assert (expected.embeds - stock(ids).embeds).abs().max() > 1e-3
    assert_same(ours(ids, position_ids=positions), expected)
    # Rotary attention of queries and keys is relative; that of values is not, so that a shift shows.
    assert (ours(ids, position_ids=positions + 9).embeds - expected.embeds).abs().max() > 1e-3


@torch.no_grad()
def test_forms_of_output():
    stock, ours = pair("ClvpEncoder")
    for asked in ({}, {"output_attentions": True}, {"output_hidden_states": True}):
        expected = stock(texts(), return_dict=False, **asked)
        assert isinstance(expected, tuple)
        assert_same(ours(texts(), return_dict=False, **asked), expected)
    for model in (stock, ours):
        model.config.output_hidden_states = True
    assert_same(ours(texts()), stock(texts()))
    for model in (stock, ours):
        model.config.return_dict = False
    assert_same(ours(texts()), stock(texts()))


@torch.no_grad()
def test_boolean_mask():
    stock, ours = pair("ClvpEncoder")
    mask = padding(2, 7, "right").bool()
    assert_same(ours(texts(), attention_mask=mask), stock(texts(), attention_mask=mask))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape):
    stock, ours = pair("ClvpEncoder", shape, dtype=torch.float64)
    for model in (stock, ours):
        outputs = model(texts(), attention_mask=padding(2, 7, "right"))
        (outputs.embeds.sin().sum() + outputs.last_hidden_state.square().mean()).backward()
    assert_same(gradients(ours), gradients(stock), tolerance=1e-9)


# All but those with parameters of their own.
STATELESS = sorted(set(ACT2FN) - {"prelu", "xielu"})


@pytest.mark.parametrize("activation", STATELESS)
@torch.no_grad()
def test_activations(activation):
    for dtype in DTYPES:
        stock, ours = pair("ClvpEncoder", dtype=dtype, num_hidden_layers=1, hidden_act=activation)
        assert_same(ours(texts()), stock(texts()))
        asked = dict(num_hidden_layers=1, activation_function=activation)
        stock, ours = pair("ClvpDecoder", dtype=dtype, **asked)
        assert_same(ours(texts())[0], stock(texts())[0])


def test_selu_is_documented(monkeypatch):
    """Serve an activation for which transformers raises KeyError, and computes once its table has it."""
    with monkeypatch.context() as patch:
        patch.setitem(ACT2FN, "selu", nn.SELU)
        stock, _ = pair("ClvpEncoder", dtype=torch.float64, hidden_act="selu")
    ours = clvp_fast.ClvpEncoder(composite_config(clvp_fast, hidden_act="selu").text_config).double().eval()
    ours.load_state_dict(stock.state_dict())
    for model in (stock, ours):
        model(texts()).embeds.sin().sum().backward()
    assert_same(gradients(ours), gradients(stock))
    with torch.no_grad():
        assert_same(ours(texts()), stock(texts()))


def test_unknown_activation():
    with pytest.raises(ValueError, match="unknown activation 'wave'"):
        clvp_fast.ClvpEncoder(composite_config(clvp_fast, hidden_act="wave").text_config)
