"""Rotary attention at the encoders' scoring shape and over lengths.

Rivals rotate, compiled, and attend by torch's own attention: by the backend that torch takes, and by each alone.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Task
from benchmarks.kernels import Case, name_of, ours, tasks as tasks_of
from benchmarks.rivals import sdpa
from clvp_fast.ops import rotary_attention

HEADS, HEAD_DIM, ROTARY_DIM = 12, 64, 32
# Sequences and their length.
SHAPES = {"cpu": ((16, 200),), "cuda": ((256, 500), (256, 200), (16, 200), (16, 4096), (512, 60)), "smoke": ((2, 20),)}


def _angles(length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines `[1, length, 1, ROTARY_DIM / 2]`, shared by both halves of the channels."""
    frequencies = 10000 ** (-torch.arange(0, ROTARY_DIM, 2, device=device) / ROTARY_DIM)
    angles = (torch.arange(length, device=device)[:, None] * frequencies)[None, :, None]
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x[..., : ROTARY_DIM // 2], x[..., ROTARY_DIM // 2 : ROTARY_DIM]
    turned = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
    return torch.cat((*turned, x[..., ROTARY_DIM:]), -1)


def rotated(packed, cos, sin):
    """Query, key and value `[batch, heads, length, head_dim]`."""
    return tuple(_rotate(x, cos, sin).transpose(1, 2) for x in packed.unbind(2))


def rotate_and_attend(packed, cos, sin, rotate=rotated):
    return F.scaled_dot_product_attention(*rotate(packed, cos, sin)).transpose(1, 2)


def call(packed, cos, sin):
    return rotary_attention(*packed.unbind(2), cos=cos, sin=sin)


def reference(packed, cos, sin):
    """Compute in float64, a sequence at a time."""
    cos, sin = cos.double(), sin.double()
    return torch.cat([rotate_and_attend(row.double(), cos, sin) for row in packed.split(1)])


def cases(device: str, smoke: bool = False):
    for batch, length in SHAPES["smoke" if smoke else device]:
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):

            def inputs(seed, batch=batch, length=length, dtype=dtype):
                generator = torch.Generator(device).manual_seed(seed)
                shape = (batch, length, 3, HEADS, HEAD_DIM)
                packed = torch.randn(shape, generator=generator, device=device, dtype=dtype)
                return packed, *_angles(length, device)

            providers, absent = ours(call, "rotary_attention", device)
            attend = partial(rotate_and_attend, rotate=torch.compile(rotated, dynamic=False))
            providers |= {"SDPA, rotation compiled": attend} | sdpa.one_by_one(attend, "rotation compiled")
            yield Case(
                shape=dict(
                    batch=batch,
                    length=length,
                    heads=HEADS,
                    head_dim=HEAD_DIM,
                    rotary_dim=ROTARY_DIM,
                    dtype=name_of(dtype),
                ),
                dtype=dtype,
                inputs=inputs,
                reference=reference,
                providers=providers,
                bytes=4 * batch * length * HEADS * HEAD_DIM * dtype.itemsize,
                flop=4 * batch * HEADS * length * length * HEAD_DIM,
                absent=absent,
            )


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    return tasks_of("rotary_attention", cases(device, smoke), device, smoke)
