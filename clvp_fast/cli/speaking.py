"""The work of `clvp-fast speak`: makes candidates, runs the best one through a vocoder, and writes its WAV."""

import argparse
from time import perf_counter

from clvp_fast.checkpoint import Checkpoint
from clvp_fast.cli import report
from clvp_fast.cli.drawing import Drawing
from clvp_fast.cli.inputs import load_for, sampling_for, sampling_of
from clvp_fast.cli.items import check_first, gather
from clvp_fast.cli.listen import spoken, wav
from clvp_fast.engine.requests import CandidateResult
from clvp_fast.integrations.tortoise_vocoder import load_tortoise_vocoder, tortoise_files
from clvp_fast.io.files import replacing, user_path
from clvp_fast.io.waits import waiting
from clvp_fast.vocoder import SETTINGS_FILE, Vocoder

# Iterations of Tortoise's diffusion, by its presets.
ITERATIONS = {"ultra_fast": 30, "fast": 80, "standard": 200, "high_quality": 400}


def speak(arguments: argparse.Namespace) -> None:
    """Write the best candidate's sound to `arguments.out`, and tell of it."""
    given, texts = sampling_of(arguments), [arguments.text]
    check_first(texts, arguments)
    out = user_path(arguments.out)
    if out.is_dir() or not out.parent.is_dir():
        reason = "a folder" if out.is_dir() else f"in {out.parent}, which is no folder"
        raise ValueError(f"--out needs a file to write, and {out} is {reason}: name one, such as speech.wav")
    arguments.latents = arguments.tortoise is not None
    started = perf_counter()
    checkpoint = load_for(arguments)
    sampling = sampling_for(checkpoint, given)
    (item,) = gather(checkpoint, texts, arguments)
    assert item.voice is not None  # a bad one has ended the run
    if item.voice.mel is None and arguments.tortoise is None:
        raise ValueError(f"{item.place} comes without a recording to speak in: give the voice's recordings")
    vocoder = _vocoder(checkpoint, arguments)
    loading = perf_counter() - started
    drawing = Drawing(checkpoint, sampling, arguments, num_items=1)
    results: list[CandidateResult] = []
    drawing.draw([item], lambda _, result: results.append(result))
    ((candidate, codes, score),) = results[0].best()
    started = perf_counter()
    with waiting("diffusion and vocoder" if arguments.tortoise else "vocoder"):
        (samples,) = spoken(checkpoint, vocoder, item.voice.mel, results[0], [candidate])
    seconds = {"load": loading} | drawing.seconds | {"vocoder": perf_counter() - started}
    with replacing(out) as scratch:
        scratch.write_bytes(wav(samples, vocoder.sampling_rate))
    document = {
        "text": item.text,
        "voice": item.place,
        "candidate": candidate,
        "score": score,
        "tokens": len(codes),
        "sampling_rate": vocoder.sampling_rate,
        "sound_seconds": round(len(samples) / vocoder.sampling_rate, 3),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "written": [str(out)],
    }
    _tell(document, arguments.json)


def _vocoder(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Vocoder:
    if arguments.tortoise is not None:
        iterations = arguments.iterations or ITERATIONS.get(arguments.preset or "fast", ITERATIONS["fast"])
        files = tortoise_files(arguments.tortoise)
        with waiting("loading diffusion and vocoder"):
            return load_tortoise_vocoder(files, arguments.voice[0], checkpoint.model.device, iterations, arguments.seed)
    if arguments.iterations is not None:
        raise ValueError("--iterations is for Tortoise's diffusion: give --tortoise DIR too, or leave it out")
    if checkpoint.vocoder is None:
        raise ValueError(
            f"checkpoint '{checkpoint.name}' has no vocoder ({SETTINGS_FILE}): give Tortoise's own with --tortoise "
            "DIR, the folder of its .pth files (docs/tortoise.md tells how to get them)"
        )
    return checkpoint.vocoder


def _tell(document: dict, as_json: bool) -> None:
    if as_json:
        report.print_json(document)
        return
    heard = f"{document['sound_seconds']:g} s of sound"
    report.note(f"candidate {document['candidate']} of score {document['score']:.4f}: {heard}")
    report.print_written(document["written"])
