"""`clvp-fast speak`: a text in a voice to a WAV, through the vocoder of a checkpoint or Tortoise's own."""

import argparse

from clvp_fast.integrations.importing import make_tortoise_importable


def run(arguments: argparse.Namespace) -> None:
    """Speak; what Tortoise needs is put in place before transformers is imported."""
    if arguments.tortoise is not None:
        try:
            make_tortoise_importable()
        except ImportError as error:
            raise ValueError(
                f"--tortoise needs tortoise-tts 3.0.0 ({error}): pip install --no-deps tortoise-tts==3.0.0, and "
                "torchaudio librosa einops rotary_embedding_torch progressbar tqdm; docs/tortoise.md tells more"
            ) from error
    from clvp_fast.cli.speaking import speak

    speak(arguments)
