"""Voices from files: a recording, a folder of recordings of one speaker, or a voice that was saved."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clvp_fast.audio import RECORDING_SUFFIXES, load_audio, require_sound
from clvp_fast.engine.voices import Voice, VoiceCache
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
    path = Path(place).expanduser()
    if _is_saved(path):
        voice = Voice.load(path)
        try:
            voices.conditioning(voice)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return LoadedVoice(str(place), voice, None, 0)
    recordings = _recordings(path) if path.is_dir() else [path]
    mels, remarks = _features(voices.feature_extractor, recordings)
    return LoadedVoice(str(place), voices.from_features(mels), mels[0], len(mels), remarks)


def _is_saved(path: Path) -> bool:
    """Whether a file is (or was to be) a safetensors file: by its name, or else by its beginning."""
    if path.suffix == ".safetensors" or not path.is_file():
        return path.suffix == ".safetensors"
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def _recordings(folder: Path) -> list[Path]:
    """The recordings right in a folder: those in its sub-folders may be other speakers'."""
    found = sorted(path for path in folder.iterdir() if path.name.lower().endswith(RECORDING_SUFFIXES))
    found = [path for path in found if path.is_file() and not path.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder} has no recordings in it (WAV, FLAC, MP3 or OGG)")
    return found


def _features(extractor: ClvpFeatureExtractor, recordings: list[Path]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Log-mel features `[bins, frames]` float32 of each recording, and what was changed of them."""
    used = extractor.default_audio_length * extractor.sampling_rate
    mels, remarks = [], []
    for path in recordings:
        samples, changed = load_audio(path, extractor.sampling_rate)
        require_sound(samples[:used], path)
        remarks += [changed] if changed else []
        if len(samples) > used:
            remarks.append(f"only the first {extractor.default_audio_length} s are used")
        features = extractor(samples[:used], sampling_rate=extractor.sampling_rate, return_tensors="np")
        mels.append(features["input_features"][0])
    return mels, tuple(
        (f"{remarks.count(remark)} of {len(recordings)} recordings: " if len(recordings) > 1 else "") + remark
        for remark in dict.fromkeys(remarks)
    )
