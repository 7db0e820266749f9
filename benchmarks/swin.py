"""The two halves of a Swin layer at the stages of CLAP's audio tower; rivals go step by step, as Swin's code does."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Task
from benchmarks.kernels import Case, name_of, ours, tasks as tasks_of
from benchmarks.window_attention import HEAD_DIM, WINDOW, as_swin as attend_as_swin
from clvp_fast.ops import mlp_block, window_block

# Rows of the square image, heads, shift.
STAGES = ((64, 4, 4), (32, 8, 4), (16, 16, 4), (8, 32, 0))
CLIPS = {"cpu": (1, 4), "cuda": (256,), "smoke": (1,)}
EPS = 1e-5


def window_call(x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, shift):
    weights = norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out
    return window_block(x, *weights, window=WINDOW, shift=shift, eps=EPS)


def window_as_swin(x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, shift):
    normed = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, EPS)
    packed = F.linear(normed, w_qkv, b_qkv).unflatten(-1, (3, len(bias), HEAD_DIM))
    return x + F.linear(attend_as_swin(packed, bias, shift).flatten(-2), w_out, b_out)


def mlp_call(*arguments):
    return mlp_block(*arguments, activation="gelu", eps=EPS)


def mlp_as_swin(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out):
    normed = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, EPS)
    return x + F.linear(F.gelu(F.linear(normed, w_in, b_in)), w_out, b_out)


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    for clips in CLIPS["smoke" if smoke else device]:
        for side, heads, shift in STAGES[-2:-1] if smoke else STAGES:
            for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
                places, channels = clips * side * side, heads * HEAD_DIM
                shape = dict(clips=clips, side=side, channels=channels, dtype=name_of(dtype))

                def made(seed, clips=clips, side=side, channels=channels, dtype=dtype):
                    """Return the image, and a function that makes a tensor of a deviation."""
                    generator = torch.Generator(device).manual_seed(seed)

                    def random(*size, scale=1.0):
                        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

                    norm = 1 + random(channels, scale=0.1), random(channels, scale=0.1)
                    return random, (random(clips, side, side, channels), *norm)

                def window_inputs(seed, made=made, heads=heads, shift=shift, channels=channels):
                    random, first = made(seed)
                    w_qkv, w_out = (random(n * channels, channels, scale=channels**-0.5) for n in (3, 1))
                    bias = random(heads, WINDOW**2, WINDOW**2)
                    return *first, w_qkv, random(3 * channels), bias, w_out, random(channels), shift

                def mlp_inputs(seed, made=made, channels=channels):
                    random, first = made(seed)
                    w_in = random(4 * channels, channels, scale=channels**-0.5)
                    w_out = random(channels, 4 * channels, scale=(4 * channels) ** -0.5)
                    return *first, w_in, random(4 * channels), w_out, random(channels)

                for name, call, rival, inputs, weights, scores in (
                    ("window_block", window_call, window_as_swin, window_inputs, 4, 4 * WINDOW**2),
                    ("mlp_block", mlp_call, mlp_as_swin, mlp_inputs, 8, 0),
                ):
                    rivals = {"torch as Swin": rival, "torch as Swin, compiled": torch.compile(rival, dynamic=False)}
                    providers, absent = ours(call, name, device)
                    providers["clvp_fast"] = call  # by default: in one kernel or in parts
                    yield Case(
                        shape=shape | dict(half=name) | (dict(shift=shift) if scores else {}),
                        dtype=dtype,
                        inputs=inputs,
                        reference=lambda *arguments, rival=rival: rival(
                            *(x.double() if isinstance(x, torch.Tensor) else x for x in arguments)
                        ),
                        providers=rivals | providers,
                        bytes=(2 * places * channels + weights * channels**2) * dtype.itemsize,
                        flop=places * channels * (2 * weights * channels + scores),
                        absent=absent,
                        repeats=10,
                    )


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    return tasks_of("swin", cases(device, smoke), device, smoke)
