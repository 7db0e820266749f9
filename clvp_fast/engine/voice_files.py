"""Voices from files: a recording, a folder of recordings, a saved voice, or latents as Tortoise saves them."""

import random
import struct
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clvp_fast.audio import UNREAD_SUFFIXES, UnreadableError, is_recording, read_audio, require_sound
from clvp_fast.engine.voices import Voice, VoiceCache, piece
from clvp_fast.io.files import user_path
from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor

#: Files of latents have some kilobytes; a larger file is something else.
MOST_LATENT_BYTES = 1_000_000
_LATENTS = (".pth", ".pt")


@dataclass(frozen=True, eq=False)
class LoadedVoice:
    """A voice, and the features that a picture of it shows.

    place: the path that was given.
    mel: log-mel features `[bins, frames]` float32 of its first recording; None for a saved voice or latents.
    recordings: how many were averaged; 0 for a saved voice or latents.
    remarks: sentences on how its recordings were changed.
    """

    place: str
    voice: Voice
    mel: np.ndarray | None
    recordings: int
    remarks: tuple[str, ...] = ()


def load_voice(voices: VoiceCache, place: str | Path, crop_seed: int | None = None) -> LoadedVoice:
    """Load the voice at `place` for the checkpoint of `voices`.

    The first 6 s (the extractor's length) of each recording are used, or with `crop_seed` 6 s from a random start. A
    folder may hold one file of latents instead of recordings, as in Tortoise.

    Raises:
        FileNotFoundError, ValueError: there is no voice, a recording cannot be used, or a saved voice is damaged or
            belongs to another checkpoint.
    """
    path = user_path(place)
    if _is_saved(path):
        voice = Voice.load(path)
        try:
            voices.conditioning(voice)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return LoadedVoice(str(place), voice, None, 0)
    if (latents := latents_at(path)) is not None:
        return LoadedVoice(str(place), latent_voice(voices, latents), None, 0)
    recordings, unread = recordings_at(path)
    try:
        mels, remarks = _features(voices.feature_extractor, recordings, crop_seed)
    except UnreadableError as error:
        raise ValueError(f"{error}; a voice may be a saved one (.safetensors) or latents (.pth) too") from error
    if unread:
        remarks += (f"left out, as libsndfile does not read them: {', '.join(file.name for file in unread)}",)
    return LoadedVoice(str(place), voices.from_features(mels), mels[0], len(mels), remarks)


def require_voice(place: str | Path) -> None:
    """Raise `FileNotFoundError` where nothing lies at `place`, as `load_voice` does."""
    path = user_path(place)
    if path.exists():
        return
    if path.suffix == ".safetensors":
        raise FileNotFoundError(f"there is no voice at {path}")
    if is_latents(path):
        raise FileNotFoundError(f"there are no latents at {path}")
    raise FileNotFoundError(f"there is no recording at {path}")


def latent_voice(voices: VoiceCache, path: str | Path) -> Voice:
    """Read the voice of latents in a torch file: Tortoise's pair `(auto, diffusion)`, or one alone.

    Raises:
        FileNotFoundError, ValueError: as `read_latents`, or other widths than the checkpoint's.
    """
    path = user_path(path)
    latents = read_latents(path)
    try:
        return voices.from_vector(latents)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_latents(path: Path) -> Any:
    """Read the content of a torch file of a voice: a pair of tensors, one tensor, or anything else that is not code.

    Raises:
        FileNotFoundError, ValueError: there is no file, it is too large for latents, or it holds more than tensors.
            Code in a file is refused, and not run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no latents at {path}")
    if (size := path.stat().st_size) > MOST_LATENT_BYTES:
        raise ValueError(f"{path} has {size} bytes, and a voice's latents at most {MOST_LATENT_BYTES}: is it a model?")
    if (size := _unpacked_bytes(path)) > MOST_LATENT_BYTES:
        raise ValueError(f"{path} unpacks to {size} bytes, and a voice's latents have at most {MOST_LATENT_BYTES}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise ValueError(
            f"{path} holds no latents of a voice, or more than tensors: save it as torch.save((auto, diffusion), path)"
        ) from error


def _unpacked_bytes(path: Path) -> int:
    """Return the unpacked size in bytes of a torch file in today's form, a zip; 0 for any other file."""
    if not zipfile.is_zipfile(path):
        return 0
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return 0  # torch explains the error


def latents_at(path: Path) -> Path | None:
    """Return a file of latents, or the only file of latents in a folder, or None."""
    if is_latents(path) and not path.is_dir():
        return path
    if path.is_dir():
        found = [file for file in path.iterdir() if is_latents(file)]
        if len(found) == 1 and not any(is_recording(file) for file in path.iterdir()):
            return found[0]
    return None


def is_latents(place: str | Path) -> bool:
    """Tell whether a place names a file of latents."""
    return Path(place).suffix.lower() in _LATENTS


def _is_saved(path: Path) -> bool:
    """Tell whether a file is (or should be) a safetensors file, by its name or by its beginning."""
    if path.suffix == ".safetensors" or not path.is_file():
        return path.suffix == ".safetensors"
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def recordings_at(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the recording at a path, or those directly in a folder; and the files in unreadable formats.

    Sub-folders are left out, because they may be other speakers'. Raises `ValueError` for a folder without recordings.
    """
    if not path.is_dir():
        return [path], []
    folder = path
    found = sorted(filter(is_recording, folder.iterdir()))
    unread = [path for path in found if path.name.lower().endswith(UNREAD_SUFFIXES)]
    if len(unread) == len(found):
        if latents := sorted(file.name for file in folder.iterdir() if is_latents(file)):
            raise ValueError(
                f"{folder} has no recordings in it, and {len(latents)} files of latents, of which one must be given: "
                f"{', '.join(latents)}"
            )
        beside = f", and none can be read of {', '.join(path.name for path in unread)}" if unread else ""
        raise ValueError(
            f"{folder} has no recordings in it (WAV, FLAC, MP3 or OGG){beside}; give a folder of "
            "recordings, one recording, a saved voice (.safetensors) or latents (.pth)"
        )
    return [path for path in found if path not in unread], unread


def _features(
    extractor: ClvpFeatureExtractor, recordings: list[Path], crop_seed: int | None
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Return log-mel features `[bins, frames]` float32 of each recording, and remarks on changes to them."""
    seconds = extractor.default_audio_length
    mels: list[np.ndarray] = []
    remarks: Counter[str] = Counter()
    places = None if crop_seed is None else random.Random(crop_seed)
    for path in recordings:
        audio = read_audio(path, extractor.sampling_rate, seconds if places is None else None)
        samples = piece(audio.samples, seconds * extractor.sampling_rate, places)
        cropped = len(samples) < len(audio.samples)
        require_sound(samples, path, seconds if audio.cut or cropped else None)
        remarks.update(audio.changes)
        if cropped:
            remarks[f"{seconds:g} s from a random place on are used"] += 1
        features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
        mels.append(features["input_features"][0])
    many = len(recordings) > 1
    return mels, tuple(
        f"{count} of {len(recordings)} recordings: {remark}" if many else remark for remark, count in remarks.items()
    )
