"""Reading recordings: any format that libsndfile reads, any sampling rate, one channel out.

soundfile and soxr are imported by who reads a recording: an engine that is given features needs neither.
"""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

#: How the names of recordings end in a folder, in lower case.
RECORDING_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
#: Below this peak (-80 dB of full scale) a recording counts as silent.
SILENCE_PEAK = 1e-4


def load_audio(source: str | os.PathLike | BinaryIO, sampling_rate: int = 22050) -> tuple[np.ndarray, str | None]:
    """A recording as mono samples at `sampling_rate`.

    Args:
        source: a WAV, FLAC, MP3 or OGG file, by path or as an open binary file.
        sampling_rate: in Hz; a recording at another rate is resampled with soxr (HQ).

    Returns:
        float32 samples `[num_samples]`, full scale at 1.0, and a sentence on what was changed (mixed down, resampled),
        or None where nothing was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a positive sampling rate, not a readable recording, no samples in it, or samples that are NaN
            or infinite. A silent recording is returned: `require_sound` refuses it.
    """
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, (int, np.integer)) or sampling_rate <= 0:
        raise ValueError(f"sampling_rate must be a positive whole number of Hz, got {sampling_rate!r}")
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "the given file object")
    if isinstance(source, (str, os.PathLike)):
        source = Path(source)
        if not source.exists():
            raise FileNotFoundError(f"there is no recording at {name}")
        if not source.is_file():
            raise ValueError(f"a recording must be a file, and {name} is a folder")
    import soundfile

    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise ValueError(f"{name} cannot be read as a recording (WAV, FLAC, MP3 or OGG): {error}") from error

    if len(samples) == 0:
        raise ValueError(f"{name} is empty: it has no samples")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} holds samples that are NaN or infinite; export the recording again")
    notes = []
    channels = samples.shape[1]
    if channels > 1:
        notes.append(f"{channels} channels mixed down to one")
    samples = samples.mean(axis=1)
    if rate != sampling_rate:
        import soxr

        samples = soxr.resample(samples, rate, sampling_rate, quality="HQ")
        notes.append(f"resampled from {rate} Hz to {sampling_rate} Hz")
        if len(samples) == 0:
            raise ValueError(f"{name} is too short: nothing is left of it at {sampling_rate} Hz")
    return np.ascontiguousarray(samples, dtype=np.float32), "; ".join(notes) or None


def require_sound(samples: np.ndarray, name: str | os.PathLike) -> None:
    """Refuses a recording that is silent throughout: it tells nothing of a voice, or of anything else."""
    peak = float(np.abs(samples).max())
    if peak < SILENCE_PEAK:
        raise ValueError(f"{name} is silent (peak {peak:.1e} of full scale); give one that can be heard")
