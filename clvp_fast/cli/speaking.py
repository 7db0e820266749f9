"""The work of `clvp-fast speak`: makes candidates, runs the best one through a vocoder, and writes its WAV."""

import argparse
from pathlib import Path
from time import perf_counter

import torch

from clvp_fast.checkpoint import Checkpoint, load_tortoise, require_text
from clvp_fast.cli import report
from clvp_fast.cli.inputs import device_for, load_for, sampling_of, text_ids
from clvp_fast.cli.listen import wav
from clvp_fast.cli.progress import decoding_bar, warm_up
from clvp_fast.cli.voices import noted_voice
from clvp_fast.engine.building import build_engine
from clvp_fast.engine.door import token_limit
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.voice_files import LoadedVoice, require_voice
from clvp_fast.engine.voices import VoiceCache
from clvp_fast.integrations.tortoise_vocoder import load_tortoise_vocoder, tortoise_files
from clvp_fast.io.files import replacing, user_path
from clvp_fast.io.waits import waiting
from clvp_fast.models.clvp.tokens import known_codes, stop_token
from clvp_fast.vocoder import SETTINGS_FILE, Vocoder

# Iterations of Tortoise's diffusion, by its presets.
ITERATIONS = {"ultra_fast": 30, "fast": 80, "standard": 200, "high_quality": 400}


def speak(arguments: argparse.Namespace) -> None:
    """Write the best candidate's sound to `arguments.out`, and report it."""
    given = sampling_of(arguments)
    require_text(arguments.text)
    require_voice(arguments.voice)
    out = user_path(arguments.out)
    if out.is_dir() or not out.parent.is_dir():
        reason = "a folder" if out.is_dir() else f"in {out.parent}, which is no folder"
        raise ValueError(f"--out needs a file to write, and {out} is {reason}: name one, such as speech.wav")
    started = perf_counter()
    checkpoint = _loaded(arguments)
    limit = token_limit(checkpoint.model)
    given |= {"max_new_tokens": given["max_new_tokens"] or limit, "seed": arguments.seed}
    sampling = SamplingParams(**given)
    voice = noted_voice(VoiceCache(checkpoint.model, checkpoint.feature_extractor), arguments.voice)
    if voice.mel is None and arguments.tortoise is None:
        raise ValueError(f"{arguments.voice} has no recording, which the vocoder needs: give the voice's recordings")
    vocoder = _vocoder(checkpoint, arguments)
    seconds = {"load": perf_counter() - started}
    result = _drawn(checkpoint, voice, sampling, arguments, seconds)
    ((candidate, codes, score),) = result.best()
    started = perf_counter()
    with waiting("diffusion and vocoder" if arguments.tortoise else "vocoder"):
        (samples,) = vocoder.speak(
            [known_codes(torch.from_numpy(codes), checkpoint.model.config).numpy()],
            torch.zeros(0) if voice.mel is None else torch.from_numpy(voice.mel),
            None if result.latents is None else [result.latents[candidate]],
        )
    seconds["vocoder"] = perf_counter() - started
    with replacing(out) as scratch:
        scratch.write_bytes(wav(samples, vocoder.sampling_rate))
    _tell(out, arguments, dict(candidate=candidate, score=score, tokens=len(codes)), len(samples), vocoder, seconds)


def _loaded(arguments: argparse.Namespace) -> Checkpoint:
    if arguments.tortoise is None:
        return load_for(arguments)
    files = tortoise_files(arguments.tortoise)
    if not arguments.debug:
        report.quiet_transformers()
    names = ("autoregressive.pth", "clvp2.pth", "tokenizer.json", "mel_norms.pth")
    with waiting(f"loading {arguments.tortoise}"):
        return load_tortoise(
            arguments.tortoise,
            *(files[name] for name in names),
            device=device_for(arguments),
            dtype=getattr(torch, arguments.dtype),
            text_cleaning=arguments.text_cleaning,
        )


def _vocoder(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Vocoder:
    if arguments.tortoise is not None:
        iterations = arguments.iterations or ITERATIONS.get(arguments.preset or "fast", ITERATIONS["fast"])
        files = tortoise_files(arguments.tortoise)
        with waiting("loading diffusion and vocoder"):
            return load_tortoise_vocoder(files, arguments.voice, checkpoint.model.device, iterations, arguments.seed)
    if arguments.iterations is not None:
        raise ValueError("--iterations is for Tortoise's diffusion: give --tortoise DIR too, or leave it out")
    if checkpoint.vocoder is None:
        raise ValueError(
            f"checkpoint '{checkpoint.name}' has no vocoder ({SETTINGS_FILE}): give Tortoise's own with --tortoise "
            "DIR, the folder of its .pth files (docs/tortoise.md tells how to get them)"
        )
    return checkpoint.vocoder


def _drawn(
    checkpoint: Checkpoint,
    voice: LoadedVoice,
    sampling: SamplingParams,
    arguments: argparse.Namespace,
    seconds: dict[str, float],
) -> CandidateResult:
    """Return the candidates of the text, with the latents of the best one."""
    count, length = sampling.num_candidates or 1, sampling.max_new_tokens
    arguments.latents = arguments.tortoise is not None
    arguments.max_new_tokens = length
    engine = build_engine(checkpoint, arguments, arguments.memory_fraction, candidates=count)
    if checkpoint.model.device.type == "cuda":
        seconds["warm_up"] = warm_up(engine)
    started = perf_counter()
    ids = text_ids(checkpoint, arguments.text)
    request = CandidateRequest(input_ids=ids[0], conditioning=voice.voice)
    with decoding_bar(1, count, length, stop_token(checkpoint.model.config.decoder_config)) as bar:
        (result,) = engine.generate(request, sampling, keep=1, on_token=bar)
        bar.close(request)
    if (error := result.failure(arguments.dtype)) is not None:
        raise ValueError(error)
    seconds["generate_and_score"] = perf_counter() - started
    return result


def _tell(
    out: Path, arguments: argparse.Namespace, best: dict, samples: int, vocoder: Vocoder, seconds: dict[str, float]
) -> None:
    heard = round(samples / vocoder.sampling_rate, 3)
    document = {
        "text": arguments.text,
        "voice": arguments.voice,
        **best,
        "sampling_rate": vocoder.sampling_rate,
        "sound_seconds": heard,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "written": [str(out)],
    }
    if arguments.json:
        report.print_json(document)
        return
    report.note(f"candidate {best['candidate']} of score {best['score']:.4f}: {heard:g} s of sound")
    report.print_written([out])
