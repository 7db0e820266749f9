"""`python -m benchmarks.aot [FAMILY ...]`: compiles every shipped configuration for GPUs that need not be present.

Prints one line a kernel. With `--write`, replaces the rows in benchmarks/aot/compiled/ and the tables of
docs/kernels.md that are made from them.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import triton

from benchmarks.aot import native_library
from benchmarks.aot.compiling import ARCHITECTURES, compile_calls
from benchmarks.aot.tables import RESULTS, write_tables
from clvp_fast.native.build import CUDA_SOURCES

TRITON_FAMILIES = (
    "rotary_attention",
    "mlp",
    "linear",
    "norm",
    "embedding",
    "paged_attention",
    "sampling",
    "window_attention",
)
FAMILIES = (*TRITON_FAMILIES, *CUDA_SOURCES)


def compile_family(family: str, arch: int) -> list[dict]:
    if family in TRITON_FAMILIES:
        rows = compile_calls(importlib.import_module(f"benchmarks.aot.{family}").calls(), arch)
    else:
        rows = native_library.rows(family, arch)
    return [{"family": family, **row} for row in rows]


def in_new_process(family: str, arch: int) -> list[dict]:
    """Run `compile_family` in a process of its own, where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", family, "--arch", str(arch), "--json"]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{family} does not compile for sm_{arch}:\n{run.stderr[-4000:]}")
    return [json.loads(line) for line in run.stdout.splitlines()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("family", nargs="*", help=f"all by default: {', '.join(FAMILIES)}")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, as 80 or 90")
    parser.add_argument("--json", action="store_true", help="print rows of JSON")
    parser.add_argument("--write", action="store_true", help="write the rows and the tables of docs/kernels.md")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.family) - set(FAMILIES))
    if unknown:
        parser.error(f"no family {', '.join(unknown)}: there are {', '.join(FAMILIES)}")
    pairs = [(family, arch) for family in arguments.family or FAMILIES for arch in arguments.arch]
    if len(pairs) == 1:
        found = [compile_family(*pairs[0])]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(in_new_process, *zip(*pairs, strict=True)))
    rows = [row for part in found for row in part]
    for row in rows:
        print(json.dumps(row) if arguments.json else line(row), flush=True)
    if arguments.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        for family in arguments.family or FAMILIES:
            triton_version = {"triton": triton.__version__} if family in TRITON_FAMILIES else {}
            stamp = triton_version | {"utc": datetime.now(UTC).isoformat(timespec="seconds")}
            lines = [json.dumps(row | stamp) + "\n" for row in rows if row["family"] == family]
            (RESULTS / f"{family}.jsonl").write_text("".join(lines))
        write_tables()


def line(row: dict) -> str:
    call = f"{row['call']:<44}{row['num_warps']:>3} warps " if "call" in row else ""
    return (
        f"sm_{row['arch']:<4}{row['kernel']:<28}{call}"
        f"{row['registers']:>4} registers {row['spilled_bytes']:>5} B spilled {row['shared_bytes']:>7} B shared  "
        f"{row.get('matrix_instruction', '')}"
    ).rstrip()


if __name__ == "__main__":
    main()
