"""Token and position embeddings, gathered and added in one launch.

    out[b, t] = token_table[token_ids[b, t]] + position_table[position_ids[b, t]]

token_ids, position_ids: `[batch, length]`, int32 or int64, any strides (0 where positions are shared); tables
`[rows, width]` of one of float32, float16, bfloat16, a row's elements side by side; out `[batch, length, width]`,
contiguous, of any of the three. The sum is computed in float32 and rounded once. An id outside its table reads nothing
and makes its row NaN: there is no device fault, and the result shows the mistake.

Moved: two rows in and one out for each position; two gathers and an addition would move six and take three launches. A
decode step is dominated by the launch: 16 positions of 1024 bfloat16 elements are 96 KB. There positions follow, in the
same launch, from the numbers of stored tokens.
"""

import torch
import triton
import triton.language as tl

# The elements of a row that one program adds, and its warps, 2026-11: 8 elements a thread.
_BLOCK_C, _WARPS = 1024, 4


@triton.jit(do_not_specialize=["length", "num_tokens", "num_positions"])
def _embed_kernel(
    token_ids_ptr, position_ids_ptr, token_table_ptr, position_table_ptr, out_ptr,
    length, num_tokens, num_positions, width,
    token_ids_batch_stride, token_ids_stride, position_ids_batch_stride, position_ids_stride,
    token_table_stride, position_table_stride,
    GAP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    b, t = place // length, place % length
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < width

    token = tl.load(token_ids_ptr + b * token_ids_batch_stride + t * token_ids_stride).to(tl.int64)
    position = tl.load(position_ids_ptr + b * position_ids_batch_stride + t * position_ids_stride).to(tl.int64)
    if GAP is not None:
        position = tl.where(position > 0, position + GAP, 0)
    known = (token >= 0) & (token < num_tokens) & (position >= 0) & (position < num_positions)
    read = columns < tl.where(known, width, 0)
    embedded = tl.load(token_table_ptr + token * token_table_stride + columns, mask=read, other=float("nan"))
    placed = tl.load(position_table_ptr + position * position_table_stride + columns, mask=read, other=float("nan"))
    total = embedded.to(tl.float32) + placed.to(tl.float32)
    tl.store(out_ptr + place * width + columns, total, mask=inside)


def embed(
    token_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    gap: int | None = None,
    *,
    out: torch.Tensor,
) -> None:
    """Write the sums to `out` `[batch, length, width]`; arguments as in the module's docstring, none of them empty.

    With a `gap`, `position_ids` are numbers of tokens before: a token behind n others has position n + gap, one behind
    none (or a negative number) has position 0.
    """
    batch, length = token_ids.shape
    width = token_table.shape[1]
    block = min(triton.next_power_of_2(width), _BLOCK_C)
    _embed_kernel[(batch * length, triton.cdiv(width, block))](
        token_ids, position_ids, token_table, position_table, out,
        length, token_table.shape[0], position_table.shape[0], width,
        *token_ids.stride(), *position_ids.stride(), token_table.stride(0), position_table.stride(0),
        GAP=gap, BLOCK_C=block, num_warps=_WARPS,
    )  # fmt: skip
