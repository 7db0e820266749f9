"""`embed` as a kernel: the bits of torch's path, shared positions, ids outside the tables, memory."""

import pytest
import torch

import clvp_fast
from clvp_fast.kernels import embedding
from clvp_fast.ops.embedding import embed
from tests.kernels.device import DEVICE, DTYPES
from tests.kit import Guarded, random, strided


def tables(dtype=torch.float32, width=40):
    shape = {"dtype": dtype, "device": DEVICE}
    return random(50, width, seed=0, **shape), random(20, width, seed=1, **shape)


def ids(*shape, below, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def check(*args):
    out = embed(*args)
    with clvp_fast.backend("torch"):
        assert torch.equal(out, embed(*args))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 768, 1025])
def test_bits_of_the_torch_path(width, dtype):
    check(ids(2, 5, below=50), ids(2, 5, below=20, seed=1), *tables(dtype, width))
    check(ids(3, 1, below=50).int(), ids(1, 1, below=20, seed=1), *tables(dtype, width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_a_sum_of_another_type(dtype, out_dtype):
    args = ids(2, 5, below=50), ids(1, 5, below=20, seed=1), *tables(dtype, 33)
    out = embed(*args, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    with clvp_fast.backend("torch"):
        assert torch.equal(out, embed(*args, out_dtype=out_dtype))


def test_layouts():
    tokens, positions = ids(3, 5, below=50), ids(3, 5, below=20, seed=1)
    token_table, position_table = tables()
    for place in (positions, positions[:1], positions[0], positions[:, :1], positions[0, 0], strided(positions)):
        check(tokens, place, token_table, position_table)
    check(strided(tokens), positions, strided(token_table), strided(position_table))
    check(tokens.T.contiguous().T, positions, token_table.T.contiguous().T, position_table.T.contiguous().T)
    check(tokens[:, None].expand(3, 2, 5), positions[0], token_table, position_table)
    check(tokens[1], positions[1], token_table, position_table)
    check(tokens[1, 1], positions[1, 1], token_table, position_table)
    assert embed(tokens[:0], positions[:1], token_table, position_table).shape == (0, 5, 40)


def test_ids_outside_the_tables_make_rows_of_nan():
    """Not the row of another id, not a fault, and not the neighbours' business."""
    tokens, positions = ids(2, 6, below=50), ids(2, 6, below=20, seed=1)
    tokens[0, 1], tokens[0, 3], positions[1, 2], positions[1, 5] = 50, -1, 20, -(2**40)
    token_table, position_table = tables()
    out = embed(tokens, positions, token_table, position_table)
    bad = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    bad[0, 1] = bad[0, 3] = bad[1, 2] = bad[1, 5] = True
    assert torch.equal(out.isnan(), bad[..., None].expand(-1, -1, 40))
    tokens, positions = tokens.masked_fill(bad, 0), positions.masked_fill(bad, 0)
    assert torch.equal(out[~bad], embed(tokens, positions, token_table, position_table)[~bad])


@pytest.mark.parametrize("width", [40, 1025])
def test_nothing_is_written_outside(width):
    tokens, positions = ids(3, 2, below=50), ids(1, 2, below=20, seed=1).expand(3, -1)
    out = Guarded(3, 2, width, dtype=torch.float32, device=DEVICE)
    embedding.embed(tokens, positions, *(strided(table) for table in tables(width=width)), out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, check(tokens, positions, *tables(width=width)))


def test_registered_and_refused():
    args = ids(2, 3, below=50), ids(1, 3, below=20), *tables(width=8)
    torch.library.opcheck(torch.ops.clvp_fast.embed.default, args)
    torch.library.opcheck(torch.ops.clvp_fast.embed.default, (*args, torch.float16))
    with pytest.raises(RuntimeError, match=r"out_dtype must be float32, float16 or bfloat16, not torch\.float64"):
        embed(*args, out_dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"or bfloat16, not torch\.float64"):
        embed(*args[:2], *tables(torch.float64))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        embed(*args[:2], args[2].clone().requires_grad_(), args[3])
