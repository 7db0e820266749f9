"""Full-size CLVP models of random weights, ours and transformers', with the same weights."""

import copy
import functools

import torch

from clvp_fast import ClvpConfig, ClvpModelForConditionalGeneration


@functools.cache
def full_size() -> ClvpModelForConditionalGeneration:
    """Ours in float32, seeded; 665 million parameters."""
    torch.manual_seed(0)
    return ClvpModelForConditionalGeneration(ClvpConfig()).eval()


@functools.cache
def full_size_half() -> ClvpModelForConditionalGeneration:
    return copy.deepcopy(full_size()).to(torch.bfloat16)


@functools.cache
def full_size_stock():
    """transformers' own class with the weights of [`full_size`]."""
    from transformers.models.clvp import configuration_clvp, modeling_clvp

    config = configuration_clvp.ClvpConfig(**full_size().config.to_dict())
    stock = modeling_clvp.ClvpModelForConditionalGeneration(config).eval()
    stock.load_state_dict(full_size().state_dict())
    return stock


def inputs(text_tokens: int, frames: int = 517) -> tuple[torch.Tensor, torch.Tensor]:
    """Text ids `[1, text_tokens]` and a six-second clip's features `[1, 80, frames]`, random."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (1, text_tokens), generator=generator)
    return ids, torch.randn(1, 80, frames, generator=generator)
