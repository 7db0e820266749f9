"""Sequences one behind another, without padding, are embedded as each is alone."""

import pytest
import torch

from clvp_fast import ClvpEncoder, backend
from tests.models.clvp.builders import SHAPES, assert_same, pair, texts

LENGTHS = [3, 1, 12, 1, 2, 7]


def packed(rows):
    cu_seqlens = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    return torch.cat(rows), cu_seqlens, max(map(len, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", ["text_config", "speech_config"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_as_transformers_embeds_each_alone(shape, part, dtype):
    stock, ours = pair("ClvpEncoder", shape, part, dtype)
    rows = list(texts(1, sum(LENGTHS))[0].split(LENGTHS))
    expected = torch.cat([stock(row[None]).embeds for row in rows])
    assert expected.std(0).min() > 0.01
    assert_same(ours.embed_packed(*packed(rows)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types(dtype):
    _, ours = pair("ClvpEncoder")
    rows = list(texts(1, sum(LENGTHS))[0].split(LENGTHS))
    exact = ours.embed_packed(*packed(rows))
    found = ours.to(dtype).embed_packed(*packed(rows))
    assert found.dtype == dtype
    assert (found - exact).norm() < 0.03 * exact.norm()


@torch.no_grad()
def test_through_the_kernels():
    _, ours = pair("ClvpEncoder")
    rows = list(texts(1, 9)[0].split([1, 5, 3]))
    expected = ours.embed_packed(*packed(rows))
    with backend("kernel"):
        assert_same(ours.embed_packed(*packed(rows)), expected)


def test_without_projection():
    _, ours = pair("ClvpEncoder")
    with pytest.raises(ValueError, match=r"embed_packed\(\) returns projections, and this encoder has none"):
        ClvpEncoder(ours.config, with_projection=False).embed_packed(*packed([texts(1, 5)[0]]))


@torch.no_grad()
def test_replaced_layers_are_called():
    """Call an adapter on a projection for packed sequences too."""
    _, ours = pair("ClvpEncoder")
    row = texts(1, 5)[0]
    before = ours.embed_packed(*packed([row]))
    for layer in ours.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, inputs, output: output + 1)
    after = ours.embed_packed(*packed([row]))
    assert (after - before).abs().max() > 1e-3
    assert_same(after, ours(row[None]).embeds)
