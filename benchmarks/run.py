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
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.compare import compare, printed
from benchmarks.harness import (
    RESULTS,
    Machine,
    folder_of,
    measured_tasks,
    task_key,
    with_context,
    write_rows,
)
from benchmarks.machine import label
from benchmarks.providers import GROUPS, only, parsed
from clvp_fast.cli.parser import add_bench_arguments

# The measurements of each; the most important first, for a run that ends early.
WORKLOADS = {
    "generate": "candidates of one text: transformers' generate, ours, and the engine",
    "decode_step": "one decode step of the engine: transformers', a torch rewrite, ours in each precision tier",
    "score": "embedding candidates: transformers' speech encoder, ours, and the engine's ranking",
    "end_to_end": "text and clip to ranked candidates, and the time of each part",
    "first_token": "a clip to its voice, and a text to the first token: transformers, and the engine",
    "tortoise": "the first stages of Tortoise's tts(): its own, and accelerated (needs tortoise-tts 3.0.0)",
    "scaling": "a call of the engine over candidates, text tokens, clips and requests",
    "paged_attention": "attention of a decode step over pages",
    "rotary_attention": "the encoders' attention",
    "geglu_mlp": "the encoders' feed-forward block",
    "gelu_mlp": "the decoder's feed-forward block",
    "log_mel": "log-mel features, against every library that computes them",
    "clap": "CLAP's features and towers, against transformers'",
    "swin": "the two halves of a Swin layer, of CLAP's audio tower",
    "window_attention": "attention within windows, of CLAP's audio tower",
    "merge_norm": "patch merging and its norm, of CLAP's audio tower",
    "sample": "drawing the next token, against transformers' processors",
    "add_norm": "residual addition and norm",
    "import_time": "import clvp_fast, against import torch",
    "linear": "linear layers of few rows",
    "scheduler": "the cost of scheduling in a decode step, on a null model",
    "host_step": "the host's part of a decode step: over a null model, and over the random checkpoint",
    "corpus": "a corpus through the job of clvp-fast batch, against the bare engine",
    "cluster": "a corpus through clvp-fast batch: one process, and the workers of a local Ray",
    "precision": "the distance of each precision tier from float64",
    "speech": "word errors of the checkpoint demo in each precision tier, as a recogniser hears them",
}


INTERRUPTED = "interrupted; the rows that were measured are kept, and --resume goes on behind them"


@dataclass
class RunSummary:
    """The measurements of a run.

    rows: as they were written. failed: the shapes of which a provider gave a wrong result, or which could not be
        measured. left: those for which there was no time. without: those that none of the chosen providers does.
        folder: where the rows are.
    """

    rows: list[dict] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    folder: str | None = None

    def sentences(self) -> list[str]:
        found = [f"wrong or failed: {'; '.join(self.failed)}"] if self.failed else []
        if self.left:
            found.append(f"{len(self.left)} shapes are left for another run with --resume: {'; '.join(self.left)}")
        if self.without:
            found.append(f"not measured, for none of the providers asked for does it here: {'; '.join(self.without)}")
        return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return 1 if a provider gave a wrong result or a shape could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add_bench_arguments(parser)
    arguments = parser.parse_args(argv)
    words = ["python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)]
    try:
        if arguments.list:
            print(listed())
            return 0
        if arguments.compare:
            print(printed(compare(*arguments.compare, Path(arguments.results or RESULTS))))
            return 0
        summary = measure(arguments, shlex.join(words))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"\n{INTERRUPTED}", file=sys.stderr)
        return 130
    for sentence in summary.sentences():
        print(sentence, file=sys.stderr)
    return int(bool(summary.failed))


def listed() -> str:
    workloads = [f"{name:<18} {what}" for name, what in WORKLOADS.items()]
    groups = [f"{name:<18} {what}" for name, what in GROUPS.items()]
    return "\n".join([*workloads, "", "of --providers:", *groups])


def measure(arguments: argparse.Namespace, command: str) -> RunSummary:
    """Measure the workloads that `arguments` name; `command` is for the rows. Raises `ValueError` for unknown ones."""
    unknown = sorted(set(arguments.workload) - set(WORKLOADS))
    if unknown:
        raise ValueError(f"no workload {', '.join(unknown)}: there are {', '.join(WORKLOADS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs an NVIDIA GPU and a torch that sees it; leave it out to measure the CPU")
    chosen = parsed(arguments.providers) if arguments.providers is not None else None
    with only(chosen):
        if not arguments.smoke:
            return _measure(arguments, Path(arguments.results or RESULTS), command, chosen)
        with tempfile.TemporaryDirectory() as scratch:
            return replace(_measure(arguments, Path(scratch), command, chosen), folder=None)


def _measure(arguments: argparse.Namespace, results: Path, command: str, chosen: tuple[str, ...] | None) -> RunSummary:
    begin = time.monotonic()
    machine = Machine.measure(arguments.device, arguments.smoke)
    folder = folder_of(machine, arguments.device, results)
    require_writable(folder, arguments.workload or WORKLOADS)
    print(f"{label(machine.described())}, {machine.threads} threads, torch {torch.__version__}", flush=True)
    known = measured_tasks(folder, machine, chosen) if arguments.resume else set()
    summary = RunSummary(folder=str(folder))
    for workload in arguments.workload or WORKLOADS:
        module = importlib.import_module(f"benchmarks.{workload}")
        for task in module.tasks(arguments.device, smoke=arguments.smoke):
            name = f"{workload} {' '.join(f'{key}={value}' for key, value in task.shape.items())}".strip()
            if task_key({"workload": workload, "shape": task.shape}) in known:
                continue
            if arguments.seconds is not None and time.monotonic() - begin > arguments.seconds:
                summary.left.append(name)
                continue
            try:
                rows = with_context(task.rows(), machine, command, chosen)
            except (RuntimeError, ValueError) as error:  # this shape; the others are measured
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                summary.failed.append(name)
                continue
            if not rows:
                summary.without.append(name)
                continue
            write_rows(rows, folder)
            summary.rows += rows
            summary.failed += [name] * any(row["seconds"] is None for row in rows)
    return summary


def require_writable(folder: Path, workloads: Iterable[str]) -> None:
    """Raise `ValueError` where rows of the workloads could not be written, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in (folder / f"{workload}.jsonl" for workload in workloads):
            if path.exists():
                path.open("a").close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error}): choose another place with --results") from error


if __name__ == "__main__":
    sys.exit(main())
