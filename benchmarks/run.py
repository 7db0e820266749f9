"""`python -m benchmarks.run [WORKLOAD ...] [--device cuda]`: measures, appends rows to benchmarks/results/.

Rows are written as each shape of a workload is measured, so that an interrupted run keeps what it has; `--resume` goes
on with what the code as it is has no rows of. `clvp-fast bench` is the same.
"""

import argparse
import importlib
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.compare import compare, printed
from benchmarks.harness import Machine

# What each measures; the most important first, for a run that ends early.
WORKLOADS = {
    "generate": "candidates of one text: transformers' generate, ours, and the engine",
    "decode_step": "one decode step of the engine: transformers', a torch rewrite, ours in each precision tier",
    "score": "embedding candidates: transformers' speech encoder, ours, and the engine's ranking",
    "end_to_end": "text and clip to ranked candidates, and the time of each part",
    "paged_attention": "attention of a decode step over pages",
    "rotary_attention": "the encoders' attention",
    "geglu_mlp": "the encoders' feed-forward block",
    "gelu_mlp": "the decoder's feed-forward block",
    "log_mel": "log-mel features, against every library that computes them",
    "sample": "drawing the next token, against transformers' processors",
    "add_norm": "residual addition and norm",
    "import_time": "import clvp_fast, against import torch",
    "linear": "linear layers of few rows",
    "scheduler": "what scheduling costs a decode step, on a null model",
    "precision": "how far each precision tier is from float64",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", nargs="*", help="which to measure (default: all); --list names them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="name the workloads, and measure nothing")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing: the ratios of B's rows to A's, each a commit that has rows, a file of rows or a folder",
    )
    parser.add_argument("--resume", action="store_true", help="leave out what this very code has rows of")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="begin no further shape after S seconds (what is left is told)"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, once: whether it runs. Rows are not kept")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder for the rows (default: benchmarks/results)")


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a provider gave a wrong result or a shape could not be measured."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    words = ["python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)]
    try:
        return run(arguments, shlex.join(words))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; the rows that were measured are kept, and --resume goes on behind them", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace, command: str) -> int:
    """Does what `arguments` say; `command` is for the rows. Raises `ValueError` for arguments that cannot be."""
    if arguments.list:
        for name, what in WORKLOADS.items():
            print(f"{name:<18} {what}")
        return 0
    if arguments.compare:
        print(printed(compare(*arguments.compare, arguments.results or harness.RESULTS)))
        return 0
    unknown = sorted(set(arguments.workload) - set(WORKLOADS))
    if unknown:
        raise ValueError(f"no workload {', '.join(unknown)}: there are {', '.join(WORKLOADS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs an NVIDIA GPU and a torch that sees it; leave it out to measure the CPU")
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as results:
            return measure(arguments, Path(results), command)
    return measure(arguments, arguments.results or harness.RESULTS, command)


def measure(arguments: argparse.Namespace, results: Path, command: str) -> int:
    """Measures into the device's folder in `results`, which must be writable."""
    begin = time.monotonic()
    machine = Machine.measure(arguments.device, arguments.smoke)
    folder = harness.folder_of(machine, arguments.device, results)
    require_writable(folder)
    print(f"{machine.name}, {machine.threads} threads, torch {torch.__version__}", flush=True)
    known = harness.measured_tasks(folder) if arguments.resume else set()
    failed, left = [], []
    for workload in arguments.workload or WORKLOADS:
        module = importlib.import_module(f"benchmarks.{workload}")
        for task in module.tasks(arguments.device, smoke=arguments.smoke):
            name = f"{workload} {' '.join(f'{key}={value}' for key, value in task.shape.items())}".strip()
            if harness.task_key({"workload": workload, "shape": task.shape}) in known:
                continue
            if arguments.seconds is not None and time.monotonic() - begin > arguments.seconds:
                left.append(name)
                continue
            try:
                rows = task.rows()
            except (RuntimeError, ValueError) as error:  # this shape; the others are measured
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed.append(name)
                continue
            harness.write_rows(harness.with_context(rows, machine, command), folder)
            failed += [name] * any(row["seconds"] is None for row in rows)
    if failed:
        print(f"wrong or failed: {'; '.join(failed)}", file=sys.stderr)
    if left:
        print(f"{len(left)} shapes are left for another run with --resume: {'; '.join(left)}", file=sys.stderr)
    return int(bool(failed))


def require_writable(folder: Path) -> None:
    """Raise `ValueError` where rows could not be written, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error}): choose another place with --results") from error


if __name__ == "__main__":
    sys.exit(main())
