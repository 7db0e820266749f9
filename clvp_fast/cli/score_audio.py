"""`clvp-fast score --model clap`: ranks recordings, or folders of them, against texts."""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from clvp_fast.audio import load_audio, require_sound
from clvp_fast.checkpoint import load_clap
from clvp_fast.cli import report
from clvp_fast.cli.inputs import device_for
from clvp_fast.cli.mel import recordings_at
from clvp_fast.versions import versions

DEFAULT_CHECKPOINT = "laion/clap-htsat-unfused"
#: The number of recordings that go through the audio tower at a time.
_BATCH = 8


def run(arguments: argparse.Namespace) -> None:
    if arguments.codes is not None or not arguments.audio or not arguments.texts:
        arguments.refuse("--model clap needs --audio and --text, and takes no CODES")
    empty = [text for text in arguments.texts if not text.strip()]
    if empty:
        raise ValueError("a text is empty; give a description of a sound")
    paths = list(dict.fromkeys(path for place in arguments.audio for path in recordings_at(Path(place))))
    if not arguments.debug:
        report.quiet_transformers()
    name = arguments.checkpoint or DEFAULT_CHECKPOINT
    with report.waiting(f"loading {name}"):
        model, processor = load_clap(name, device=device_for(arguments), dtype=getattr(torch, arguments.dtype))
    failed: list[tuple[Path, Exception]] = []
    remarks: dict[Path, str] = {}
    embeds, heard = embed_recordings(model, processor, paths, arguments.seed, failed, remarks)
    for remark, count in Counter(remarks.values()).items():
        report.note(f"{paths[0] if len(paths) == 1 else f'{count} of the recordings'}: {remark}")
    for _, error in failed:
        report.note(str(error))
    if not heard:
        raise ValueError(f"none of the {len(paths)} recordings can be used; the notes name each")
    scores = (embed_texts(model, processor, arguments.texts) @ embeds.T) * model.logit_scale_a.detach().float().exp()
    ranked = [
        {"text": text, "recordings": ranking(row, heard)}
        for text, row in zip(arguments.texts, scores.cpu().numpy(), strict=True)
    ]
    if arguments.json:
        document = {"checkpoint": name, "seed": arguments.seed, "texts": ranked}
        document["remarks"] = [{"recording": str(path), "remark": remark} for path, remark in remarks.items()]
        document["failed"] = [{"recording": str(path), "reason": str(error)} for path, error in failed]
        report.print_json(document | {"versions": versions()})
    else:
        print_rankings(ranked)
    if failed:
        count = f"{len(failed)} of {len(paths)} recordings"
        raise ValueError(f"{count} cannot be used, and the notes name each; the others are ranked")


@torch.inference_mode()
def embed_texts(model, processor, texts: list[str]) -> torch.Tensor:
    """Return normalised embeddings `[texts, projection_dim]`, float32."""
    inputs = processor(text=texts, padding=True, return_tensors="pt").to(model.device)
    return model.get_text_features(**inputs).pooler_output.float()


@torch.inference_mode()
def embed_recordings(
    model, processor, paths: list[Path], seed: int, failed: list[tuple[Path, Exception]], remarks: dict[Path, str]
) -> tuple[torch.Tensor, list[Path]]:
    """Return normalised embeddings `[recordings, projection_dim]`, float32, and their recordings.

    A recording that cannot be used raises an error if it is the only one; one of several is added to `failed`. Changes
    and omissions are added to `remarks`.
    """
    extractor, embeds, heard = processor.feature_extractor, [], []
    with report.counting_progress(len(paths) == 1) as progress:
        task = progress.add_task("recordings", total=len(paths))
        for batch in _batches(paths, extractor, failed, remarks):
            samples = [samples for _, samples in batch]
            inputs = extractor(
                samples, sampling_rate=extractor.sampling_rate, return_tensors="pt", seed=seed, device=model.device
            )
            features = inputs["input_features"].to(model.dtype)
            embeds.append(model.get_audio_features(features, inputs["is_longer"]).pooler_output.float())
            heard += [path for path, _ in batch]
            progress.update(task, completed=len(heard) + len(failed))
    return torch.cat(embeds) if embeds else torch.empty(0), heard


def _batches(
    paths: list[Path], extractor, failed: list[tuple[Path, Exception]], remarks: dict[Path, str]
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Yield the usable recordings with their samples, a few at a time."""
    batch = []
    for path in paths:
        try:
            samples, changes = load_audio(path, extractor.sampling_rate)
            require_sound(samples, path)
            said = [remark for remark in (changes, _cropped(samples, extractor)) if remark]
            if said:
                remarks[path] = "; ".join(said)
            batch.append((path, samples))
        except Exception as error:
            if len(paths) == 1:
                raise
            failed.append((path, error))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _cropped(samples: np.ndarray, extractor) -> str | None:
    """Return a remark on a recording that is longer than the model's input."""
    if len(samples) <= extractor.nb_max_samples:
        return None
    seconds = f"{extractor.max_length_s:g} s"
    if extractor.truncation == "rand_trunc":
        return f"only {seconds} of it are used, from a place that the seed draws"
    return f"longer than {seconds}: it is heard shrunk, and in three stretches of {seconds} that the seed draws"


def ranking(scores: np.ndarray, recordings: list[Path]) -> list[dict]:
    """Return one row per recording, best score first: its rank (from 1), its path and its score."""
    order = np.argsort(-scores, kind="stable")
    return [
        {"rank": rank, "recording": str(recordings[index]), "score": float(scores[index])}
        for rank, index in enumerate(order, start=1)
    ]


def print_rankings(ranked: list[dict]) -> None:
    """Print a table for each text."""
    for one in ranked:
        table = Table(title=escape(one["text"]), title_justify="left", header_style="bold")
        table.add_column("rank", justify="right")
        table.add_column("recording", overflow="fold")
        table.add_column("score", justify="right")
        for row in one["recordings"]:
            table.add_row(str(row["rank"]), escape(row["recording"]), report.score_text(row["score"]))
        report.print_table(table)
