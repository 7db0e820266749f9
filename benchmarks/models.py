"""Full-size CLVP models of random weights, ours and transformers', with the same weights."""

import functools

import torch

from clvp_fast import ClvpConfig, ClvpModelForConditionalGeneration


@functools.cache
def full_size(device: str, dtype: torch.dtype = torch.float32) -> ClvpModelForConditionalGeneration:
    """Ours, seeded; 665 million parameters."""
    torch.manual_seed(0)
    return ClvpModelForConditionalGeneration(ClvpConfig()).eval().to(device, dtype)


@functools.cache
def full_size_stock(device: str):
    """transformers' own class in float32, with the weights of [`full_size`]."""
    from transformers.models.clvp import configuration_clvp, modeling_clvp

    config = configuration_clvp.ClvpConfig(**full_size(device).config.to_dict())
    stock = modeling_clvp.ClvpModelForConditionalGeneration(config).eval()
    stock.load_state_dict(full_size(device).state_dict())
    return stock.to(device)


def inputs(text_tokens: int, device: str, frames: int = 517) -> tuple[torch.Tensor, torch.Tensor]:
    """Text ids `[1, text_tokens]` and a six-second clip's features `[1, 80, frames]`, random."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (1, text_tokens), generator=generator)
    return ids.to(device), torch.randn(1, 80, frames, generator=generator).to(device)
