"""Trains the demo's checkpoint: run `python -m examples.train` until it is done.

There are two processes of one thread each: this one trains, and one that it starts makes speech, codes and labelled
candidates. Called again after any end, they continue.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from clvp_fast import demo
from clvp_fast.io.errors import sentence
from clvp_fast.io.files import UnwritableError, replacing
from examples.train import (
    candidates,
    card,
    data,
    evaluate,
    judge,
    model,
    picture,
    quality,
    texts,
    train_decoder,
    train_scorer,
    voices,
)
from examples.train.state import STOP, Interrupted, Refused, alone, home, note, step_of
from examples.train.train_codec import make_codec, train_codec


@dataclass(frozen=True)
class Plan:
    """The amounts of everything."""

    speech_files: int = 40
    codec_steps: int = 32000
    code_files: int = 400
    decoder_steps: int = 10000
    decoder_steps_before_candidates: int = 2000
    candidate_files: int = 90
    scorer_steps: int = 4000


PLAN = Plan()
_GO_ON = "it says why above: the same command goes on once that is mended"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.train", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("train", help="all that is left to do (the default)")
    material_parser = commands.add_parser("material", help="speech, codes and candidates alone, as beside the training")
    material_parser.add_argument("--parent", type=int, help="end when the parent is no longer this process")
    export = commands.add_parser("export", help="the checkpoint folder of what is trained so far")
    export.add_argument("folder", type=Path)
    judged = commands.add_parser("evaluate", help="word errors of candidates, and what their ranking gains")
    commands.add_parser("round-trip", help="word errors of the codec by itself")
    recording = commands.add_parser("voice", help="a recording of one of the voices, 6.5 s")
    recording.add_argument("name", choices=voices.NAMES)
    recording.add_argument("file", type=Path)
    kept = commands.add_parser("test-data", help="codes of 64 sentences that nothing was trained on")
    kept.add_argument("file", type=Path)
    drawn = commands.add_parser("picture", help="what ranking gains with the package's checkpoint, as SVG")
    drawn.add_argument("file", type=Path)
    shipped = commands.add_parser("quality", help="whether the package's checkpoint is as its card says")
    shipped.add_argument("--heard", type=int, default=1024, help="candidates to hear of each of its evaluations")
    judged.add_argument("--sentences", type=int, default=100)
    judged.add_argument("--candidates", type=int, default=16)
    judged.add_argument("--kind", choices=judge.KINDS, default="open")
    parser.set_defaults(command="train", parent=None)
    given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    STOP.listen(given.parent)
    try:
        folder = home()
        if given.command in ("train", "material"):
            with alone(folder, given.command):
                (train if given.command == "train" else material)(folder)
        elif given.command == "export":
            card.write(folder, model.export(folder, given.folder))
            print(f"wrote {given.folder}")
        elif given.command == "evaluate":
            print(json.dumps(evaluate.evaluate(folder, given.sentences, given.candidates, given.kind)))
        elif given.command == "voice":
            write_voice(given.file, given.name)
            print(f"wrote {given.file}")
        elif given.command == "test-data":
            data.held_out_file(given.file, texts.HELD_OUT[:64], data.load_codec(folder, make_codec()))
            print(f"wrote {given.file}")
        elif given.command == "picture":
            picture.draw(card.read_figures(demo.TRAINED), given.file)
            print(f"wrote {given.file}")
        elif given.command == "quality":
            all_good = True
            for found, told in quality.quality(folder, demo.TRAINED, given.heard):
                lines, good = quality.compare(found, told)
                print("\n".join(lines), flush=True)
                all_good = all_good and good
            return 0 if all_good else 1
        else:
            print(json.dumps(evaluate.round_trip(folder)))
    except Interrupted:
        print("interrupted, and all is saved: the same command goes on", flush=True)
        return 143
    except (Refused, UnwritableError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    return 0


def train(folder: Path, plan: Plan = PLAN) -> None:
    """Train codec, decoder and scorer, if they are not done, with the other process beside this one."""
    if demo.TRAINED.is_dir() and (taken := model.go_on_from(folder, demo.TRAINED)):
        note(folder, stage="begun", weights_of=str(demo.TRAINED.name), parts=taken)
    command = [sys.executable, "-m", "examples.train", "material", "--parent", str(os.getpid())]
    helper = subprocess.Popen(command)
    try:
        codec = make_codec()
        train_codec(folder, codec, plan.codec_steps, plan.speech_files)
        data.load_codec(folder, codec)
        _wait_for_codes(folder, helper)
        clvp = model.make_model(model.configuration(codec.num_codes, model.silence_of(codec)))
        train_decoder.train_decoder(folder, clvp, codec, plan.decoder_steps)
        train_scorer.train_scorer(folder, clvp, plan.scorer_steps)
        if helper.wait():
            raise Refused(f"the process that makes speech and candidates ended with {helper.returncode}; {_GO_ON}")
    finally:
        helper.terminate()
        helper.wait()
    note(folder, stage="done")


def write_voice(path: Path, name: str) -> None:
    """Write 6.5 s of a voice as FLAC of 16 bits at 22.05 kHz; nothing is trained on these sentences."""
    import soundfile

    samples = data.clip_samples(name, texts.HELD_OUT[:4])[: 13 * voices.RATE // 2]
    with replacing(path) as scratch:
        soundfile.write(scratch, samples, voices.RATE, subtype="PCM_16", format="FLAC")


def _wait_for_codes(folder: Path, helper: subprocess.Popen) -> None:
    """Wait until there are codes for the first steps."""
    while len(list((folder / "codes").glob("*.npz"))) < 5:
        STOP.check()
        if helper.poll() is not None:
            raise Refused(f"the process that makes speech ended with {helper.returncode} and made none; {_GO_ON}")
        STOP.wait(2)


def material(folder: Path, plan: Plan = PLAN) -> None:
    """Make speech while the codec is trained, then codes, then candidates, each if it is missing."""

    def codec_is_done() -> bool:
        return step_of(folder / "codec.pt") >= plan.codec_steps

    data.speak_ahead(folder, plan.code_files, enough=codec_is_done)
    while not codec_is_done():
        STOP.wait(2)
    codec = data.load_codec(folder, make_codec())
    data.make_held_out(folder, codec)
    data.stream_codes(folder, codec, plan.code_files)
    candidates.make_candidates(folder, plan.candidate_files, plan.decoder_steps_before_candidates)


if __name__ == "__main__":
    sys.exit(main())
