"""Where kernels are tested: in Triton's interpreter on CPU tensors, or on the GPU where there is one."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 products are wrong (triton 3.6 and 3.9), so that type is tested on a GPU alone.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
