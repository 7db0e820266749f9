"""`clvp-fast info`: shows the installed packages, the machine, and the code that would run."""

import argparse
from dataclasses import asdict

import torch

from clvp_fast import native
from clvp_fast.cli import report
from clvp_fast.engine.generation import SERVED
from clvp_fast.io.errors import sentence
from clvp_fast.io.files import UnwritableError, cache_folder
from clvp_fast.native import build
from clvp_fast.ops.dispatch import explain
from clvp_fast.versions import versions


def run(arguments: argparse.Namespace) -> None:
    operators = explain()
    document = {
        "versions": versions(),
        "devices": devices(),
        "library": library(),
        "cache": cache(),
        "generate": SERVED,
        "operators": [asdict(choice) for choice in operators],
    }
    if arguments.json:
        report.print_json(document)
        return
    rows = [
        ("versions", "  ".join(f"{name} {number}" for name, number in document["versions"].items())),
        *(("device", device) for device in document["devices"]),
        ("library", _told(document["library"])),
        ("cache", document["cache"]),
        ("generate", document["generate"]),
    ]
    for title, value in rows:
        print(f"{title:<10}{value}")
    print(f"\n{operators}")


def library() -> dict:
    """Return the path and instruction set of the native library, or why it is missing.

    The keys are `path`, `isa` and `forced` (whether the latter is); or `missing`, a sentence.
    """
    if reason := native.missing("cpu"):
        return {"missing": reason}
    path = native.folder("cpu") / build.LIBRARIES["cpu"]
    return {"path": str(path), "isa": native.isa(), "forced": native.is_held_down()}


def _told(found: dict) -> str:
    if "missing" in found:
        return f"none: {found['missing']}"
    forced = ", forced by CLVP_FAST_ISA" if found["forced"] else ""
    return f"{found['path']}: {found['isa']}{forced}"


def cache() -> str:
    """Return the cache folder, or why there is none."""
    try:
        return str(cache_folder())
    except UnwritableError as error:
        return f"none: {sentence(error)}"


def devices() -> list[str]:
    """Return a line for the CPU and one for each CUDA device that torch sees."""
    found = [f"cpu: {torch.get_num_threads()} threads, torch's own code on {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if len(found) == 1:
        found.append("cuda: none that torch sees")
    return found
