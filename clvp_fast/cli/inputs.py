"""From the arguments of a command to checked tensors: the text, the device, how many."""

import argparse

import torch

from clvp_fast.checkpoint import Checkpoint, load_checkpoint, sayable_ids
from clvp_fast.cli.report import note, quiet_transformers
from clvp_fast.engine.sampling_params import PRESETS


def device_for(arguments: argparse.Namespace) -> str:
    """The device that the arguments name.

    Raises:
        ValueError: a GPU is asked for where there is none.
    """
    if arguments.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu, or leave the option out")
    return arguments.device


def load_for(arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the arguments name, on the device and in the dtype that they name."""
    if not arguments.debug:
        quiet_transformers()
    checkpoint = load_checkpoint(
        arguments.checkpoint,
        device=device_for(arguments),
        dtype=getattr(torch, arguments.dtype),
        text_cleaning=arguments.text_cleaning,
    )
    if checkpoint.name == "demo":
        note("checkpoint 'demo' has random weights: its candidates are no speech, and its scores mean nothing")
    return checkpoint


def candidate_count(arguments: argparse.Namespace) -> int:
    """How many candidates the arguments ask for.

    Raises:
        ValueError: several of greedy decoding.
    """
    if not arguments.greedy:
        return arguments.num_candidates or PRESETS.get(arguments.preset, 16)
    if arguments.preset:
        raise ValueError(f"--greedy gives one candidate, and --preset {arguments.preset} asks for many; leave one out")
    if (arguments.num_candidates or 1) > 1:
        raise ValueError("--greedy gives one candidate; leave --num-candidates out, or leave --greedy out")
    return 1


def text_ids(checkpoint: Checkpoint, text: str, name: str = "") -> torch.Tensor:
    """Token ids `[1, length]` (int64, on the model's device) of `text`; characters that are lost are noted.

    Args:
        name: what the note calls one of several texts.

    Raises:
        ValueError: nothing sayable in the text, or more tokens than the checkpoint has positions for.
    """
    tokenizer = checkpoint.tokenizer
    ids = sayable_ids(checkpoint.model, tokenizer, text)
    lost = [char for char in dict.fromkeys(text) if not char.isspace() and _is_lost(char, text, tokenizer)]
    if lost:
        shown = " ".join(lost[:10]) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        note(f"{f'{name}: ' if name else ''}characters that the checkpoint does not know were left out: {shown}")
    return torch.tensor([ids], device=checkpoint.model.device)


def _is_lost(char: str, text: str, tokenizer) -> bool:
    """Whether `char` gives no token of its own and taking it out of `text` leaves the known tokens as they are.

    Alone is not enough: a currency sign says nothing by itself, and turns the number behind it into a sum of money.
    """
    alone = tokenizer(char)["input_ids"]
    if set(alone) - {tokenizer.unk_token_id}:
        return False
    with_it, without_it = (
        [token for token in tokenizer(some)["input_ids"] if token != tokenizer.unk_token_id]
        for some in (text, text.replace(char, ""))
    )
    return with_it == without_it
