"""`embed`: plain indexing on every backend, layouts, what is outside the tables, memory, gradients, what is refused."""

import pytest
import torch

from clvp_fast.kernels import embedding
from clvp_fast.ops.binding import Scratch
from clvp_fast.ops.embedding import bind_embed, embed
from tests.kit import Guarded, random, strided
from tests.kit.backends import TRITON, on
from tests.kit.operators import opcheck

EVERY = ("reference", "torch", *TRITON)


def tables(dtype=torch.float32, width=12, device="cpu"):
    return tuple(random(rows, width, seed=seed, dtype=dtype, device=device) for seed, rows in enumerate((50, 20)))


def ids(*shape, below, seed=0, device="cpu"):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def operands(device, *shape, **options):
    """Make tokens, positions and both tables."""
    numbers = ids(*shape, below=50, device=device), ids(*shape, below=20, seed=1, device=device)
    return *numbers, *tables(device=device, **options)


def check(tokens, positions, token_table, position_table, out_dtype=None):
    """Check that each row is the sum of its two, rounded once: from float32, or from float64 where the tables are."""
    out = embed(tokens, positions, token_table, position_table, out_dtype=out_dtype)
    wide = torch.promote_types(token_table.dtype, torch.float32)
    total = token_table.to(wide)[tokens.long()] + position_table.to(wide)[positions.expand(tokens.shape).long()]
    dtype = out_dtype or token_table.dtype
    assert out.dtype == dtype and torch.equal(out, total.to(dtype))
    return out


@pytest.mark.parametrize("width", [1, 12, 31, 768, 1025])
@on(*EVERY, types="dtype")
def test_rows_are_added(backend, dtype, width):
    tokens, positions, *both = operands(backend.device, 2, 5, dtype=dtype, width=width)
    check(tokens, positions, *both)
    check(tokens[:, :1].int(), positions[:1, :1], *both)
    check(tokens[0, 0].int(), positions[0, 0].int(), *both)
    assert embed(tokens[:0], positions[:1], *both).shape == (0, 5, width)


@on(*EVERY, types="dtype, out_dtype")
def test_a_sum_of_another_type(backend, dtype, out_dtype):
    tokens, positions, *both = operands(backend.device, 3, 5, dtype=dtype, width=33)
    check(tokens, positions[:1], *both, out_dtype=out_dtype)


@on(*EVERY)
def test_layouts(backend):
    tokens, positions, token_table, position_table = operands(backend.device, 3, 5, width=40)
    for place in (positions, positions[:1], positions[0], positions[:, :1], positions[0, 0], strided(positions)):
        check(tokens, place, token_table, position_table)
    check(strided(tokens), positions, strided(token_table), strided(position_table))
    check(tokens.T.contiguous().T, positions, token_table.T.contiguous().T, position_table.T.contiguous().T)
    check(tokens[:, None].expand(3, 2, 5), positions[0], token_table, position_table)
    check(tokens[1], positions[1], token_table, position_table)
    check(tokens[1, 1], positions[1, 1], token_table, position_table)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
@on(*TRITON)
def test_ids_outside_the_tables_make_rows_of_nan(backend, kind):
    """Make such a row NaN, without a fault, another id's row, or a change to neighbours."""
    tokens, positions, *both = operands(backend.device, 2, 6, width=40)
    tokens = tokens.to(kind)
    tokens[0, 1], tokens[0, 3] = 50, -1
    positions[0, 5], positions[1, 2], positions[1, 5] = -1, 20, -(2**40)
    out = embed(tokens, positions, *both)
    bad = torch.zeros(2, 6, dtype=torch.bool, device=backend.device)
    bad[0, 1] = bad[0, 3] = bad[0, 5] = bad[1, 2] = bad[1, 5] = True
    assert torch.equal(out.isnan(), bad[..., None].expand(-1, -1, 40))
    tokens, positions = tokens.masked_fill(bad, 0), positions.masked_fill(bad, 0)
    assert torch.equal(out[~bad], embed(tokens, positions, *both)[~bad])


@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
@on(*EVERY)
def test_positions_behind_stored_tokens(backend, kind, gap):
    stored = torch.tensor([-1, 0, 1, 2, 16, -(2**31)], dtype=kind, device=backend.device)
    positions = torch.tensor([0, 0, 1 + gap, 2 + gap, 16 + gap, 0], device=backend.device)
    tokens, both = ids(6, below=50, device=backend.device), tables(device=backend.device, width=40)
    out = torch.full((6, 40), torch.nan, device=backend.device)
    for numbers in (stored, strided(stored)):
        bind_embed(out, Scratch(6, backend.device), tokens, numbers, *both, gap)()
        assert torch.equal(out, embed(tokens, positions, *both))


@pytest.mark.parametrize("width", [40, 1025])
@on(*TRITON)
def test_nothing_is_written_outside(backend, width):
    tokens, positions, *both = operands(backend.device, 3, 2, width=width)
    positions = positions[:1].expand(3, -1)
    out = Guarded(3, 2, width, dtype=torch.float32, device=backend.device)
    embedding.embed(tokens, positions, *map(strided, both), out=out.tensor)
    out.check()
    assert torch.equal(out.tensor, check(tokens, positions, *both))


@on("default", *TRITON, types="dtype", among=(torch.float32, torch.bfloat16))
def test_registered(backend, dtype):
    tokens, positions, *both = operands(backend.device, 3, 5, dtype=dtype)
    for out_dtype in (None, *({torch.float32, torch.float16, torch.float64} & {*backend.dtypes})):
        opcheck(backend, torch.ops.clvp_fast.embed.default, (tokens, positions[:1], *both, out_dtype))
    opcheck(backend, torch.ops.clvp_fast.embed.default, (tokens, positions - 10, *both, None, 1))


@on(*TRITON)
def test_unserved_arguments_are_named(backend):
    args = operands(backend.device, 2, 3, width=8)
    with pytest.raises(RuntimeError, match=r"out_dtype must be float32, float16 or bfloat16, not torch\.float64"):
        embed(*args, out_dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"or bfloat16, not torch\.float64"):
        embed(*args[:2], *(table.double() for table in args[2:]))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
        embed(*args[:2], args[2].clone().requires_grad_(), args[3])


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
