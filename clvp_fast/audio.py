"""Reads recordings as one channel, in any format that libsndfile reads and at any sampling rate.

soundfile and soxr are imported when a recording is read; an engine that gets features needs neither.
"""

import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from clvp_fast.io.files import is_special
from clvp_fast.io.levels import SILENCE_PEAK, wrong_scale

if TYPE_CHECKING:
    import soundfile

#: The suffixes of recordings in a folder, in lower case: those that libsndfile reads, and those that it cannot read.
READ_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf")
READ_SUFFIXES += (".w64", ".rf64", ".mp2", ".sph", ".nist", ".voc")
UNREAD_SUFFIXES = (".m4a", ".m4b", ".mp4", ".aac", ".wma", ".webm", ".mka", ".amr", ".3gp", ".ac3", ".ape", ".wv")
UNREAD_SUFFIXES += (".mkv", ".mov", ".spx", ".tta", ".dsf")
RECORDING_SUFFIXES = READ_SUFFIXES + UNREAD_SUFFIXES

# The number of frames read at a time, and the seconds after the requested ones that resampling needs.
_BLOCK, _MARGIN = 1 << 16, 1.0
# Channels count as cancelling each other if mixing leaves less than this part of them.
_CANCELLED = 1e-3
# A recording counts as torn if it ends before this part of its header's length; MP3 headers are sometimes estimates.
_TORN = 0.9
# The content of a pipe is kept whole, because a reader seeks in it.
_PIPE = 256 << 20


class UnreadableError(ValueError):
    """A file that is not a recording, or a damaged one; the message is one sentence."""


def is_recording(path: Path) -> bool:
    """Tell by its name whether a file in a folder is a recording; hidden files and folders are not.

    Raises:
        ValueError: it is a pipe or a device, which might never have data.
    """
    if path.name.startswith(".") or not path.name.lower().endswith(RECORDING_SUFFIXES) or path.is_dir():
        return False
    if is_special(path):
        raise ValueError(f"{path} is a pipe or a device among recordings: move it away, or name it by itself")
    return True


@dataclass(frozen=True, eq=False)
class Audio:
    """The part of a recording that was read.

    samples: float32 `[num_samples]`, one channel, full scale at 1.0. seconds: the length of the whole recording.
    changes: a sentence for each change and omission. cut: whether the recording continues after the requested part.
    """

    samples: np.ndarray
    seconds: float
    changes: tuple[str, ...] = ()
    cut: bool = False


def load_audio(source: str | os.PathLike | BinaryIO, sampling_rate: int = 22050) -> tuple[np.ndarray, str | None]:
    """Read a recording as mono samples at `sampling_rate`.

    Args:
        source: a WAV, FLAC, MP3 or OGG file, or another that libsndfile reads, by path or as an open binary file.
        sampling_rate: of the result, in Hz; a recording at another rate is resampled with soxr (HQ).

    Returns:
        float32 samples `[num_samples]`, full scale at 1.0, and a sentence on changes (mixed down, resampled), or None
        without any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a sampling rate that is not positive; a recording that is unreadable or empty, has NaN or infinite
            samples or another scale than 1, or has channels that cancel each other. A silent recording is returned;
            `require_sound` refuses it.
    """
    audio = read_audio(source, sampling_rate)
    return audio.samples, "; ".join(audio.changes) or None


def read_audio(source: str | os.PathLike | BinaryIO, sampling_rate: int = 22050, seconds: float | None = None) -> Audio:
    """Read the first `seconds` as `load_audio` does, or all for None; the rest is not read."""
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, (int, np.integer)) or sampling_rate <= 0:
        raise ValueError(f"sampling_rate must be a positive whole number of Hz, got {sampling_rate!r}")
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "the given file object")
    content = _readable(Path(source)) if isinstance(source, (str, os.PathLike)) else source
    import soundfile

    try:
        with soundfile.SoundFile(content) as file:  # pyright: ignore[reportArgumentType] - a path may be bytes
            rate, channels = file.samplerate, file.channels
            frames = None if seconds is None else math.ceil((seconds + _MARGIN) * rate)
            samples, peak = _mixed_down(_blocks(file, frames))
            named = max(file.frames, len(samples)) if file.seekable() else len(samples)
            named = round(named * _torn_by(file.extra_info))
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        told = f"{name} cannot be read as a recording (WAV, FLAC, MP3 or OGG): {_reason(error)}"
        raise UnreadableError(told) from error

    _check(samples, peak, channels, name)
    ended = frames is None or len(samples) < frames
    whole = len(samples) if ended else named
    changes = [f"{channels} channels mixed down to one"] if channels > 1 else []
    if ended and len(samples) < _TORN * named:
        changes.append(f"torn off after {whole / rate:.2f} s of the {named / rate:.2f} s that its header names")
    if rate != sampling_rate:
        import soxr

        samples = soxr.resample(samples, rate, sampling_rate, quality="HQ")
        changes.append(f"resampled from {rate} Hz to {sampling_rate} Hz")
        if len(samples) == 0:
            raise ValueError(f"{name} is too short: nothing is left of it at {sampling_rate} Hz")
    used = len(samples) if seconds is None else int(seconds * sampling_rate)
    cut = len(samples) > used
    if cut:
        changes.append(f"only the first {seconds:g} s are used")
    return Audio(samples[:used].copy(), whole / rate, tuple(changes), cut)


def _reason(error: Exception) -> str:
    """Return libsndfile's reason, except for a file that it can open and calls missing."""
    said = str(getattr(error, "error_string", error))
    return "Format not recognised." if said.startswith("File does not exist") else said


def _torn_by(log: str) -> float:
    """Return the ratio of a WAV header's length to the actual length; libsndfile corrects the header silently.

    The greatest number of 32 bits does not count, because programs that write into a pipe put it there.
    """
    found = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    named, there = map(int, found.groups()) if found else (0, 0)
    return named / there if there < named < 0x7FFF_0000 and there else 1.0


def _readable(path: Path) -> bytes | BinaryIO:
    """Return a path in a form that libsndfile takes, whatever its bytes; for a pipe, which cannot seek, its content."""
    if not path.exists():
        raise FileNotFoundError(f"there is no recording at {path}")
    if path.is_dir():
        raise ValueError(f"a recording must be a file, and {path} is a folder")
    if path.is_file():
        return os.fsencode(path)
    with open(path, "rb") as pipe:
        content = pipe.read(_PIPE + 1)
    if len(content) > _PIPE:
        raise ValueError(f"{path} is a pipe, and gives more than {_PIPE >> 20} MiB: give a file")
    return io.BytesIO(content)


def _blocks(file: "soundfile.SoundFile", frames: int | None) -> Iterator[np.ndarray]:
    """Yield the first `frames` of a file, or all: float32 `[block, channels]` each."""
    while frames is None or frames > 0:
        block = file.read(_BLOCK if frames is None else min(_BLOCK, frames), dtype="float32", always_2d=True)
        if not len(block):
            return
        frames = None if frames is None else frames - len(block)
        yield block


def _mixed_down(blocks: Iterator[np.ndarray]) -> tuple[np.ndarray, float]:
    """Return one channel `[frames]` and the peak of all channels, which is NaN or infinite if a sample is."""
    mono, peak = [np.empty(0, dtype=np.float32)], np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks:
            peak = np.maximum(peak, np.abs(block).max())
            mono.append(block.mean(axis=1))
    return np.concatenate(mono), float(peak)


def _check(samples: np.ndarray, peak: float, channels: int, name: str | os.PathLike) -> None:
    if len(samples) == 0:
        raise ValueError(f"{name} is empty: it has no samples")
    if not math.isfinite(peak):
        raise ValueError(f"{name} holds samples that are NaN or infinite; export the recording again")
    low, high = float(samples.min()), float(samples.max())
    if high - low < SILENCE_PEAK <= max(high, -low):
        raise ValueError(f"{name} holds nothing but a constant level ({high:.3g}), which cannot be heard")
    _require_scale(peak, name)
    left = float(np.abs(samples).max())
    if channels > 1 and peak >= SILENCE_PEAK and left < _CANCELLED * peak:
        raise ValueError(
            f"{name} cannot be mixed down to one channel: its channels cancel each other; give one of them"
        )


def _require_scale(peak: float, name: str | os.PathLike) -> None:
    if reason := wrong_scale(peak):
        raise ValueError(f"{name} {reason}")


def require_sound(samples: np.ndarray, name: str | os.PathLike, cut: float | None = None) -> None:
    """Refuse unusable samples: silent ones, and floats of another scale.

    Args:
        cut: the seconds of `samples`, if the recording continues after them.
    """
    peak = float(np.abs(samples).max())
    _require_scale(peak, name)
    if peak < SILENCE_PEAK:
        if cut is not None:
            raise ValueError(
                f"{name}: its first {cut:g} s are silent (peak {peak:.1e} of full scale), and no more is used; cut "
                "them off"
            )
        raise ValueError(f"{name} is silent (peak {peak:.1e} of full scale); give one that can be heard")
