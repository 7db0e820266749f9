"""The command `clvp-fast`. Exit codes: 0 done, 1 an error told in one sentence, 2 wrong usage, 130 interrupted."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from clvp_fast.cli.parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (`sys.argv` by default) and returns its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        import_module(f"clvp_fast.cli.{arguments.command}").run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nclvp-fast: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"clvp-fast: error: {sentence(error)}", file=sys.stderr)
        return 1
    return 0


def sentence(error: Exception) -> str:
    """What a person needs of `error`. The package's own errors are sentences; any other is named with its type."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
