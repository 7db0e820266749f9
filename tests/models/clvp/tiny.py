"""PARITY's tiny CLVP, ours and transformers', with the same random weights."""

import torch
from transformers.models.clvp import configuration_clvp as stock_configuration, modeling_clvp as stock_modeling

from clvp_fast import ClvpConfig, ClvpModelForConditionalGeneration

START, STOP, VOCAB = 292, 293, 300
POSITIONS, TEXT_POSITIONS = 80, 64


def config_fields(**decoder) -> dict:
    encoder = dict(hidden_size=64, intermediate_size=96, projection_dim=64, num_hidden_layers=2, num_attention_heads=2)
    return dict(
        text_config=dict(vocab_size=256, **encoder),
        speech_config=dict(vocab_size=VOCAB, **encoder),
        decoder_config=dict(
            vocab_size=VOCAB,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=POSITIONS,
            max_text_tokens=TEXT_POSITIONS,
            num_mel_attn_blocks=3,
            bos_token_id=START,
            eos_token_id=STOP,
            **decoder,
        ),
        projection_dim=64,
    )


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw weights of std 0.08, embeddings of 0.5, norms around 1: nothing is an identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            continue
        std = 0.5 if "embed" in name else 0.08
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + offset)


def tiny_pair(**decoder):
    """Return (transformers' model, ours) in eval mode, with equal weights."""
    fields = config_fields(**decoder)
    stock = stock_modeling.ClvpModelForConditionalGeneration(stock_configuration.ClvpConfig(**fields)).eval()
    randomize(stock)
    return stock, tiny_ours(**decoder)


def tiny_ours(**decoder) -> ClvpModelForConditionalGeneration:
    ours = ClvpModelForConditionalGeneration(ClvpConfig(**config_fields(**decoder))).eval()
    randomize(ours)
    return ours


def tiny_inputs(texts: int = 2, length: int = 9, frames: int = 40, seed: int = 1):
    """Text ids `[texts, length]` without padding tokens, and features `[texts, 80, frames]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (texts, length), generator=generator)
    return ids, torch.randn(texts, 80, frames, generator=generator)


def stock_oracle(stock, input_ids, input_features, **settings):
    """Generate as the original: transformers' own decoder loop with the original's prompt and a full mask."""
    with_end = torch.nn.functional.pad(input_ids, (0, 1), value=0)
    prompt = stock.conditioning_encoder(input_features=input_features, input_ids=with_end)
    mask = torch.ones(prompt.shape[0], prompt.shape[1] + 1, dtype=torch.long)
    return stock.speech_decoder_model.generate(conditioning_embeds=prompt, attention_mask=mask, **settings)
