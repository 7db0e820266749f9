"""Tells whether bfloat16 products are slow in torch, so that float32 is used instead."""

import torch

# On a CPU without AVX-512 torch multiplies bfloat16 number by number, many times slower than float32.
_SLOW = torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT")


def multiplies_slowly(x: torch.Tensor) -> bool:
    """Tell whether torch's own products of `x` are slower than those of a float32 copy of it."""
    return _SLOW and x.dtype == torch.bfloat16 and x.device.type == "cpu"
