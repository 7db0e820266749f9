"""`clvp-fast batch`: turns a corpus into ranked candidates in Parquet files; continues a stopped job."""

import argparse
import json
import math
from pathlib import Path

from rich.table import Table

from clvp_fast.batch import run as run_job
from clvp_fast.batch.failures import may_pass
from clvp_fast.cli import report
from clvp_fast.cli.inputs import note_random, sampling_of

#: The note after an interrupt.
INTERRUPTED = "what is finished is kept, and the same command goes on from there"

_PLAIN = (
    *("checkpoint", "voice", "crop_seed", "scoring", "score_dtype", "latents", "embeddings", "dtype", "int8_weights"),
    *("activation_dtype", "float8_pages"),
)
_OPEN = ("packed_weights", "threads")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.debug:
        report.quiet_transformers()
    note_random(arguments.checkpoint)
    settings = sampling_of(arguments) | {name: getattr(arguments, name) for name in (*_PLAIN, *_OPEN)}
    with report.noting_warnings():
        summary = run_job(
            arguments.input,
            arguments.out,
            retry_failed=arguments.retry_failed,
            shard_rows=arguments.shard_rows,
            ray=arguments.ray,
            workers=arguments.workers,
            memory_fraction=arguments.memory_fraction,
            **settings
            | {
                "keep": None if arguments.keep == 0 else arguments.keep,
                "device": None if arguments.device == "auto" else arguments.device,
                "batch_size": arguments.batch_size,
            },
        )
    for made in summary["remarks"]:
        report.note(f"{made['rows']} of {summary['rows']} rows: {made['remark']}")
    earlier = summary["rows"] - summary["this_run"]["rows"]
    if earlier:
        report.note(f"{earlier} of {summary['rows']} rows were done by earlier runs")
    _tell(summary, Path(arguments.out), arguments.json)
    if summary["failed"]:
        failures = Path(arguments.out, "failures.jsonl")
        told = f"{summary['failed']} of {summary['rows']} rows failed, and {failures} says why; "
        raise ValueError(told + _advice(failures))


def _advice(failures: Path) -> str:
    """Advise on failures."""
    with open(failures, encoding="utf-8") as file:
        if any(may_pass(json.loads(line)["error"]) for line in file):
            return "--retry-failed tries them again, for example after a voice's file was mended"
    return "mend the rows in the input, and choose another folder for it"


def _tell(summary: dict, out: Path, as_json: bool) -> None:
    written = [out / name for name in summary["files"] if name != "failures.jsonl" or summary["failed"]]
    if as_json:
        report.print_json(summary | {"written": [str(path) for path in written]})
        return
    table = Table(header_style="bold")
    for title in ("rows", "spoken", "failed", "candidates", "tokens", "rows/s", "tokens/s"):
        table.add_column(title, justify="right")
    now = summary["this_run"]
    rates = [now.get(f"{name}_per_second", math.nan) for name in ("rows", "tokens")]
    counts = [str(summary[name]) for name in ("rows", "spoken", "failed", "candidates", "tokens")]
    table.add_row(*counts, *("" if math.isnan(rate) else f"{rate:,.{0 if rate >= 100 else 1}f}" for rate in rates))
    report.print_table(table)
    report.print_written(written)
