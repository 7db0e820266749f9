"""`python -m benchmarks.cost`: prints the predicted cost of kernels and decode steps on an H200; no GPU is needed.

With `--write`, replaces the rows of benchmarks/cost/predicted.jsonl and the tables of docs/kernels.md.
"""

import argparse
import json
from dataclasses import astuple
from typing import Any

import triton

from benchmarks.cost import calls, recording, tables
from benchmarks.cost.devices import CHANGED, H200
from benchmarks.cost.machine_code import MATRIX
from benchmarks.cost.predicting import Predicted, predict
from benchmarks.cost.recording import Launch
from benchmarks.cost.work import Stored
from benchmarks.decode_step import STEPS, STORED, TEXT_TOKENS
from benchmarks.scaling_model import BESIDE_TEXT

CANDIDATES = (1, 4, 16, 64, 256)


def what(launch: Launch) -> str:
    """Say in words which of a kernel's calls a launch is: rows, and the shape of the weights of a product."""
    given = launch.arguments
    if launch.kernel == "linear":
        return f"{len(given[0])} rows, {' × '.join(map(str, given[1].shape))}"
    if launch.kernel != "_linear_kernel":
        return ""
    shape = f"{given['rows']} rows, {given['columns']} × {given['depth']}"
    return f"{shape}, {given['PARTS']} parts" if given["PARTS"] > 1 else shape


def _tile(launch: Launch) -> list:
    """Return the constants that a product was compiled with."""
    if launch.kernel != "_linear_kernel":
        return []
    names = "BLOCK_N", "BLOCK_R", "BLOCK_K", "PARTS", "PRECISION"
    return [*(launch.arguments[name] for name in names), launch.warps, launch.stages]


def order(launch: Launch) -> list:
    """Return what decides the order of a product's sums: depth of a tile, parts, precision, and the instruction.

    Of the instruction's sizes only the depth would matter, which is one for a type.
    """
    if launch.kernel != "_linear_kernel":
        return []
    assert launch.code is not None
    opcodes = {opcode for arm in launch.code.arms for opcode in arm.opcodes if opcode.startswith(MATRIX)}
    names = sorted({opcode.split(".")[0] for opcode in opcodes})
    return [*(launch.arguments[name] for name in ("BLOCK_K", "PARTS", "PRECISION")), *names]


def step(candidates: int, deterministic: bool, num_layers: int | None = None) -> dict[str, Any]:
    """Predict a step at the sizes of the benchmark `decode_step`."""
    prompt = TEXT_TOKENS + BESIDE_TEXT
    new_tokens = STORED + STEPS["cuda"] + 1
    launches = recording.step(candidates, prompt, new_tokens, deterministic, num_layers)
    shape = {"candidates": candidates, "text_tokens": TEXT_TOKENS, "stored": STORED}
    return {"workload": "decode_step", "shape": shape, "deterministic": deterministic} | _predicted(
        launches, Stored(STORED, prompt)
    )


def call(one: calls.Call) -> dict[str, Any]:
    """Predict a call of one kernel."""
    return {"workload": one.workload, "shape": one.shape} | _predicted(one.launches, one.stored)


def _predicted(launches: list[Launch] | tuple[Launch, ...], stored: Stored) -> dict[str, Any]:
    kinds: dict[tuple, list[tuple[Launch, Predicted]]] = {}
    for launch in launches:
        key = launch.kernel, what(launch), launch.programs
        kinds.setdefault(key, []).append((launch, predict(launch, stored, H200)))
    everything = [predicted for several in kinds.values() for _, predicted in several]
    return {
        "launches": len(launches),
        **{name: sum(getattr(one.work, name) for one in everything) for name in ("bytes", "cache_bytes", "flop")},
        "issued": round(sum(one.work.issued for one in everything)),
        "seconds": sum(one.seconds for one in everything),
        "kinds": [_kind(len(several), *several[0]) for several in kinds.values()],
        "chip": H200.name,
        "constants": CHANGED,
        "triton": triton.__version__,
    }


def _kind(number: int, launch: Launch, predicted: Predicted) -> dict[str, Any]:
    work = predicted.work
    return {
        "kernel": launch.kernel,
        "what": what(launch),
        "number": number,
        "programs": launch.programs,
        "tile": _tile(launch),
        "order": order(launch),
        "bytes": work.bytes,
        "cache_bytes": work.cache_bytes,
        "flop": work.flop,
        "issued": round(work.issued),
        "waits": list(astuple(work.waits)),
        "seconds": predicted.seconds,
        "bound": predicted.bound,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--candidates", type=int, nargs="+", default=CANDIDATES, help="rows of the steps")
    parser.add_argument("--layers", type=int, help="of the decoder, by default all")
    parser.add_argument("--steps-only", action="store_true", help="leave out the calls of single kernels")
    parser.add_argument("--json", action="store_true", help="print rows of JSON")
    parser.add_argument("--write", action="store_true", help="write the rows and the tables of docs/kernels.md")
    arguments = parser.parse_args(argv)
    if arguments.write and (arguments.layers or arguments.steps_only or tuple(arguments.candidates) != CANDIDATES):
        parser.error("--write takes no other options: the document has all sizes, at all layers")
    pairs = [(candidates, setting) for setting in (False, True) for candidates in arguments.candidates]
    rows = [step(*pair, arguments.layers) for pair in pairs]
    rows += [] if arguments.steps_only else map(call, calls.calls())
    print("\n".join(map(json.dumps, rows)) if arguments.json else tables.section(rows))
    if arguments.write:
        tables.write(rows)


if __name__ == "__main__":
    main()
