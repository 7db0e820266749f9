"""`embed`: against plain indexing, with gradients, shapes that expand, and what is refused."""

import pytest
import torch

import clvp_fast
from clvp_fast.ops.embedding import embed
from tests.kit import random


def tables(dtype=torch.float32, width=12):
    return random(50, width, seed=0, dtype=dtype), random(20, width, seed=1, dtype=dtype)


def ids(*shape, below, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_added(dtype, backend):
    token_table, position_table = tables(dtype)
    tokens, positions = ids(3, 5, below=50), ids(3, 5, below=20, seed=1)
    with clvp_fast.backend(backend):
        for place in (positions, positions[:1], positions[0], positions[:, :1], positions[0, 0]):
            out = embed(tokens, place, token_table, position_table)
            assert out.shape == (3, 5, 12) and out.dtype == dtype
            for b in range(3):
                for t in range(5):
                    position = place.expand(3, 5)[b, t]
                    assert torch.equal(out[b, t], token_table[tokens[b, t]] + position_table[position])
        out = embed(tokens[0, 0].int(), positions[0, 0].int(), token_table, position_table)
        assert torch.equal(out, token_table[tokens[0, 0]] + position_table[positions[0, 0]])
        assert embed(tokens[:0], positions[:1], token_table, position_table).shape == (0, 5, 12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_rounded_once(dtype, out_dtype, backend):
    token_table, position_table = tables(dtype)
    tokens, positions = ids(3, 5, below=50), ids(1, 5, below=20, seed=1)
    with clvp_fast.backend(backend):
        out = embed(tokens, positions, token_table, position_table, out_dtype=out_dtype)
    total = token_table.float()[tokens] + position_table.float()[positions]
    assert out.dtype == out_dtype and torch.equal(out, total.to(out_dtype))
    args = tokens, positions, token_table, position_table, out_dtype
    torch.library.opcheck(torch.ops.clvp_fast.embed.default, args)


def test_gradients_and_compiled():
    leaves = [table.requires_grad_() for table in tables(torch.float64, width=3)]
    tokens, positions = ids(2, 4, below=50), ids(1, 4, below=20, seed=1)
    tokens[0] = 7  # rows used more than once
    assert torch.autograd.gradcheck(lambda *tables: embed(tokens, positions, *tables), leaves)
    small = [table.detach() for table in leaves]
    torch.library.opcheck(torch.ops.clvp_fast.embed.default, (tokens, positions, *small))
    compiled = torch.compile(lambda ids: embed(ids, positions, *small), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens), embed(tokens, positions, *small))


def test_bad_arguments_are_named():
    token_table, position_table = tables()
    tokens, positions = ids(3, 5, below=50), ids(3, 5, below=20)
    good = {"token_ids": tokens, "position_ids": positions}
    good |= {"token_table": token_table, "position_table": position_table}
    cases = [
        ({"token_ids": tokens.float()}, TypeError, "token_ids must be int32 or int64, not torch.float32"),
        ({"position_ids": positions.bool()}, TypeError, "position_ids must be int32 or int64"),
        ({"position_ids": positions.to("meta")}, ValueError, "position_ids is on meta and token_ids on cpu"),
        ({"position_ids": positions[:2]}, ValueError, r"position_ids must have shape \[3, 5\], .*, not \[2, 5\]"),
        ({"position_ids": positions[None]}, ValueError, "position_ids must have shape"),
        ({"token_table": token_table[0]}, ValueError, "token_table must have shape"),
        (
            {"position_table": position_table[:, :3]},
            ValueError,
            r"position_table must have shape \[num_positions, 12\]",
        ),
        ({"position_table": position_table.double()}, TypeError, "position_table must have the dtype of token_table"),
        ({"token_table": token_table.to("meta")}, ValueError, "token_table is on meta"),
        ({"out_dtype": torch.int64}, TypeError, "out_dtype must be a floating point type, not torch.int64"),
        ({"token_ids": tokens + 50}, IndexError, "out of range"),
        ({"position_ids": positions - 20}, IndexError, "out of range"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            embed(**good | change)
