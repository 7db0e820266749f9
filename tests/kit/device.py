"""Where kernels are tested: in Triton's interpreter on CPU tensors, or on the GPU where there is one.

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
    """In the interpreter's place, run kernels as PTX from here on (tests/ptx); before `backends` is imported."""
    global MATRIX_UNIT, EMULATED
    MATRIX_UNIT = EMULATED = True
    DTYPES.append(torch.bfloat16)


def times(dtype: torch.dtype) -> float:
    """How often a kernel of products of `dtype` may have the error of plain torch, which takes no TF32 for float32."""
    return MATRIX_UNIT_TIMES if MATRIX_UNIT and dtype == torch.float32 else TIMES
