"""Seeded random inputs on which a wrong implementation shows."""

import torch

# Lengths at which loops, masks and pages go wrong, for pages of 16.
RAGGED = (0, 1, 15, 16, 17, 33, 5)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(
    *shape: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    device: torch.types.Device = "cpu",
) -> torch.Tensor:
    """Draw normal values of standard deviation `scale`, in float64 on the CPU.

    All dtypes and devices round the same numbers.
    """
    return (torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale).to(dtype).to(device)


def queries_keys_values(
    batch: int,
    q_len: int,
    k_len: int,
    num_heads: int,
    head_dim: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.types.Device = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q `[batch, q_len, num_heads, head_dim]` and k, v, whose scaled scores have a standard deviation of about 2.

    A flat softmax hides wrong queries and keys; one this sharp does not.
    """
    q = random(batch, q_len, num_heads, head_dim, seed=seed, dtype=dtype, scale=2.0, device=device)
    k = random(batch, k_len, num_heads, head_dim, seed=seed + 1, dtype=dtype, device=device)
    v = random(batch, k_len, num_heads, head_dim, seed=seed + 2, dtype=dtype, device=device)
    return q, k, v


def in_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `weight` `[out, in]` in whole steps of its rows, int8, and the steps `[out]` float32."""
    scale = weight.float().abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def linear_operands(
    rows: int, columns: int, outs: int, dtype: torch.dtype, int8: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x `[rows, columns]`, weight `[outs, columns]`, bias `[outs]`, and with int8 weights the scale of their rows."""
    x, bias = random(rows, columns, seed=1).to(dtype), random(outs, seed=3).to(dtype)
    weight = random(outs, columns, seed=2) / columns**0.5
    if not int8:
        return x, weight.to(dtype), bias, None
    weight, scale = in_int8(weight)
    return x, weight, bias, scale
