"""The embeddings of the decoder, in a decode step and in a prefill, and of a narrow and a wide table."""

import torch

from clvp_fast.kernels import embedding


def calls():
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        yield f"embed {name} 1024", lambda dtype=dtype: _launch(256, 1, 1024, dtype)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        yield f"embed {name} 1024 to fp32", lambda dtype=dtype: _launch(256, 1, 1024, dtype, torch.float32)
        yield f"embed {name} 1024 to fp32, step", lambda dtype=dtype: _launch(256, 1, 1024, dtype, torch.float32, gap=1)
    yield "embed fp32 1024 prefill", lambda: _launch(2, 400, 1024, torch.float32)
    for width in (40, 1025):
        yield f"embed fp32 {width}", lambda width=width: _launch(256, 1, width, torch.float32)


def _launch(batch, length, width, dtype, out_dtype=None, gap=None):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, positions = empty(batch, length, dtype=torch.int64), empty(1, length, dtype=torch.int64).expand(batch, -1)
    out = empty(batch, length, width, dtype=out_dtype or dtype)
    embedding.embed(ids, positions, empty(8194, width), empty(608, width), gap, out=out)
