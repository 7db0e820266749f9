"""Memory in pages of 2 MB, for what a CPU reads at every step."""

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import torch

#: Bytes of a large page.
LARGE = 2 << 20


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    """Return the C library's `madvise`, or None on a system without such pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return advise


def empty(*shape: int, dtype: torch.dtype, device: torch.types.Device) -> torch.Tensor:
    """Allocate a tensor that is not initialised, on a CPU in large pages where Linux gives them on request.

    A CPU remembers the places of a few thousand pages. Gigabytes have hundreds of thousands of 4 KB, and it looks each
    one up whenever it comes to it.
    """
    tensor = torch.empty(*shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and tensor.nbytes >= LARGE and (advise := _advise()) is not None:
        # Whole pages, so that areas of neighbouring tensors join. Where the system refuses, pages stay small.
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        advise(first, tensor.data_ptr() + tensor.nbytes - first, mmap.MADV_HUGEPAGE)
    return tensor
