"""`python -m benchmarks.run [WORKLOAD ...] [--device cuda]`: measures, appends rows to benchmarks/results/."""

import argparse
import importlib
import shlex
import sys

import torch

from benchmarks.harness import Machine, write_rows

# The most important first: what an interrupted run has measured is kept.
WORKLOADS = (
    "generate",
    "score",
    "paged_attention",
    "rotary_attention",
    "geglu_mlp",
    "gelu_mlp",
    "log_mel",
    "sample",
    "add_norm",
    "import_time",
    "linear",
    "scheduler",
    "precision",
)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a provider gave a wrong result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("workload", nargs="*", help=f"which to measure, all by default: {', '.join(WORKLOADS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.workload) - set(WORKLOADS))
    if unknown:
        parser.error(f"no workload {', '.join(unknown)}: there are {', '.join(WORKLOADS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU and a torch that sees it; leave it out to measure the CPU")
    machine = Machine.measure(arguments.device)
    print(f"{machine.name}, {machine.threads} threads, torch {torch.__version__}", flush=True)
    command = shlex.join(["python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)])
    wrong = False
    for workload in arguments.workload or WORKLOADS:
        rows = importlib.import_module(f"benchmarks.{workload}").rows(arguments.device)
        write_rows(rows, machine, arguments.device, command)
        wrong |= any(row["seconds"] is None for row in rows)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
