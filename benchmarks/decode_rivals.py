"""The rivals of a decode step on a CPU that run in processes of their own, by kind of their weights."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.machine import cpu_facts, cpu_name, label
from benchmarks.rivals import ctranslate2_generator, llama_cpp, onnx_runtime, openvino_runtime
from benchmarks.tiers import FP32, Tier

# Rows of `benchmarks/rivals/sweep.py`.
SWEEP = Path(__file__).parent / "rivals/sweep.jsonl"


@dataclass(frozen=True)
class Rival:
    """A module of `benchmarks/rivals/`, a kind of its weights, and the types of these and of what they multiply.

    module, kind: as `DecoderProcess` takes them. distinct: how many candidates can have tokens of their own stored.
    """

    module: ModuleType
    kind: str
    tier: Tier
    distinct: int = 2

    @property
    def name(self) -> str:
        return self.tier.name

    def settings(self, candidates: int) -> dict:
        """Return the settings that were fastest in this machine's sweep of the nearest number of candidates."""
        tried = self.module.SETTINGS[self.kind]
        rows = [row for row in _swept() if row["rival"] == self.name and row["settings"] in tried]
        if not rows:
            return tried[0]
        return min(rows, key=lambda row: (abs(math.log(row["candidates"] / candidates)), row["seconds"]))["settings"]


@cache
def _swept() -> list[dict]:
    """Return the rows of this machine's sweeps."""
    if not SWEEP.exists():
        return []
    rows = map(json.loads, SWEEP.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["device"] == here()]


def here() -> str:
    """Return the label of this machine, as in its rows."""
    return label({"name": cpu_name()} | cpu_facts())


_INT8 = dict(weight_dtype=torch.int8, activation_dtype=torch.int8)
# llama.cpp multiplies in float32.
_FLOAT16 = dict(weight_dtype=torch.float16, page_dtype=torch.float16)
RIVALS = (
    Rival(onnx_runtime, "float32", Tier("ONNX Runtime float32", FP32, 1e-4)),
    Rival(onnx_runtime, "int8", Tier("ONNX Runtime dynamic int8", FP32, 1e-1, **_INT8)),
    Rival(onnx_runtime, "blocks", Tier("ONNX Runtime blocks of int8", FP32, 1e-1, **_INT8)),
    Rival(openvino_runtime, "float32", Tier("OpenVINO float32", FP32, 1e-4)),
    Rival(openvino_runtime, "int8", Tier("OpenVINO int8 weights", FP32, 1e-1, weight_dtype=torch.int8)),
    Rival(llama_cpp, "float32", Tier("llama.cpp float32", FP32, 1e-2)),
    Rival(llama_cpp, "float16", Tier("llama.cpp float16", FP32, 3e-2, **_FLOAT16)),
    Rival(llama_cpp, "q8_0", Tier("llama.cpp q8_0", FP32, 5e-2, page_dtype=torch.float16, **_INT8)),
    Rival(ctranslate2_generator, "float32", Tier("CTranslate2 float32", FP32, 1e-2), distinct=1),
    Rival(ctranslate2_generator, "int8", Tier("CTranslate2 int8", FP32, 6e-2, **_INT8), distinct=1),
)
