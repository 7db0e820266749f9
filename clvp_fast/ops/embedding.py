"""Token and position embeddings, added.

out = token_table[token_ids] + position_table[position_ids]
"""

import torch
import torch.nn.functional as F

from clvp_fast.ops.binding import BoundCall, Scratch, writing
from clvp_fast.ops.checks import check_floating, check_same, shape_error, unserved_by_triton
from clvp_fast.ops.dispatch import Implementation, Operator, needs_grad


def reference(token_ids, position_ids, token_table, position_table, out_dtype=None, gap=None):
    if gap is not None:
        position_ids = torch.where(position_ids > 0, position_ids + gap, 0)
    wide = torch.promote_types(token_table.dtype, torch.float32)
    total = token_table[token_ids].to(wide) + position_table[position_ids].to(wide)
    return total.to(out_dtype or token_table.dtype)


def _torch(token_ids, position_ids, token_table, position_table, out_dtype=None, gap=None):
    if gap is not None:
        position_ids = F.threshold(position_ids + gap, gap, 0)
    rows, places = F.embedding(token_ids, token_table), F.embedding(position_ids, position_table)
    if out_dtype in (None, rows.dtype):
        return rows + places
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(wide) + places.to(wide)).to(out_dtype)


def _fake(token_ids, position_ids, token_table, position_table, out_dtype=None, gap=None):
    return token_table.new_empty((*token_ids.shape, token_table.shape[1]), dtype=out_dtype)


def _why_not_type(device, dtype):
    return unserved_by_triton("the tables", dtype)


def _why_not(token_ids, position_ids, token_table, position_table, out_dtype=None, gap=None):
    for name, dtype in (("the tables", token_table.dtype), ("out_dtype", out_dtype or token_table.dtype)):
        if reason := unserved_by_triton(name, dtype):
            return reason
    return None


def _triton(token_ids, position_ids, token_table, position_table, out_dtype=None, gap=None, *, out=None):
    from clvp_fast.kernels import embedding

    out = _fake(token_ids, position_ids, token_table, position_table, out_dtype) if out is None else out
    if out.numel():
        length = token_ids.shape[-1] if token_ids.ndim else 1
        positions = position_ids.expand(token_ids.shape).reshape(-1, length)
        tables = (table if table.stride(1) == 1 else table.contiguous() for table in (token_table, position_table))
        results = out.view(-1, length, out.shape[-1])
        embedding.embed(token_ids.reshape(-1, length), positions, *tables, gap, out=results)
    return out


_OPERATOR = Operator(
    "embed",
    "(Tensor token_ids, Tensor position_ids, Tensor token_table, Tensor position_table, ScalarType? out_dtype=None, "
    "int? gap=None) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations=(
        Implementation("triton", _triton, _why_not, _why_not_type, bind=writing(_triton)),
        Implementation("torch", _torch),
    ),
)


def _check_ids(name, ids, token_ids):
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {ids.dtype}")
    check_same(name, ids, "token_ids", token_ids, dtype=False)


def embed(
    token_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Add the embeddings of tokens and of their positions.

    Args:
        token_ids: `[...]`, int32 or int64, rows of `token_table`.
        position_ids: int32 or int64, rows of `position_table`; of the shape of `token_ids` or one that expands to it.
        token_table: `[num_tokens, C]`.
        position_table: `[num_positions, C]`, of the dtype of `token_table`.
        out_dtype: dtype of the result, which is rounded once; None: that of the tables.

    Returns:
        `[..., C]`, the shape of `token_ids` and the tables' width.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not match.
        IndexError: an id outside its table, from torch on a CPU. On a GPU, where an error would have to wait for the
            device, the kernel makes the rows of such ids NaN.
    """
    args = (token_ids, position_ids, token_table, position_table, out_dtype)
    _check(*args)
    grad = "an embedding table requires grad" if needs_grad(token_table, position_table) else None
    return _OPERATOR.choose(args, grad)(*args)


def bind_embed(
    out: torch.Tensor,
    scratch: Scratch,
    token_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    gap: int | None = None,
) -> BoundCall:
    """Bind `embed` of these arguments into `out`, in its dtype, as `Operator.bind` does.

    With a `gap`, `position_ids` are numbers of tokens before: a token behind n others has position n + gap, one behind
    none (or a negative number) has position 0.
    """
    args = (token_ids, position_ids, token_table, position_table, out.dtype)
    _check(*args)
    return _OPERATOR.bind((*args, gap), out, scratch)


def _check(token_ids, position_ids, token_table, position_table, out_dtype):
    check_floating("out_dtype", out_dtype)
    _check_ids("token_ids", token_ids, token_ids)
    _check_ids("position_ids", position_ids, token_ids)
    if token_table.ndim != 2:
        raise shape_error("token_table", "[num_tokens, width]", token_table)
    if position_table.ndim != 2 or position_table.shape[1] != token_table.shape[1]:
        raise shape_error("position_table", f"[num_positions, {token_table.shape[1]}]", position_table)
    check_same("token_table", token_table, "token_ids", token_ids, dtype=False)
    check_same("position_table", position_table, "token_table", token_table)
    shape, whole = position_ids.shape, token_ids.shape
    # Axes are compared from the last one back: each is equal, or 1, or absent.
    if len(shape) > len(whole) or any(a not in (1, b) for a, b in zip(shape[::-1], whole[::-1], strict=False)):
        raise shape_error("position_ids", f"{list(whole)}, that of token_ids, or one that expands to it", position_ids)
