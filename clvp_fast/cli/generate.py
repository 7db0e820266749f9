"""`clvp-fast generate`: a text and a voice clip to ranked candidates, their codes, scores and a picture."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from clvp_fast.checkpoint import Checkpoint, speech_limit, stop_token
from clvp_fast.cli import report
from clvp_fast.cli.inputs import load_for, text_ids, voice_features
from clvp_fast.cli.pictures import draw_candidates
from clvp_fast.cli.versions import versions
from clvp_fast.files import staged_folder, write_json

#: Tortoise generates and scores at most this many speech tokens (about 23 s of speech).
TORTOISE_MAX_TOKENS = 500


@dataclass
class Candidates:
    """What decoding and scoring gave, in the order of generation.

    codes `[N, L]` int64, ready for the next stage (start dropped, stop fixed as Tortoise does); lengths `[N]`: tokens
    before the stop; stopped `[N]`: whether a stop came at all; scores `[N]` float32, higher is better.
    """

    codes: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray
    scores: np.ndarray


def run(arguments: argparse.Namespace) -> None:
    count = _candidate_count(arguments)
    with staged_folder(arguments.out) as folder:
        started = time.perf_counter()
        checkpoint = load_for(arguments)
        ids = text_ids(checkpoint, arguments.text)
        features = voice_features(checkpoint, arguments.voice)
        max_new_tokens = _max_new_tokens(checkpoint, arguments.max_new_tokens)
        loaded = time.perf_counter()
        try:
            candidates = generate(checkpoint, ids, features, count, max_new_tokens, arguments)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the GPU has too little memory for {arguments.batch_size} candidates at a time; "
                "choose a smaller --batch-size"
            ) from error
        finished = time.perf_counter()

        rows = report.ranking(candidates.scores, candidates.lengths, candidates.stopped)
        kept = [row["candidate"] for row in rows[: arguments.keep]]
        for row in rows:
            row["kept"] = row["rank"] <= len(kept)
        document = {
            "text": arguments.text,
            "voice": str(arguments.voice),
            "checkpoint": arguments.checkpoint,
            "candidates": rows,
            "settings": _settings(checkpoint, arguments, count, max_new_tokens),
            "seconds": {"load": round(loaded - started, 3), "generate_and_score": round(finished - loaded, 3)},
            "tokens_per_second": round(float(candidates.lengths.sum()) / (finished - loaded), 1),
            "versions": versions(),
        }
        np.savez_compressed(
            folder / "codes.npz",
            codes=candidates.codes[kept],
            lengths=candidates.lengths[kept],
            scores=candidates.scores[kept],
            candidates=np.array(kept),
        )
        write_json(folder / "candidates.json", document)
        mel = features[0].float().cpu().numpy()
        draw_candidates(folder / "candidates.png", mel, checkpoint.feature_extractor, rows, arguments.text)
    written = [Path(arguments.out) / name for name in ("codes.npz", "candidates.json", "candidates.png")]
    if arguments.json:
        report.print_json(document | {"written": [str(path) for path in written]})
    else:
        report.print_ranking(rows)
        if not candidates.stopped.all():
            report.note(f"tokens marked + : cut at {max_new_tokens} tokens before the candidate came to its end")
        report.print_written(written)


def generate(
    checkpoint: Checkpoint,
    ids: torch.Tensor,
    features: torch.Tensor,
    count: int,
    max_new_tokens: int,
    arguments: argparse.Namespace,
) -> Candidates:
    """`count` candidates in batches of `--batch-size`, drawn one after the other from `--seed`."""
    model, stop = checkpoint.model, stop_token(checkpoint.model)
    torch.manual_seed(arguments.seed)
    parts = []
    with report.decoding_progress() as progress:
        for first in range(0, count, arguments.batch_size):
            size = min(arguments.batch_size, count - first)
            watch = _Watch(progress, f"candidates {first + 1} to {first + size} of {count}", max_new_tokens, stop)
            output = model.generate(
                input_ids=ids,
                input_features=features,
                num_return_sequences=size,
                max_new_tokens=max_new_tokens,
                pad_to_max_mel_tokens=max_new_tokens + 1,  # the start token counts
                eos_token_id=stop,
                pad_token_id=stop,
                stopping_criteria=StoppingCriteriaList([watch]),
                return_dict_in_generate=True,
                **_sampling(arguments),
            )
            parts.append(
                (output.speech_ids, *_lengths(output.sequences[:, 1:], stop), output.logits_per_text[0].float())
            )
    codes, lengths, stopped, scores = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    if not np.isfinite(scores).all():
        raise ValueError(f"the scores are not finite in {arguments.dtype}; try --dtype float32")
    return Candidates(codes, lengths, stopped, scores)


def _candidate_count(arguments: argparse.Namespace) -> int:
    if not arguments.greedy:
        return arguments.num_candidates or 16
    if (arguments.num_candidates or 1) > 1:
        raise ValueError("--greedy gives one candidate; leave --num-candidates out, or leave --greedy out")
    return 1


def _max_new_tokens(checkpoint: Checkpoint, asked: int | None) -> int:
    limit = speech_limit(checkpoint.model)
    if asked is None:
        return min(TORTOISE_MAX_TOKENS, limit)
    if asked > limit:
        raise ValueError(f"--max-new-tokens {asked}: this checkpoint has positions for {limit} speech tokens")
    return asked


def _sampling(arguments: argparse.Namespace) -> dict:
    penalty = {"repetition_penalty": arguments.repetition_penalty}
    if arguments.greedy:
        return {"do_sample": False, **penalty}
    return {
        "do_sample": True,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        **penalty,
    }


def _settings(checkpoint: Checkpoint, arguments: argparse.Namespace, count: int, max_new_tokens: int) -> dict:
    return {
        **_sampling(arguments),
        "num_candidates": count,
        "max_new_tokens": max_new_tokens,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "device": str(checkpoint.model.device),
        "dtype": arguments.dtype,
        "text_cleaning": arguments.text_cleaning,
    }


def _lengths(tokens: torch.Tensor, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of generated tokens `[N, L]`: how many come before the stop `[N]`, and whether there is one `[N]`."""
    is_stop = tokens == stop
    stopped = is_stop.any(1)
    return torch.where(stopped, is_stop.int().argmax(1), tokens.shape[1]), stopped


class _Watch(StoppingCriteria):
    """Stops nothing: it shows how far decoding has come."""

    def __init__(self, progress, description: str, max_new_tokens: int, stop: int):
        self.progress, self.stop = progress, stop
        self.task = progress.add_task(description, total=max_new_tokens, finished="")

    def __call__(self, input_ids, scores, **kwargs):
        ended = int((input_ids[:, -1] == self.stop).sum())
        finished = f"{ended} of {len(input_ids)} ended"
        if ended == len(input_ids):
            self.progress.update(self.task, total=input_ids.shape[1] - 1)
        self.progress.update(self.task, completed=input_ids.shape[1] - 1, finished=finished)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
