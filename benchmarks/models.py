"""CLVP models of random weights, ours and transformers', with the same weights: of the full size, or tiny for a smoke
test. They never draw the start or the stop token, so that every candidate has as many tokens as it may.
"""

import functools
import inspect
from contextlib import nullcontext

import torch

from clvp_fast import ClvpConfig, ClvpModelForConditionalGeneration

_ENCODER = {"hidden_size": 128, "intermediate_size": 256, "projection_dim": 128, "num_hidden_layers": 2}
_TINY = {
    "text_config": _ENCODER | {"num_attention_heads": 2, "vocab_size": 256},
    "speech_config": _ENCODER | {"num_attention_heads": 2, "vocab_size": 8192},
    "decoder_config": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_attn_blocks": 2},
    "projection_dim": 128,
}


def _made_on(device: str):
    """Random numbers on a GPU: a second instead of twenty."""
    return torch.device(device) if device != "cpu" else nullcontext()


def _made_once(make):
    """Make one model for each set of arguments; `functools.cache` would make one for each way to write them."""
    made, signature = functools.cache(torch.inference_mode(False)(make)), inspect.signature(make)

    @functools.wraps(make)
    def get(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return made(*given.args)

    return get


@_made_once
def our_model(
    device: str, dtype: torch.dtype = torch.float32, smoke: bool = False
) -> ClvpModelForConditionalGeneration:
    """Make our model, seeded; 665 million parameters, or a tiny one."""
    torch.manual_seed(0)
    with _made_on(device):
        model = ClvpModelForConditionalGeneration(ClvpConfig(**_TINY) if smoke else ClvpConfig()).eval()
    decoder = model.speech_decoder_model
    with torch.no_grad():
        decoder.lm_head.bias[[decoder.config.bos_token_id, decoder.config.eos_token_id]] = -1e4
    return model.requires_grad_(False).to(device, dtype)


@_made_once
def stock_model(device: str, dtype: torch.dtype = torch.float32, smoke: bool = False):
    """Make transformers' own class, with the weights of [`our_model`]."""
    from transformers.models.clvp import configuration_clvp, modeling_clvp

    config = configuration_clvp.ClvpConfig(**our_model(device, smoke=smoke).config.to_dict())
    with _made_on(device):
        stock = modeling_clvp.ClvpModelForConditionalGeneration(config).eval()
    stock.load_state_dict(our_model(device, smoke=smoke).state_dict())
    return stock.requires_grad_(False).to(device, dtype)


def inputs(text_tokens: int, device: str, frames: int = 517) -> tuple[torch.Tensor, torch.Tensor]:
    """Text ids `[1, text_tokens]` and a six-second clip's features `[1, 80, frames]`, random."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (1, text_tokens), generator=generator)
    return ids.to(device), torch.randn(1, 80, frames, generator=generator).to(device)
