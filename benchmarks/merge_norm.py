"""Patch merging and its norm, at the shapes of CLAP's audio tower; rivals cut and join the image as Swin does."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Task
from benchmarks.kernels import Case, name_of, ours, tasks as tasks_of
from clvp_fast.ops import merge_norm

# Rows of the square image, channels.
STAGES = ((64, 96), (32, 192), (16, 384))
CLIPS = {"cpu": 4, "cuda": 256, "smoke": 1}
EPS = 1e-5


def call(image, weight, bias):
    return merge_norm(image, weight=weight, bias=bias, eps=EPS)


def as_swin(image, weight, bias):
    corners = [image[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return F.layer_norm(torch.cat(corners, -1), weight.shape, weight, bias, EPS)


def reference(image, weight, bias):
    return as_swin(image.double(), weight.double(), bias.double())


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    clips = CLIPS["smoke" if smoke else device]
    for side, channels in STAGES[-1:] if smoke else STAGES:
        for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):

            def inputs(seed, side=side, channels=channels, dtype=dtype):
                generator = torch.Generator(device).manual_seed(seed)
                image = torch.randn(clips, side, side, channels, generator=generator, device=device, dtype=dtype)
                return image, *torch.randn(2, 4 * channels, generator=generator, device=device, dtype=dtype)

            providers, absent = ours(call, "merge_norm", device)
            rivals = {"torch as Swin": as_swin, "torch as Swin, compiled": torch.compile(as_swin, dynamic=False)}
            yield Case(
                shape=dict(clips=clips, side=side, channels=channels, dtype=name_of(dtype)),
                dtype=dtype,
                inputs=inputs,
                reference=reference,
                providers=rivals | providers,
                bytes=2 * clips * side * side * channels * dtype.itemsize,
                absent=absent,
            )


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    return tasks_of("merge_norm", cases(device, smoke), device, smoke)
