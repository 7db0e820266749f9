"""Products over int8 weights at the decoder's sizes: a row's bits in any company, and no wider copy of the weights."""

import pytest
import torch

from clvp_fast.engine.products import Product, in_int8
from clvp_fast.ops import gelu_mlp, linear
from tests.kit import random

pytestmark = pytest.mark.gpu
SIZES = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COUNTS = (1, 2, 15, 16, 17, 32, 33, 63, 64, 65, 100, 128, 129, 200, 256, 257, 400)


def layer(outs, columns, seed, dtype):
    weight = random(outs, columns, seed=seed, scale=columns**-0.5, device="cuda")
    return in_int8(Product(weight, random(outs, seed=seed + 1, dtype=dtype, device="cuda")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_row_has_its_bits_among_any_others(sizes, dtype):
    product = layer(*sizes, 1, dtype)
    x = random(3000, sizes[1], seed=3, dtype=dtype, device="cuda")

    def run(rows):
        return linear(rows, product.weight, product.bias, scale=product.scale, activation="gelu_new")

    whole = run(x)
    for count in COUNTS:
        for first in (0, 1, 511):
            assert torch.equal(run(x[first : first + count]), whole[first : first + count]), (count, first)
    exact = x[:16].double() @ (product.weight.double() * product.scale[:, None]).T + product.bias.double()
    expected = torch.nn.functional.gelu(exact, approximate="tanh")
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (whole[:16].double() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_so_has_a_row_of_the_feed_forward_block(dtype):
    """Up to 512 rows, where the second sum is split."""
    first, second = layer(4096, 1024, 1, dtype), layer(1024, 4096, 3, dtype)
    weights = first.weight, first.bias, second.weight, second.bias
    x, residual = random(512, 1024, seed=5, dtype=dtype, device="cuda"), random(512, 1024, seed=6, device="cuda")

    def run(rows):
        scales = dict(scale_in=first.scale, scale_out=second.scale)
        return gelu_mlp(x[rows], *weights, residual=residual[rows], **scales)

    whole = run(slice(None))
    assert whole.dtype == torch.float32
    for count in COUNTS:
        for start in (0, 1, 112):
            rows = slice(start, start + count)
            assert torch.equal(run(rows), whole[rows]), (count, start)


@pytest.mark.parametrize("rows", [1, 256])
def test_no_wider_copy_of_the_weights_is_made(rows):
    product = layer(4096, 1024, 1, torch.bfloat16)
    x = random(rows, 1024, seed=3, dtype=torch.bfloat16, device="cuda")
    product(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = product(x)
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + 512
