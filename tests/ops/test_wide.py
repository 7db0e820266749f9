"""bfloat16 on a CPU whose own products of it are slow: attention and convolutions in float32, rounded once."""

import pytest
import torch
import torch.nn.functional as F

from clvp_fast import backend
from clvp_fast.models.common.convolution import Conv1d, Conv2d
from clvp_fast.ops import rotary_attention as attention, wide
from tests.kit import queries_keys_values, random


@pytest.fixture(params=[False, True], ids=["fast", "slow"])
def slow(request, monkeypatch):
    monkeypatch.setattr(wide, "_SLOW", request.param)
    return request.param


@pytest.fixture
def seen(monkeypatch):
    """Give the dtypes in which torch attends and convolves."""
    dtypes = set()

    def noting(function):
        def noted(x, *args, **options):
            dtypes.add(x.dtype)
            return function(x, *args, **options)

        return noted

    for name in ("scaled_dot_product_attention", "conv1d", "conv2d"):
        monkeypatch.setattr(F, name, noting(getattr(F, name)))
    monkeypatch.setattr(torch, "matmul", noting(torch.matmul))
    return dtypes


def test_only_bfloat16_on_a_cpu_is_slow(slow):
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert not wide.multiplies_slowly(torch.empty(1, dtype=dtype))
    assert wide.multiplies_slowly(torch.empty(1, dtype=torch.bfloat16)) == slow
    assert not wide.multiplies_slowly(torch.empty(1, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len", [1, 9])
def test_attention(slow, seen, q_len, causal):
    q, k, v = queries_keys_values(2, q_len, 9, 2, 32, seed=3, dtype=torch.bfloat16)
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    with backend("torch"):
        out = attention(q, k, v, mask=mask, causal=causal)
    assert out.dtype == torch.bfloat16
    assert seen == {torch.float32 if slow else torch.bfloat16}
    expected = attention(q.double(), k.double(), v.double(), mask=mask, causal=causal)
    # Rounded once, as every number is by up to 2^-8 of itself.
    room = 2**-8 * expected.abs() + 1e-5 if slow else 0.05
    assert ((out.double() - expected).abs() <= room).all()


@pytest.mark.parametrize("conv, shape", [(Conv1d, (2, 8, 20)), (Conv2d, (2, 8, 12, 20))])
def test_convolutions(slow, seen, conv, shape):
    torch.manual_seed(0)
    module = conv(8, 16, 3, stride=2, padding=1, groups=2).bfloat16()
    x = random(*shape, seed=4, dtype=torch.bfloat16)
    out = module(x)
    expected = module.double()(x.double())
    assert out.dtype == torch.bfloat16 and out.shape == expected.shape
    assert torch.float64 in seen and (torch.float32 in seen) == slow and (torch.bfloat16 in seen) != slow
    room = 2**-8 * expected.abs() + 1e-5 if slow else 0.05
    assert ((out.double() - expected).abs() <= room).all()
