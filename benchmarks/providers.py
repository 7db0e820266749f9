"""The groups of providers of a workload, and the choice of a run's providers.

A provider's name begins with the word of its group ("SDPA math, ..."); any other beginning is ours.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

GROUPS = {
    "ours": "clvp_fast: kernels, torch paths, references and the engine",
    "torch": "what somebody who knows torch writes, compiled or captured where that is faster",
    "sdpa": "torch's scaled_dot_product_attention, one backend at a time",
    "tortoise": "tortoise-tts's own classes, with the sampling of transformers 4.31",
    "transformers": "transformers' own classes, as they are and compiled over a static cache",
    "flashinfer": "FlashInfer's decoding over pages, with and without a shared prefix",
    "onnx": "ONNX Runtime's CPU kernels, over a graph exported from torch, in a process of their own",
    "openvino": "OpenVINO's CPU kernels, over the same graph, in a process of their own",
    "llama": "llama.cpp's CPU kernels, over the same weights as GGUF, in a process of their own",
    "ctranslate2": "CTranslate2's CPU kernels, over the same weights as its GPT-2, in a process of their own",
    "torchaudio": "torchaudio's MelSpectrogram",
    "flashmel": "flashmel's MelSpectrogram",
    "asrfront": "asrfront's features, on a CPU",
}

_chosen: frozenset[str] | None = None


class Absent(Exception):
    """Why a provider cannot be had on this machine: its row is missing, and nothing is wrong."""


def group_of(name: str) -> str:
    """Return the group, a key of `GROUPS`, of a provider's name."""
    word = re.match(r"\w*", name)[0].lower()
    return word if word in GROUPS else "ours"


def bits(words: str) -> int:
    """Return the bits of most of a provider's weights, by its name and other words on it; 32 where they tell none."""
    for found, pattern in ((8, r"int8|q8_0"), (16, r"float16")):
        if re.search(pattern, words):
            return found
    return 32


def parsed(words: str) -> tuple[str, ...]:
    """Parse groups as `"ours,torch"`, in the order of `GROUPS`. Raises `ValueError` for an unknown group."""
    asked = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [word for word in asked if word not in GROUPS]
    if unknown or not asked:
        what = f"no provider {', '.join(unknown)}" if unknown else "--providers names none"
        raise ValueError(f"{what}: there are {', '.join(GROUPS)}")
    return tuple(name for name in GROUPS if name in asked)


@contextmanager
def only(groups: Iterable[str] | None) -> Iterator[None]:
    """Within it, providers of other groups are neither made nor timed; None: all are."""
    global _chosen
    before, _chosen = _chosen, None if groups is None else frozenset(groups)
    try:
        yield
    finally:
        _chosen = before


def is_chosen(name: str) -> bool:
    """Tell whether the provider called `name` is asked for."""
    return _chosen is None or group_of(name) in _chosen
