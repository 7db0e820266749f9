"""The place of kernels in tests: Triton's interpreter on CPU tensors, or the GPU where there is one.

A run with tests/ptx/plugin.py executes their PTX on CPU tensors instead of the interpreter.
"""

import torch

from tests.kit.budget import MATRIX_UNIT_TIMES, TIMES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of Triton's interpreter, whose bfloat16 products are wrong (triton 3.6 and 3.9).
DTYPES = [torch.float32, torch.float16]
MATRIX_UNIT = DEVICE == "cuda"
EMULATED = False


def emulate() -> None:
    """Run kernels as PTX from now on instead of interpreting them (tests/ptx); called before `backends` is imported."""
    global MATRIX_UNIT, EMULATED
    MATRIX_UNIT = EMULATED = True
    DTYPES.append(torch.bfloat16)


def times(dtype: torch.dtype) -> float:
    """Return how many times torch's error a kernel of products of `dtype` may have; torch takes no TF32 for float32."""
    return MATRIX_UNIT_TIMES if MATRIX_UNIT and dtype == torch.float32 else TIMES
