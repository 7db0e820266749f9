"""Memory in pages of 2 MB, for what a CPU reads at every step."""

import ctypes
import math
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


class Room:
    """Memory for several tensors, one behind another, so that large pages hold all of them.

    A large page begins at a multiple of its size. Apart from others, a tensor of a few megabytes would mostly lie in
    small ones.

    Args:
        nbytes: of all tensors, each as `Room.bytes_of` counts it.
    """

    def __init__(self, nbytes: int, device: torch.types.Device):
        self._nbytes, self._device = nbytes, device
        self._left: torch.Tensor | None = None  # allocated for the first tensor

    @staticmethod
    def bytes_of(*shape: int, dtype: torch.dtype) -> int:
        """Return the bytes that a tensor takes: a multiple of 64."""
        return -(-math.prod(shape) * dtype.itemsize // 64) * 64

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate a tensor that is not initialised."""
        if self._left is None:
            self._left = empty(self._nbytes, dtype=torch.uint8, device=self._device)
        nbytes = self.bytes_of(*shape, dtype=dtype)
        taken, self._left = self._left[:nbytes], self._left[nbytes:]
        return taken.view(dtype)[: math.prod(shape)].view(shape)
