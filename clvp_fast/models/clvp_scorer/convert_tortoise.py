"""Converts Tortoise's `clvp2.pth`, which has both encoders, to the scorer."""

from collections.abc import Mapping
from pathlib import Path

import torch

from clvp_fast.models.clvp.convert_tortoise import Original, encoder_configs
from clvp_fast.models.clvp.tortoise_keys import encoder_rules
from clvp_fast.models.clvp_scorer.configuration import CLVPConfig
from clvp_fast.models.clvp_scorer.modeling import CLVPModel


def convert_tortoise_scorer(
    clvp: str | Path | Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None
) -> CLVPModel:
    """Make the scorer from Tortoise's CLVP checkpoint alone, on the CPU and in eval mode.

    Args:
        clvp: `clvp2.pth` (or a `.safetensors` file of the same keys), or its state dict.
        dtype: dtype of the parameters; by default that of the file. Rotary frequencies stay in float32.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, holds more than tensors, or has a missing, unknown or misshapen tensor.
    """
    original = Original("the CLVP checkpoint", clvp)
    config = CLVPConfig(**encoder_configs(original))
    weights = original.convert(encoder_rules(config), dtype)
    with torch.device("meta"):
        model = CLVPModel(config)
    model.load_state_dict(weights, assign=True)
    config.dtype = model.dtype
    return model.eval()
