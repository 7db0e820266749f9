"""`clvp-fast convert`: converts original Tortoise checkpoints to a checkpoint folder."""

import argparse
from pathlib import Path

from clvp_fast.cli import report
from clvp_fast.io.files import staged_folder
from clvp_fast.models.clvp import convert_tortoise


def run(arguments: argparse.Namespace) -> None:
    if not arguments.debug:
        report.quiet_transformers()
    with staged_folder(arguments.out) as folder, report.noting_warnings():
        convert_tortoise.write_checkpoint(
            arguments.autoregressive,
            arguments.clvp,
            folder,
            tokenizer=arguments.tokenizer,
            mel_norms=arguments.mel_norms,
        )
        names = sorted(path.name for path in folder.iterdir())
    written = [Path(arguments.out) / name for name in names]
    if arguments.json:
        report.print_json({"written": [str(path) for path in written]})
    else:
        report.print_written(written)
