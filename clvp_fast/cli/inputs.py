"""Checked values from the arguments of a command: the text, the device, numbers."""

import argparse
from typing import Any

import torch

from clvp_fast.checkpoint import Checkpoint, best_device, load_checkpoint, load_tortoise, sayable_ids
from clvp_fast.cli.report import note, quiet_transformers, waiting
from clvp_fast.demo import is_random
from clvp_fast.engine.door import token_limit
from clvp_fast.engine.sampling_params import PRESETS, SAMPLING, SamplingParams
from clvp_fast.integrations.tortoise_vocoder import tortoise_files
from clvp_fast.models.clvp.text_remarks import text_remarks
from clvp_fast.models.clvp.tokens import most_codes

# The files of Tortoise that `load_tortoise` takes, in its order.
_OF_TORTOISE = ("autoregressive.pth", "clvp2.pth", "tokenizer.json", "mel_norms.pth")


def device_for(arguments: argparse.Namespace) -> str:
    """Return the device that the arguments name.

    Raises:
        ValueError: a GPU is asked for, and there is none.
    """
    if arguments.device == "auto":
        return best_device()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu, or leave the option out")
    return arguments.device


def note_random(name: str) -> None:
    """Print a note, if a checkpoint's weights are random."""
    if is_random(name):
        note(f"checkpoint '{name}' has random weights: its candidates are no speech, and its scores mean nothing")


def load_for(arguments: argparse.Namespace) -> Checkpoint:
    """Load the checkpoint, or Tortoise's files, that the arguments name, on their device and in their dtype."""
    if not arguments.debug:
        quiet_transformers()
    tortoise: str | None = getattr(arguments, "tortoise", None)
    files = {} if tortoise is None else tortoise_files(tortoise)
    with waiting(f"loading {tortoise or arguments.checkpoint}"):
        options: dict[str, Any] = dict(device=device_for(arguments), text_cleaning=arguments.text_cleaning)
        options["dtype"] = getattr(torch, arguments.dtype)
        if tortoise is not None:
            return load_tortoise(tortoise, *(files[name] for name in _OF_TORTOISE), **options)
        checkpoint = load_checkpoint(arguments.checkpoint, **options)
    note_random(checkpoint.name)
    return checkpoint


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments' values for `SAMPLING`; None for open ones.

    Raises:
        ValueError: several candidates of greedy decoding.
    """
    if arguments.greedy and arguments.preset:
        raise ValueError(f"--greedy gives one candidate, and --preset {arguments.preset} asks for many; leave one out")
    if arguments.greedy and (arguments.num_candidates or 1) > 1:
        raise ValueError("--greedy gives one candidate; leave --num-candidates out, or leave --greedy out")
    given = {name: getattr(arguments, name) for name in SAMPLING if name != "do_sample"}
    given["num_candidates"] = arguments.num_candidates or PRESETS.get(arguments.preset)
    return given | {"do_sample": not arguments.greedy}


def sampling_for(checkpoint: Checkpoint, given: dict[str, Any]) -> SamplingParams:
    """Return the sampling parameters of `sampling_of`, with the longest candidate where it was left open.

    Raises:
        ValueError: candidates that the checkpoint has no positions for.
    """
    limit, asked = most_codes(checkpoint.model.config.decoder_config), given["max_new_tokens"]
    if asked is not None and asked > limit:
        raise ValueError(f"--max-new-tokens {asked}: this checkpoint has positions for {limit} speech tokens")
    filled: dict[str, Any] = {**given, "max_new_tokens": token_limit(checkpoint.model) if asked is None else asked}
    return SamplingParams(**filled)


def text_ids(checkpoint: Checkpoint, text: str, name: str = "") -> torch.Tensor:
    """Return token ids `[1, length]` (int64, on the model's device) of `text`, and note changes to its characters.

    Args:
        name: the name of the text in the note, if there are several.

    Raises:
        ValueError: the text has nothing to say, or more tokens than the checkpoint has positions for.
    """
    ids = sayable_ids(checkpoint.model, checkpoint.tokenizer, text)
    for remark in text_remarks(checkpoint.tokenizer, text):
        note(f"{f'{name}: ' if name else ''}{remark}")
    return torch.tensor([ids], device=checkpoint.model.device)
