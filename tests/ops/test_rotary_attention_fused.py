"""`rotary_attention` in plain torch where torch's fused attention is a GPU's, which a stand-in imitates on a CPU."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from clvp_fast.ops import rotary_attention
from tests.kit import generator, queries_keys_values
from tests.kit.backends import on
from tests.ops.test_rotary_attention import B, D, H, check, frequencies, make_mask

HERE = importlib.import_module("clvp_fast.ops.rotary_attention")  # the package's name for it is the function
CUDA = torch.device("cuda")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """SDPA as a GPU's kernels compute it: powers of two, for which the smallest number becomes -inf; of rows of nothing
    but -inf, zeros."""
    assert dropout_p == 0
    scores = q.float() @ k.float().transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if attn_mask is not None:
        assert attn_mask.dtype == q.dtype and not attn_mask.isinf().any()
        scores = scores + attn_mask.float()
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    scores = scores * math.log2(math.e)
    highest = scores.amax(-1, keepdim=True)
    weights = torch.exp2(scores - highest.masked_fill(highest == -torch.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1) @ v.float()).to(v.dtype)


@pytest.fixture
def on_gpu(monkeypatch):
    """Do as torch's path on a GPU, with the stand-in in place of SDPA."""
    alike = HERE._weighs_alike
    monkeypatch.setattr(HERE, "_weighs_alike", lambda device, dtype: alike(CUDA, dtype))
    monkeypatch.setattr(HERE, "_prefers_matmul", lambda q, k, square: False)
    monkeypatch.setattr(HERE, "multiplies_slowly", lambda x: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)


def additive(mask, dtype):
    """Return the additive form of a mask: the smallest number of `dtype` where attention is forbidden."""
    mask = mask[:, None, None] if mask.ndim == 2 else mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("mask", [None, "left", "right", "nothing", "square", "rows"])
@pytest.mark.parametrize("causal", [False, True])
@on("torch", types="dtype", among=TYPES)
def test_masks(backend, on_gpu, dtype, mask, causal):
    for q_len, k_len in ((1, 1), (1, 33), (7, 33), (33, 33)):
        qkv = queries_keys_values(B, q_len, k_len, H, D, seed=k_len + q_len, dtype=dtype)
        allowed = make_mask(mask, B, q_len, k_len)
        out = check(backend, qkv, mask=allowed, causal=causal, **frequencies(k_len))
        if allowed is not None:
            added = additive(allowed, torch.float32)
            torch.testing.assert_close(rotary_attention(*qkv, mask=added, causal=causal, **frequencies(k_len)), out)


@pytest.mark.parametrize("mask_type", [torch.bool, torch.bfloat16, torch.float32, torch.float64])
@on("torch", types="dtype", among=TYPES)
def test_query_without_keys_gets_the_mean_of_all_values(backend, on_gpu, dtype, mask_type):
    """Average all values, also those after it; other queries keep their own keys."""
    q, k, v = queries_keys_values(2, 6, 6, H, D, seed=4, dtype=dtype)
    allowed = torch.rand(2, 1, 6, 6, generator=generator(0)) > 0.4
    allowed[1, :, 2] = False
    allowed[0, :, 0, 0] = False
    mask = allowed if mask_type == torch.bool else additive(allowed, mask_type)
    out = rotary_attention(q * 20, k, v, mask=mask, causal=True)
    for row, query in ((1, 2), (0, 0)):
        expected = v[row].double().mean(0)
        torch.testing.assert_close(out[row, query].double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    alone = rotary_attention(q[:1, 5:] * 20, k[:1], v[:1], mask=allowed[:1, :, 5:], causal=True)
    torch.testing.assert_close(out[:1, 5:], alone)


@pytest.mark.parametrize("mask_type", [torch.float32, torch.float64])
@on("torch", types="dtype", among=TYPES)
def test_a_wider_additive_mask_on_a_cpu(backend, dtype, mask_type):
    """Use a mask whose smallest number does not fit into the scores' type."""
    q, k, v = queries_keys_values(2, 3, 6, H, D, seed=4, dtype=dtype)
    allowed = torch.tensor([[True] * 6, [False] * 6])
    out = rotary_attention(q, k, v, mask=additive(allowed, mask_type))
    expected = v[1].double().mean(0).expand(3, H, D)
    torch.testing.assert_close(out[1].double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_only_a_cpu_weighs_equal_scores_alike():
    assert not any(HERE._weighs_alike(CUDA, dtype) for dtype in TYPES)
    assert HERE._weighs_alike(torch.device("cpu"), torch.float32)
