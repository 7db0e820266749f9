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
    """Normal values of standard deviation `scale`, drawn in float64 on the CPU: all dtypes and devices round the same
    numbers."""
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
