"""`clvp-fast mel`: a recording to log-mel features and their picture."""

import argparse
from pathlib import Path

import numpy as np

from clvp_fast import ClvpFeatureExtractor
from clvp_fast.audio import load_audio, require_sound
from clvp_fast.checkpoint import resolve_checkpoint
from clvp_fast.cli import report
from clvp_fast.cli.pictures import draw_mel
from clvp_fast.files import staged_folder


def run(arguments: argparse.Namespace) -> None:
    recording = Path(arguments.recording)
    names = [f"{recording.stem}.npy", f"{recording.stem}.png"]
    with staged_folder(arguments.out) as folder:
        extractor = ClvpFeatureExtractor()
        if arguments.checkpoint:
            extractor = ClvpFeatureExtractor.from_pretrained(resolve_checkpoint(arguments.checkpoint))
        samples, changed = load_audio(recording, extractor.sampling_rate)
        require_sound(samples, recording)
        if changed:
            report.note(f"{recording}: {changed}")
        length = {"max_length": len(samples)} if arguments.whole else {}
        features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np", **length)
        mel = np.asarray(features["input_features"][0], dtype=np.float32)
        np.save(folder / names[0], mel)
        draw_mel(folder / names[1], mel, extractor, recording.name)
    written = [Path(arguments.out) / name for name in names]
    if arguments.json:
        document = {
            "recording": str(recording),
            "shape": list(mel.shape),
            "seconds": round(len(samples) / extractor.sampling_rate, 3),
            "sampling_rate": extractor.sampling_rate,
            "hop_length": extractor.hop_length,
            "min": float(mel.min()),
            "max": float(mel.max()),
            "written": [str(path) for path in written],
        }
        report.print_json(document)
    else:
        print(
            f"log-mel features of {mel.shape[0]} bins by {mel.shape[1]} frames, from {mel.min():.2f} to {mel.max():.2f}"
        )
        report.print_written(written)
