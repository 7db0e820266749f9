"""`python -m benchmarks.cpu [WORKLOAD ...]`: measures on this CPU, appends rows to benchmarks/results/cpu/."""

import argparse
import importlib
import shlex
import sys

import torch

from benchmarks.harness import Machine, write_rows

WORKLOADS = ("import_time", "score", "generate", "linear")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("workload", nargs="*", help=f"which to measure, all by default: {', '.join(WORKLOADS)}")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.workload) - set(WORKLOADS))
    if unknown:
        parser.error(f"no workload {', '.join(unknown)}: there are {', '.join(WORKLOADS)}")
    machine = Machine.measure()
    print(f"{machine.name}, {machine.threads} threads, torch {torch.__version__}", flush=True)
    command = shlex.join(["python", "-m", "benchmarks.cpu", *(sys.argv[1:] if argv is None else argv)])
    for workload in arguments.workload or WORKLOADS:
        rows = importlib.import_module(f"benchmarks.{workload}").rows()
        write_rows(rows, machine, command)


if __name__ == "__main__":
    main()
