"""`clvp-fast info`: what is installed, what the machine offers, and which code would run."""

import argparse
from dataclasses import asdict

import torch

from clvp_fast.cli import report
from clvp_fast.files import cache_folder
from clvp_fast.models.clvp.generation import SERVED
from clvp_fast.ops.dispatch import explain
from clvp_fast.versions import versions


def run(arguments: argparse.Namespace) -> None:
    operators = explain()
    document = {
        "versions": versions(),
        "devices": devices(),
        "cache": str(cache_folder()),
        "generate": SERVED,
        "operators": [asdict(choice) for choice in operators],
    }
    if arguments.json:
        report.print_json(document)
        return
    rows = [
        ("versions", "  ".join(f"{name} {number}" for name, number in document["versions"].items())),
        *(("device", device) for device in document["devices"]),
        ("cache", document["cache"]),
        ("generate", document["generate"]),
    ]
    for title, value in rows:
        print(f"{title:<10}{value}")
    print(f"\n{operators}")


def devices() -> list[str]:
    """A line for the CPU and one for each CUDA device that torch sees."""
    found = [f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if len(found) == 1:
        found.append("cuda: none that torch sees")
    return found
