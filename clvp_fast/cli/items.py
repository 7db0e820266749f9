"""The items of `generate`: each text in each voice, with the folder of its results."""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from clvp_fast.checkpoint import Checkpoint, require_text
from clvp_fast.cli.inputs import text_ids
from clvp_fast.cli.voices import noted_voice, voice_names
from clvp_fast.engine.voice_files import LoadedVoice, require_voice
from clvp_fast.engine.voices import VoiceCache
from clvp_fast.io.errors import sentence

_SLUG_LENGTH = 40


@dataclass(eq=False)
class Item:
    """A text in a voice.

    folder: the folder of its results below `--out`; "" if it is the only item. ids: `[length]` int64.
    place: the voice's path as given. error: why it cannot be spoken; `ids` or `voice` is None then.
    """

    folder: str
    text: str
    place: str
    ids: torch.Tensor | None = None
    voice: LoadedVoice | None = None
    error: str | None = None


def read_texts(arguments: argparse.Namespace) -> list[str]:
    """Return the texts of the arguments, or the lines of their file.

    Raises:
        FileNotFoundError, ValueError: the file does not exist, is a folder, is not UTF-8, or has only blank lines.
    """
    if arguments.texts is None:
        return arguments.text
    name = "the standard input" if arguments.texts == "-" else arguments.texts
    if arguments.texts == "-" and sys.stdin is None:
        raise ValueError("the standard input is closed; give a file of texts")
    try:
        content = sys.stdin.buffer.read() if arguments.texts == "-" else Path(arguments.texts).read_bytes()
        # Only newlines separate texts; other Unicode separators may be inside them.
        lines = re.split("\r\n|\r|\n", content.decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file of texts at {name}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name} is a folder; give --texts a file with one text per line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); save it as UTF-8, one text per line") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{name} has no text in it; write one per line")
    return texts


def is_alone(texts: list[str], arguments: argparse.Namespace) -> bool:
    """Tell whether only one text in one voice was asked for."""
    return arguments.texts is None and len(texts) == len(arguments.voice) == 1


def check_first(texts: list[str], arguments: argparse.Namespace) -> None:
    """Raise an error for input that no checkpoint could speak, before one is loaded; one of several items records it.

    Raises:
        FileNotFoundError, ValueError: the only text is empty, or the only voice does not exist.
    """
    if is_alone(texts, arguments):
        require_text(texts[0])
        require_voice(arguments.voice[0])


def gather(checkpoint: Checkpoint, texts: list[str], arguments: argparse.Namespace) -> list[Item]:
    """Make an item of every text in every voice, voice by voice.

    An item that cannot be spoken raises an error if it is the only one; one of several records the reason.
    """
    places = arguments.voice
    alone = is_alone(texts, arguments)
    folders = [""] if alone else text_folders(texts)
    ids = [_tried(alone, text_ids, checkpoint, text, folder) for text, folder in zip(texts, folders, strict=True)]
    cache = VoiceCache(checkpoint.model, checkpoint.feature_extractor)
    items = []
    for name, place in zip(voice_names(places), places, strict=True):
        voice, bad_voice = _tried(alone, noted_voice, cache, place, arguments.crop_seed)
        for folder, text, (of_text, bad_text) in zip(folders, texts, ids, strict=True):
            folder = f"{name}/{folder}" if len(places) > 1 else folder
            items.append(Item(folder, text, place, of_text, voice, bad_voice or bad_text))
    return items


def text_folders(texts: list[str]) -> list[str]:
    """Return a folder name for each text, from its number and its first words."""
    digits = max(3, len(str(len(texts))))
    names = []
    for number, text in enumerate(texts, start=1):
        slug = "-".join(re.findall("[a-z0-9]+", text.lower().replace("'", "")))
        if len(slug) > _SLUG_LENGTH:
            slug = slug[: _SLUG_LENGTH + 1].rpartition("-")[0] or slug[:_SLUG_LENGTH]
        names.append(f"{number:0{digits}}-{slug}".rstrip("-"))
    return names


def _tried(alone: bool, make: Callable, *arguments) -> tuple:
    """Return the result of `make` and None, or None and its error as a sentence; if `alone`, raise the error."""
    try:
        return make(*arguments), None
    except Exception as error:
        if alone:
            raise
        return None, sentence(error)
