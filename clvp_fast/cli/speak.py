"""`clvp-fast speak`: speaks a text in a voice into a WAV, by the vocoder of a checkpoint or Tortoise's own."""

import argparse

from clvp_fast.integrations.importing import make_tortoise_importable


def run(arguments: argparse.Namespace) -> None:
    """Run the command; make Tortoise importable before transformers is imported."""
    if arguments.tortoise is not None:
        try:
            make_tortoise_importable()
        except ImportError as error:
            raise ValueError(
                f"--tortoise needs tortoise-tts 3.0.0 and its packages: {error}; docs/tortoise.md names the packages"
            ) from error
    from clvp_fast.cli.speaking import speak

    speak(arguments)
