"""`ClvpDecoder`, `ClvpModel` and `ClvpForCausalLM` compute what transformers' do."""

import pytest
import torch

from tests.models.clvp.builders import SHAPES, assert_same, codes, gradients, padding, pair

CLASSES = ["ClvpDecoder", "ClvpModel", "ClvpForCausalLM"]


def cache_of(outputs) -> dict:
    """Return the cache, under the name that the output uses."""
    return {key: value for key, value in outputs.items() if key in ("cache", "past_key_values")}


def flat(outputs) -> dict:
    """Return an output without the cache, whose classes differ."""
    return {key: value for key, value in outputs.items() if key not in cache_of(outputs)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_every_output(name, shape, dtype):
    stock, ours = pair(name, shape, dtype=dtype)
    for use_cache in (False, True):
        inputs = dict(use_cache=use_cache, output_hidden_states=True, output_attentions=True)
        expected = stock(codes(), **inputs)
        assert expected[0].std() > 0.1
        found = ours(codes(), **inputs)
        assert_same(flat(found), flat(expected))
        assert list(found) == list(expected) and bool(cache_of(found)) == use_cache


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cache_holds_the_same_and_continues(shape):
    stock, ours = pair("ClvpForCausalLM", shape, dtype=torch.float64)
    ids, whole = codes(2, 12), {}
    for model in (stock, ours):
        outputs = model(ids[:, :7], use_cache=True)
        logits = [outputs.logits]
        for piece in (ids[:, 7:8], ids[:, 8:11], ids[:, 11:]):
            outputs = model(piece, **cache_of(outputs), use_cache=True)
            logits.append(outputs.logits)
        (cache,) = cache_of(outputs).values()
        assert cache.get_seq_length() == 12
        whole[model] = torch.cat(logits, dim=1)
        whole[model, "cache"] = [(layer.keys, layer.values) for layer in cache.layers]
    assert_same(whole[ours], whole[stock])
    assert_same(whole[ours, "cache"], whole[stock, "cache"])
    assert_same(whole[ours], ours(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(side):
    """Compare the places of real tokens, as results at padding have no meaning."""
    stock, ours = pair("ClvpForCausalLM", dtype=torch.float64)
    mask = padding(3, 10, side)
    expected, found = (model(codes(3, 10), attention_mask=mask).logits[mask.bool()] for model in (stock, ours))
    plain = stock(codes(3, 10)).logits[mask.bool()]
    assert side == "right" or (expected - plain).abs().max() > 1e-3
    assert_same(found, expected)

    # A cached step behind the padding.
    step = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    results = []
    for model in (stock, ours):
        cache = cache_of(model(codes(3, 10), attention_mask=mask, use_cache=True))
        results.append(model(codes(3, 1), attention_mask=step, **cache).logits)
    assert_same(results[1], results[0])


@torch.no_grad()
def test_positions_token_types_and_embeddings():
    stock, ours = pair("ClvpForCausalLM", "heads80", dtype=torch.float64)
    embeds = torch.randn(2, 9, 80, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    plain = stock(codes()).logits
    for inputs in (
        dict(input_ids=codes(), position_ids=torch.tensor([[5, 5, 79, 0, 1, 2, 3, 4, 6]])),
        dict(input_ids=codes(), token_type_ids=codes(seed=9)),
        dict(inputs_embeds=embeds),
        dict(inputs_embeds=embeds, position_ids=torch.arange(9)[None] + 11, token_type_ids=codes(seed=9)),
    ):
        expected = stock(**inputs).logits
        assert (expected - plain).abs().max() > 1e-2
        assert_same(ours(**inputs).logits, expected)
    for model in (stock, ours):
        with pytest.raises(ValueError, match="exactly one of"):
            model()


@torch.no_grad()
def test_forms_of_output():
    for name in CLASSES:
        stock, ours = pair(name)
        for asked in ({}, {"output_attentions": True}, {"output_hidden_states": True}, {"labels": codes()}):
            if "labels" in asked and name != "ClvpForCausalLM":
                continue
            asked = {"use_cache": False, "return_dict": False, **asked}
            expected = stock(codes(), **asked)
            assert isinstance(expected, tuple)
            assert_same(ours(codes(), **asked), expected)
        for model in (stock, ours):
            model.config.output_hidden_states = model.config.output_attentions = True
            model.config.use_cache = False
        assert_same(ours(codes()), stock(codes()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_loss(dtype):
    stock, ours = pair("ClvpForCausalLM", dtype=dtype)
    labels = codes(seed=6)
    labels[0, :5] = -100
    expected = stock(codes(), labels=labels).loss
    assert expected > 1
    assert_same(ours(codes(), labels=labels).loss, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape):
    stock, ours = pair("ClvpForCausalLM", shape, dtype=torch.float64)
    for model in (stock, ours):
        model(codes(), labels=codes(seed=6), attention_mask=padding(2, 9, "right")).loss.backward()
    found, expected = gradients(ours), gradients(stock)
    assert len(found) == len(list(stock.parameters()))
    assert_same(found, expected)
