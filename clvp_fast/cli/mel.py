"""`clvp-fast mel`: turns recordings, or folders of them, into log-mel features and a picture.

Several threads decode recordings, a few ahead, and the extractor takes them in batches. So memory depends on the
longest recordings and not on their number.
"""

import argparse
import os
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from clvp_fast import ClvpFeatureExtractor
from clvp_fast.audio import UNREAD_SUFFIXES, is_recording, read_audio, require_sound
from clvp_fast.checkpoint import resolve_checkpoint
from clvp_fast.cli import report
from clvp_fast.cli.pictures import OVERVIEW_PANELS, draw_mel, draw_mels
from clvp_fast.io.files import staged_folder

#: The number of samples that go through the extractor at a time, unless one recording alone has more.
_BATCH_SAMPLES = 1 << 21


@dataclass
class Recording:
    """A file to read, and the name of its results below `--out`: a path without suffix."""

    path: Path
    name: str


@dataclass
class Sound:
    """A decoded recording: the used mono `samples` `[time]`, its whole length, and the changes, if any."""

    recording: Recording
    samples: np.ndarray
    seconds: float
    changed: str | None


@dataclass
class MelResults:
    """The results of the recordings.

    rows: one for each recording with features. failed: the others, with the reason. changes: how many were mixed down
        or resampled. shown: names and features of the first ones, for the overview.
    """

    rows: list[dict] = field(default_factory=list)
    failed: list[tuple[Recording, Exception]] = field(default_factory=list)
    changes: Counter = field(default_factory=Counter)
    shown: list[tuple[str, np.ndarray]] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> None:
    recordings = find_recordings(arguments.recordings)
    with staged_folder(arguments.out) as folder:
        extractor = ClvpFeatureExtractor()
        if arguments.checkpoint:
            extractor = ClvpFeatureExtractor.from_pretrained(resolve_checkpoint(arguments.checkpoint))
        results = extract(recordings, extractor, folder, arguments)
        for sentence, count in results.changes.items():
            report.note(f"{recordings[0].path if len(recordings) == 1 else f'{count} of the recordings'}: {sentence}")
        for _, error in results.failed:
            report.note(str(error))
        if not results.rows:
            raise ValueError(f"none of the {len(recordings)} recordings can be used; the notes name each")
        if results.shown:
            draw_mels(folder / "overview.png", results.shown, extractor, len(results.rows))
        names = [row["name"] for row in results.rows]
        written = ["overview.png"] if results.shown else [f"{name}.png" for name in names]
        written += ["features.npz"] if arguments.npz else [f"{name}.npy" for name in names]
    _tell(results, extractor, [Path(arguments.out) / name for name in written], arguments.json)
    if results.failed:
        count = f"{len(results.failed)} of {len(recordings)} recordings"
        raise ValueError(f"{count} cannot be used, and the notes name each; the features of the others are written")


def extract(recordings: list[Recording], extractor, folder: Path, arguments: argparse.Namespace) -> MelResults:
    """Write the features of `recordings` into `folder`, and a picture of each if asked for.

    A recording that cannot be used raises an error if it is the only one; one of several is recorded in the results.
    """
    results = MelResults()
    many = len(recordings) > 1
    with _writer(folder, arguments.npz) as write, report.counting_progress(not many) as progress:
        task = progress.add_task("recordings", total=len(recordings))
        for batch in _batches(recordings, extractor, arguments.whole, results.failed):
            for sound, mel in zip(batch, _features(extractor, batch, arguments.whole), strict=True):
                name = sound.recording.name
                write(name, mel)
                if arguments.pictures or not many:
                    draw_mel(_with_parents(folder / f"{name}.png"), mel, extractor, sound.recording.path.name)
                elif len(results.shown) < OVERVIEW_PANELS:
                    results.shown.append((name, mel))
                results.rows.append(_row(sound, mel))
                results.changes.update([sound.changed] if sound.changed else [])
                progress.update(task, completed=len(results.rows) + len(results.failed))
        progress.update(task, completed=len(recordings))
    return results


def find_recordings(places: list[str]) -> list[Recording]:
    """Find the recordings that `places` name, each a file or a folder with recordings at any depth.

    Names include the sub-folders of a folder. Files and folders that begin with a dot are left out.

    Raises:
        ValueError: a folder without a recording, or two recordings with the same name.
        OSError: a folder that cannot be listed.
    """
    found = {}
    for place in map(Path, places):
        for path in recordings_at(place):
            name = path.relative_to(place) if path != place else Path(path.name)
            # Unreadable files keep their names, and have no results.
            name = (name if path.name.lower().endswith(UNREAD_SUFFIXES) else name.with_suffix("")).as_posix()
            other = found.setdefault(name, path)
            if other != path:
                raise ValueError(
                    f"{other} and {path} would both be written to {name}.npy: rename one, or give them different --out"
                )
    return [Recording(path, name) for name, path in found.items()]


def recordings_at(place: Path) -> list[Path]:
    """Return the file `place`, or the recordings below the folder `place`; names that begin with a dot are left out.

    Raises:
        ValueError: a folder without a recording.
        OSError: a folder that cannot be listed.
    """
    files = _walk(place) if place.is_dir() else [place]
    if not files:
        raise ValueError(f"{place} has no recordings in it (WAV, FLAC, MP3 or OGG)")
    return files


def _walk(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    for place, subfolders, files in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += filter(is_recording, (Path(place, name) for name in files))
    return sorted(found)


def _batches(recordings: list[Recording], extractor, whole: bool, failed: list) -> Iterator[list[Sound]]:
    """Yield the sounds of the recordings in order; unusable ones are added to `failed` with the reason."""
    batch = []
    for recording, decoded in _read_ahead(recordings, extractor, whole):
        try:
            batch.append(decoded.result())
        except Exception as error:
            if len(recordings) == 1:
                raise
            failed.append((recording, error))
        if sum(len(sound.samples) for sound in batch) >= _BATCH_SAMPLES:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_ahead(recordings: list[Recording], extractor, whole: bool) -> Iterator[tuple[Recording, Future]]:
    """Yield the recordings in order, with decoded sound; each thread decodes at most one ahead."""
    threads = torch.get_num_threads()
    waiting = deque()
    with ThreadPoolExecutor(threads) as pool:
        for recording in recordings:
            waiting.append((recording, pool.submit(_read, recording, extractor, whole)))
            if len(waiting) > threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def _read(recording: Recording, extractor, whole: bool) -> Sound:
    seconds = None if whole else extractor.default_audio_length
    audio = read_audio(recording.path, extractor.sampling_rate, seconds)
    require_sound(audio.samples, recording.path, seconds if audio.cut else None)
    return Sound(recording, audio.samples, round(audio.seconds, 3), "; ".join(audio.changes) or None)


def _features(extractor, batch: list[Sound], whole: bool) -> list[np.ndarray]:
    """Compute log-mel features of each sound, float32 `[bins, frames]`."""
    options = {"sampling_rate": extractor.sampling_rate, "return_attention_mask": False}
    options |= {"padding": False, "truncation": False} if whole else {}
    return extractor([sound.samples for sound in batch], **options)["input_features"]


@contextmanager
def _writer(folder: Path, npz: bool) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Yield a function that writes features by name: as an .npy each, or as members of features.npz."""
    if not npz:
        yield lambda name, mel: np.save(_with_parents(folder / f"{name}.npy"), mel)
        return
    with zipfile.ZipFile(folder / "features.npz", "w") as archive:

        def write(name: str, mel: np.ndarray) -> None:
            name = name.encode(errors="backslashreplace").decode()  # an archive's names are UTF-8
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, mel)

        yield write


def _with_parents(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _row(sound: Sound, mel: np.ndarray) -> dict:
    return {
        "recording": str(sound.recording.path),
        "name": sound.recording.name,
        "shape": list(mel.shape),
        "seconds": sound.seconds,
        "min": float(mel.min()),
        "max": float(mel.max()),
        "remark": sound.changed,
    }


def _tell(results: MelResults, extractor, written: list[Path], as_json: bool) -> None:
    rows = results.rows
    if as_json:
        failed = [{"recording": str(recording.path), "reason": str(error)} for recording, error in results.failed]
        document = {"sampling_rate": extractor.sampling_rate, "hop_length": extractor.hop_length}
        document |= {"recordings": rows, "failed": failed, "written": [str(path) for path in written]}
        report.print_json(document)
        return
    lowest, highest = min(row["min"] for row in rows), max(row["max"] for row in rows)
    bins, frames = rows[0]["shape"][0], sum(row["shape"][1] for row in rows)
    of = f" of {len(rows)} recordings" if len(rows) > 1 else ""
    print(f"log-mel features{of}: {bins} bins by {frames} frames, from {lowest:.2f} to {highest:.2f}")
    report.print_written(written)
