"""Window attention at the shapes of CLAP's audio tower: every stage, and the first one shifted.

Rivals go about it as Swin's own code does: roll, cut into windows, attend under bias and mask, join, roll back; as it
stands, compiled, and by each backend of torch's attention alone.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Task
from benchmarks.kernels import Case, name_of, ours, tasks as tasks_of
from benchmarks.rivals import sdpa
from clvp_fast.ops import window_attention
from clvp_fast.ops.window_attention import SEAM

WINDOW, HEAD_DIM = 8, 24
# Rows of the square image, heads, shift.
STAGES = ((64, 4, 0), (64, 4, 4), (32, 8, 4), (16, 16, 4), (8, 32, 0))
CLIPS = {"cpu": 4, "cuda": 256, "smoke": 1}


def call(packed, bias, shift):
    return window_attention(*packed.unbind(3), bias, window=WINDOW, shift=shift)


def reference(packed, bias, shift):
    """Compute in float64, a clip at a time."""
    return torch.cat([as_swin(clip.double(), bias.double(), shift) for clip in packed.split(1)])


def as_swin(packed, bias, shift):
    batch, side, _, _, heads, head_dim = packed.shape
    if shift:
        packed, bias = packed.roll((-shift, -shift), (1, 2)), bias[None] + _mask(side, shift, packed)
    cut = packed.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3).flatten(3, 4)
    q, k, v = cut.permute(4, 0, 1, 2, 5, 3, 6).flatten(1, 3)  # of each [windows, heads, places, head_dim]
    # Of four axes: torch's fused kernels refuse a mask of three.
    bias = bias.repeat(batch, 1, 1, 1) if shift else bias[None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    out = out.reshape(batch, side // WINDOW, side // WINDOW, WINDOW, WINDOW, heads, head_dim).transpose(2, 3)
    out = out.reshape(batch, side, side, heads, head_dim)
    return out.roll((shift, shift), (1, 2)) if shift else out


def _mask(side, shift, like):
    """Return the mask `[windows, 1, places, places]`."""
    place = torch.arange(side, device=like.device)
    band = (place >= side - WINDOW).long() + (place >= side - shift).long()
    region = (band[:, None] * 3 + band).unflatten(1, (-1, WINDOW)).unflatten(0, (-1, WINDOW)).transpose(1, 2)
    region = region.reshape(-1, WINDOW**2)
    return ((region[:, None] != region[:, :, None]).to(like.dtype) * SEAM)[:, None]


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    clips = CLIPS["smoke" if smoke else device]
    for side, heads, shift in STAGES[-2:] if smoke else STAGES:
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):

            def inputs(seed, side=side, heads=heads, shift=shift, dtype=dtype):
                generator = torch.Generator(device).manual_seed(seed)
                shape = (clips, side, side, 3, heads, HEAD_DIM)
                packed = torch.randn(shape, generator=generator, device=device, dtype=dtype)
                bias = torch.randn(heads, WINDOW**2, WINDOW**2, generator=generator, device=device, dtype=dtype)
                return packed, bias, shift

            providers, absent = ours(call, "window_attention", device)
            rivals = {"torch as Swin": as_swin, "torch as Swin, compiled": torch.compile(as_swin, dynamic=False)}
            rivals |= sdpa.one_by_one(as_swin, "as Swin")
            places, width = clips * side * side, heads * HEAD_DIM
            yield Case(
                shape=dict(clips=clips, side=side, heads=heads, head_dim=HEAD_DIM, shift=shift, dtype=name_of(dtype)),
                dtype=dtype,
                inputs=inputs,
                reference=reference,
                providers=rivals | providers,
                bytes=4 * places * width * dtype.itemsize,
                flop=4 * places * width * WINDOW**2,
                absent=absent,
            )


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    return tasks_of("window_attention", cases(device, smoke), device, smoke)
