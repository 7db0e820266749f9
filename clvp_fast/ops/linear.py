"""Linear layers between the operators: x W^T + b, by the product that is fastest at its number of rows."""

import torch
import torch.nn.functional as F

from clvp_fast.ops.dispatch import needs_grad

# With several CPU threads, float32 products of so few rows are faster as W x^T (benchmarks/linear.py).
SWAPPED_ROWS = range(16, 257)


def swaps(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `x W^T` is better computed as `(W x^T)^T`."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    return torch.get_num_threads() > 1 and x.numel() // x.shape[-1] in SWAPPED_ROWS and not needs_grad(x, weight)


def linear_columns(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`W x + b` for rows as columns: `[in, rows]` → `[out, rows]`."""
    return weight @ x if bias is None else torch.addmm(bias[:, None], weight, x)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + b`: `[..., in]`, `[out, in]`, `[out]` → `[..., out]`, contiguous."""
    if not swaps(x, weight):
        return F.linear(x, weight, bias)
    columns = linear_columns(x.reshape(-1, x.shape[-1]).t(), weight, bias)
    return columns.t().contiguous().view(*x.shape[:-1], weight.shape[0])
