"""Where kernels are tested: in Triton's interpreter on CPU tensors, or on the GPU where there is one."""

import torch

from tests.kit.budget import MATRIX_UNIT_TIMES, TIMES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 products are wrong (triton 3.6 and 3.9), so that type is tested on a GPU alone.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
MATRIX_UNIT = DEVICE == "cuda"


def times(dtype: torch.dtype) -> float:
    """How often a kernel of products of `dtype` may have the error of plain torch, which takes no TF32 for float32."""
    return MATRIX_UNIT_TIMES if MATRIX_UNIT and dtype == torch.float32 else TIMES
