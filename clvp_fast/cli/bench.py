"""`clvp-fast bench`: runs the benchmarks of `benchmarks/`, which are in a clone but not in a wheel."""

import argparse
import json
import shlex
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import clvp_fast
from clvp_fast.cli import report


def run(arguments: argparse.Namespace) -> None:
    benchmarks = _benchmarks()
    if arguments.list:
        _tell(arguments.json, benchmarks.WORKLOADS, benchmarks.listed())
        return
    results = Path(arguments.results or benchmarks.RESULTS)
    if arguments.compare:
        first, second = arguments.compare
        differences = benchmarks.compare(first, second, results)
        _tell(arguments.json, [asdict(one) for one in differences], benchmarks.printed(differences))
        return
    try:
        # With --json, results go to stderr as they come, because stdout gets the document.
        with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
            summary = benchmarks.measure(arguments, shlex.join(["clvp-fast", *sys.argv[1:]]))
    except KeyboardInterrupt:
        report.note(benchmarks.INTERRUPTED)
        sys.exit(130)
    if arguments.json:
        print(json.dumps(asdict(summary)))
    for sentence in summary.sentences():
        report.note(sentence)
    if summary.failed:
        raise ValueError(f"{len(summary.failed)} shapes gave a wrong result or none, and the notes name each")


def _benchmarks():
    """Import `benchmarks.run` from the clone that this package is in."""
    root = Path(clvp_fast.__file__).resolve().parents[1]
    if not (root / "benchmarks/run.py").is_file() or not (root / "csrc").is_dir():
        raise ValueError(
            f"the benchmarks are not part of the installed package ({root}): run `clvp-fast bench` in a clone of its "
            "repository, installed with `pip install -e .`"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from benchmarks import run

    return run


def _tell(as_json: bool, document, text: str) -> None:
    print(json.dumps(document) if as_json else text)
