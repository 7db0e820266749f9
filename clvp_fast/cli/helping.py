"""Help that fits on a screen, with the rest under `--help-all`, and errors that suggest the nearest word."""

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from clvp_fast.io.names import nearest

# The widest help, in columns, on any terminal.
_WIDTH = 100
# By command: its usage, the arguments that `--help` shows (the others are in `--help-all`), and examples.
HELP = {
    "generate": (
        "(TEXT ... | --texts FILE) --voice VOICE [options]",
        "text texts voice checkpoint out num_candidates preset keep max_new_tokens seed greedy listen save_voice "
        "device dtype",
        (
            'clvp-fast generate "Hello there." --voice voice.flac --keep 3 --out out',
            "clvp-fast generate --texts texts.txt --voice speaker/ --preset fast --checkpoint tortoise-clvp",
        ),
    ),
    "speak": (
        "TEXT --voice VOICE [options]",
        "text voice checkpoint tortoise out num_candidates preset seed iterations device json debug",
        (
            'clvp-fast speak "Hello there." --voice voice.flac --out speech.wav',
            'clvp-fast speak "Hello there." --voice voice.flac --tortoise tortoise-models --preset fast',
        ),
    ),
    "batch": (
        "INPUT --out DIR [options]",
        "input out voice checkpoint num_candidates preset keep seed retry_failed ray device dtype",
        (
            "clvp-fast batch corpus.jsonl --voice voice.flac --out out/corpus  # the same again continues",
            "clvp-fast batch corpus.parquet --out out/corpus --keep 3 --retry-failed --ray",
        ),
    ),
    "score": (
        "(CODES TEXT | --model clap --audio RECORDING ... --text TEXT ...) [options]",
        "codes text model audio texts scoring checkpoint device json",
        (
            'clvp-fast score out/codes.npz "Hello there."',
            'clvp-fast score --model clap --audio recordings/ --text "a person is speaking" "a dog is barking"',
        ),
    ),
    "mel": (
        "RECORDING ... [options]",
        "recordings checkpoint whole out npz pictures json debug",
        ("clvp-fast mel voice.flac --out out", "clvp-fast mel recordings/ --whole --npz --out features"),
    ),
    "convert": (
        "--autoregressive FILE --clvp FILE --out DIR [options]",
        "autoregressive clvp out tokenizer mel_norms json debug",
        (
            "clvp-fast convert --autoregressive autoregressive.pth --clvp clvp2.pth --out tortoise-clvp",
            "clvp-fast generate Hello. --voice voice.flac --checkpoint tortoise-clvp",
        ),
    ),
    "info": ("[options]", "json debug", ("clvp-fast info", "clvp-fast info --json")),
    "bench": (
        "[NAME ...] [options]",
        "workload device list providers compare resume seconds smoke results json debug",
        ("clvp-fast bench --list", "clvp-fast bench generate score --device cpu"),
    ),
}


class Formatter(argparse.HelpFormatter):
    """Format help in at most 100 columns, and keep line breaks in texts of several lines."""

    def __init__(self, prog: str, **options: Any):
        options.setdefault("width", min(shutil.get_terminal_size().columns, _WIDTH + 2) - 2)
        super().__init__(prog, max_help_position=26, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser whose `--help` shows the most needed options, and whose errors suggest corrections.

    `--help-all` exists once `shorten` was called.
    """

    def __init__(self, *args: Any, **options: Any):
        options.setdefault("formatter_class", Formatter)
        super().__init__(*args, **options)
        self._short: frozenset[str] | None = None
        self._given: Sequence[str] = ()

    def shorten(self, shown: Iterable[str], examples: Sequence[str]) -> None:
        """Show only the arguments of these names in `--help`, and end with examples.

        Args:
            shown: the `dest` of arguments to show; `--help` and `--help-all` are always shown.
            examples: command lines.
        """
        self._short = frozenset(shown) | {"help", "help_all"}
        unknown = self._short - {action.dest for action in self._actions} - {"help_all"}
        assert not unknown, f"no arguments: {unknown}"
        self.add_argument("--help-all", action=_ShowAll, help="show every option")
        self.epilog = "\n".join(["examples:", *(f"  {line}" for line in examples)])

    def format_help(self) -> str:
        """Return the help of `--help`."""
        if self._short is None:
            return super().format_help()
        hidden = [action for action in self._actions if action.dest not in self._short]
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

    def format_all(self) -> str:
        """Return the help of `--help-all`."""
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse as argparse does; a subcommand refuses unknown arguments itself, with its own usage."""
        if args is not None:
            self._given = list(args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown and self._short is not None:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str):
        """Exit with code 2, the usage, and the message with a suggestion if a similar word exists."""
        suggested = " and ".join(f"{near} for {given}" for given, near in self._suggestions(message).items())
        super().error(f"{message}; did you mean {suggested}?" if suggested else message)

    def _suggestions(self, message: str) -> dict[str, str]:
        """Return the nearest word for each given word that has one."""
        options = list(self._option_string_actions)
        found = {}
        for word in self._given:
            if word == "--":
                break
            name = word.split("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in options):
                found[name] = nearest(name, options)
        if choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            found[choice[1]] = nearest(choice[1], re.split(r",\s*", choice[2].replace("'", "")))
        return {given: near for given, near in found.items() if near is not None}


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell's request for completions, and exit. Without argcomplete there is none, and this does nothing."""
    try:
        import argcomplete  # pyright: ignore[reportMissingImports] - of an extra
    except ImportError:
        return
    argcomplete.autocomplete(parser)


class _ShowAll(argparse.Action):
    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, dest=dest, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        assert isinstance(parser, Parser)
        print(parser.format_all(), end="", file=sys.stdout)
        parser.exit()
