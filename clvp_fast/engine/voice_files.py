"""Voices from files: a recording, a folder of recordings of one speaker, or a voice that was saved."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clvp_fast.audio import UNREAD_SUFFIXES, is_recording, read_audio, require_sound
from clvp_fast.engine.voices import Voice, VoiceCache
from clvp_fast.io.files import user_path
from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor


@dataclass(frozen=True, eq=False)
class LoadedVoice:
    """A voice, and what a picture shows of it.

    place: as it was given.
    mel: log-mel features `[bins, frames]` float32 of its first recording, None of a saved voice.
    recordings: how many were averaged, 0 for a saved voice.
    remarks: sentences on what was changed of its recordings.
    """

    place: str
    voice: Voice
    mel: np.ndarray | None
    recordings: int
    remarks: tuple[str, ...] = ()


def load_voice(voices: VoiceCache, place: str | Path) -> LoadedVoice:
    """The voice at `place`, for the checkpoint of `voices`. Of each recording the first 6 s (the extractor's) count.

    Raises:
        FileNotFoundError, ValueError: there is none, a recording cannot be used, or a saved voice is damaged or another
            checkpoint's.
    """
    path = user_path(place)
    if _is_saved(path):
        voice = Voice.load(path)
        try:
            voices.conditioning(voice)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return LoadedVoice(str(place), voice, None, 0)
    recordings, unread = _recordings(path) if path.is_dir() else ([path], [])
    mels, remarks = _features(voices.feature_extractor, recordings)
    if unread:
        remarks += (f"left out, as libsndfile does not read them: {', '.join(file.name for file in unread)}",)
    return LoadedVoice(str(place), voices.from_features(mels), mels[0], len(mels), remarks)


def _is_saved(path: Path) -> bool:
    """Whether a file is (or was to be) a safetensors file: by its name, or else by its beginning."""
    if path.suffix == ".safetensors" or not path.is_file():
        return path.suffix == ".safetensors"
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def _recordings(folder: Path) -> tuple[list[Path], list[Path]]:
    """The recordings right in a folder, and those of formats that cannot be read.

    Those in its sub-folders may be other speakers'.
    """
    found = sorted(filter(is_recording, folder.iterdir()))
    unread = [path for path in found if path.name.lower().endswith(UNREAD_SUFFIXES)]
    if len(unread) == len(found):
        beside = f", and none can be read of {', '.join(path.name for path in unread)}" if unread else ""
        raise ValueError(f"{folder} has no recordings in it (WAV, FLAC, MP3 or OGG){beside}")
    return [path for path in found if path not in unread], unread


def _features(extractor: ClvpFeatureExtractor, recordings: list[Path]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Log-mel features `[bins, frames]` float32 of each recording, and what was changed of them."""
    seconds = extractor.default_audio_length
    mels: list[np.ndarray] = []
    remarks: Counter[str] = Counter()
    for path in recordings:
        audio = read_audio(path, extractor.sampling_rate, seconds)
        require_sound(audio.samples, path, seconds if audio.cut else None)
        remarks.update(audio.changes)
        features = extractor(audio.samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
        mels.append(features["input_features"][0])
    many = len(recordings) > 1
    return mels, tuple(
        f"{count} of {len(recordings)} recordings: {remark}" if many else remark for remark, count in remarks.items()
    )
