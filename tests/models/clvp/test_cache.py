"""The growing cache holds what transformers' dynamic cache holds, whatever generation does to it."""

import pytest
import torch
from transformers import DynamicCache

from clvp_fast.models.clvp import layers
from clvp_fast.models.clvp.cache import GrowingCache, GrowingLayer
from tests.models.clvp.tiny import tiny_inputs, tiny_ours

BATCH, HEADS, HEAD_DIM, LAYERS = 4, 2, 8, 2


@pytest.fixture(autouse=True)
def small_growth(monkeypatch):
    monkeypatch.setattr(GrowingLayer, "growth", 3)


def feed(caches, length: int, generator, batch: int = BATCH) -> None:
    for layer in range(LAYERS):
        key, value = torch.randn(2, batch, HEADS, length, HEAD_DIM, generator=generator)
        results = [cache.update(key.clone(), value.clone(), layer) for cache in caches]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def check_equal(ours: GrowingCache, theirs: DynamicCache) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_operations(seed):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = GrowingCache(), DynamicCache()
    feed((ours, theirs), 5, generator)
    batch = BATCH
    for choice in torch.randint(0, 5, (25,), generator=generator).tolist():
        if choice <= 1:
            feed((ours, theirs), 1 + choice, generator, batch)
        elif choice == 2:
            order = torch.randint(0, batch, (batch,), generator=generator)
            for cache in (ours, theirs):
                cache.reorder_cache(order)
        elif choice == 3 and ours.get_seq_length() > 2:
            for cache in (ours, theirs):
                cache.crop(-2)
        elif choice == 4:
            keep = torch.arange(batch - 1) if batch > 2 else torch.tensor([0, 1, 1])
            for cache in (ours, theirs):
                cache.batch_select_indices(keep)
            batch = len(keep)
        check_equal(ours, theirs)


def test_a_step_copies_nothing_but_its_own_place():
    cache = GrowingCache()
    generator = torch.Generator().manual_seed(0)
    feed((cache, DynamicCache()), 5, generator)
    address = cache.layers[0].keys.data_ptr()
    steps = 0
    while cache.layers[0].keys.data_ptr() == address:
        feed((cache, cache_of(cache)), 1, generator)
        steps += 1
    assert steps == 4, "room for three more, then it grows"


def cache_of(cache: GrowingCache) -> DynamicCache:
    same = DynamicCache()
    for index, layer in enumerate(cache.layers):
        same.update(layer.keys.clone(), layer.values.clone(), index)
    return same


def test_reset_empties():
    cache = GrowingCache()
    feed((cache, DynamicCache()), 5, torch.Generator().manual_seed(0))
    cache.reset()
    fresh = DynamicCache()
    generator = torch.Generator().manual_seed(1)
    feed((cache, fresh), 2, generator)
    check_equal(cache, fresh)


@pytest.mark.parametrize("padded", [False, True])
def test_half_types_attend_over_whole_buffers(padded, monkeypatch):
    model = tiny_ours().to(torch.bfloat16)
    ids, features = tiny_inputs()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
    lengths = []
    attention = layers.ops.rotary_attention

    def watched(query, key, value, **arguments):
        if query.shape[1] == 1 and arguments["query_offset"] is not None:
            lengths.append((key.shape[1], arguments["query_offset"]))
        return attention(query, key, value, **arguments)

    def generate():
        return model.generate(
            ids,
            features.bfloat16(),
            attention_mask=mask,
            max_new_tokens=9,
            output_logits=True,
            return_dict_in_generate=True,
        ).logits

    monkeypatch.setattr(layers.ops, "rotary_attention", watched)
    whole = generate()
    assert lengths and all(keys > offset + 1 for keys, offset in lengths[:2])
    monkeypatch.setattr(layers, "wants_whole_buffers", lambda *arguments: False)
    views = generate()
    for ours, expected in zip(whole, views, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-2)
