"""The device that kernels are launched on, for configuration tables and grids."""

import torch
import triton
from triton.runtime import driver

# The device that configurations assume without a GPU (in the interpreter): an H200.
_HOPPER = 90, 132


def _interpreted() -> bool:
    return triton.knobs.runtime.interpret


def architecture() -> int:
    """Return the compute capability of the current device as two digits: 80, 90, 100, ..."""
    return _HOPPER[0] if _interpreted() else driver.active.get_current_target().arch


def multiprocessors() -> int:
    """Return the number of streaming multiprocessors of the current device."""
    if _interpreted() or not torch.cuda.is_available():
        return _HOPPER[1]
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
