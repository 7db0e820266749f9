"""The command `clvp-fast`. Exit codes: 0 done, 1 an error in one sentence, 2 wrong usage, 130 interrupted."""

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from clvp_fast.cli.helping import complete
from clvp_fast.cli.parser import build_parser
from clvp_fast.io.errors import sentence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default) and return its exit code."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        complete(parser)
    arguments = parser.parse_args(argv)
    kept = "nothing was written"
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process, but still written to
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that the encoding lacks are escaped
    try:
        command = import_module(f"clvp_fast.cli.{arguments.command}")
        kept = getattr(command, "INTERRUPTED", kept)
        command.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\nclvp-fast: interrupted; {kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (such as `| head`) is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        # The package's own errors have these types, and need no traceback.
        behind = "" if isinstance(error, (OSError, ValueError, TypeError)) else " (--debug shows where)"
        print(f"clvp-fast: error: {sentence(error)}{behind}", file=sys.stderr)
        return 1
    return 0
