"""Maps the tensors of Tortoise's original checkpoints to CLVP's."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from clvp_fast.models.clvp.configuration import ClvpConfig

HEAD_DIM = 64

# The head over text is used only in training; masks are constants; `wte` and `inference_model` repeat other tensors, in
# files that were saved after Tortoise prepared the model for inference.
UNUSED = re.compile(
    r"text_head\.(weight|bias)|gpt\.h\.\d+\.attn\.(bias|masked_bias)|gpt\.wte\.weight|inference_model\..+"
)


class Rule(NamedTuple):
    """One tensor of the original, its expected shape, and the tensors of CLVP that `convert` makes of it."""

    source: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    convert: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] = lambda tensor: (tensor,)


def _affine(source: str, target: str, size: int) -> Iterator[Rule]:
    for name in ("weight", "bias"):
        yield Rule(f"{source}.{name}", (size,), (f"{target}.{name}",))


def _table(source: str, target: str, *shape: int) -> Rule:
    return Rule(f"{source}.weight", shape, (f"{target}.weight",))


def _names(prefix: str, name: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{projection}_proj.{name}" for projection in "qkv")


def decoder_rules(config: ClvpConfig) -> Iterator[Rule]:
    """Yield the rules for the tensors of `autoregressive.pth`."""
    decoder = config.decoder_config
    width, inner = decoder.hidden_size, decoder.inner_size
    yield _table("text_embedding", "conditioning_encoder.text_token_embedding", config.text_config.vocab_size, width)
    yield _table(
        "text_pos_embedding.emb", "conditioning_encoder.text_position_embedding", decoder.max_text_tokens, width
    )
    yield from _conditioning_rules(width, decoder.feature_size, decoder.num_mel_attn_blocks)

    causal_lm, stack = "speech_decoder_model", "speech_decoder_model.model.decoder"
    yield _table("mel_embedding", f"{stack}.input_embeds_layer", decoder.vocab_size, width)
    yield _table("mel_pos_embedding.emb", f"{stack}.position_embeds_layer", decoder.max_position_embeddings, width)
    for index in range(decoder.num_hidden_layers):
        source, target = f"gpt.h.{index}", f"{stack}.layers.{index}"
        yield from _affine(f"{source}.ln_1", f"{target}.input_layernorm", width)
        yield from _affine(f"{source}.ln_2", f"{target}.post_attention_layernorm", width)
        attn, ours = f"{source}.attn", f"{target}.attn"
        yield Rule(
            f"{attn}.c_attn.weight", (width, 3 * width), _names(ours, "weight"), lambda weight: weight.t().chunk(3)
        )
        yield Rule(f"{attn}.c_attn.bias", (3 * width,), _names(ours, "bias"), lambda bias: bias.chunk(3))
        yield Rule(f"{attn}.c_proj.weight", (width, width), (f"{ours}.out_proj.weight",), lambda weight: (weight.t(),))
        yield Rule(f"{attn}.c_proj.bias", (width,), (f"{ours}.out_proj.bias",))
        for name, shape in (("c_fc", (width, inner)), ("c_proj", (inner, width))):
            yield _table(f"{source}.mlp.{name}", f"{target}.mlp.{name}", *shape)
            yield Rule(f"{source}.mlp.{name}.bias", shape[1:], (f"{target}.mlp.{name}.bias",))
    yield from _affine("gpt.ln_f", f"{stack}.layer_norm", width)
    yield from _affine("final_norm", f"{causal_lm}.final_norm", width)
    yield _table("mel_head", f"{causal_lm}.lm_head", decoder.vocab_size, width)
    yield Rule("mel_head.bias", (decoder.vocab_size,), (f"{causal_lm}.lm_head.bias",))


def _conditioning_rules(width: int, feature_size: int, num_blocks: int) -> Iterator[Rule]:
    theirs = ours = "conditioning_encoder"
    yield _table(f"{theirs}.init", f"{ours}.mel_conv", width, feature_size, 1)
    yield Rule(f"{theirs}.init.bias", (width,), (f"{ours}.mel_conv.bias",))

    def heads_apart(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split rows in the order [head][q, k, v][channel]; weights have a last kernel axis of 1."""
        per_head = rows.reshape(width // HEAD_DIM, 3, HEAD_DIM, *rows.shape[1:2])
        return tuple(part.flatten(0, 1) for part in per_head.unbind(1))

    for index in range(num_blocks):
        source, target = f"{theirs}.attn.{index}", f"{ours}.mel_attn_blocks.{index}"
        yield from _affine(f"{source}.norm", f"{ours}.group_norms.{index}", width)
        yield Rule(f"{source}.qkv.weight", (3 * width, width, 1), _names(target, "weight"), heads_apart)
        yield Rule(f"{source}.qkv.bias", (3 * width,), _names(target, "bias"), heads_apart)
        yield Rule(
            f"{source}.proj_out.weight",
            (width, width, 1),
            (f"{target}.out_proj.weight",),
            lambda weight: (weight.squeeze(-1),),
        )
        yield Rule(f"{source}.proj_out.bias", (width,), (f"{target}.out_proj.bias",))


def encoder_rules(config: PreTrainedConfig) -> Iterator[Rule]:
    """Yield the rules for the tensors of `clvp2.pth`, by the `text_config` and the `speech_config` of `config`."""
    yield Rule("temperature", (), ("logit_scale",))
    for side in ("text", "speech"):
        encoder = getattr(config, f"{side}_config")
        width, inner = encoder.hidden_size, encoder.intermediate_size
        stack, ours = f"{side}_transformer.transformer", f"{side}_encoder_model"
        yield _table(f"{side}_emb", f"{ours}.token_embedding", encoder.vocab_size, width)
        yield _table(f"to_{side}_latent", f"{ours}.projection", encoder.projection_dim, width)
        yield from _affine(f"{stack}.norm", f"{ours}.final_layer_norm", width)
        channels = max(encoder.projection_dim // (2 * encoder.num_attention_heads), 32)
        yield Rule(
            f"{stack}.attn_layers.rotary_pos_emb.inv_freq",
            (channels // 2,),
            (f"{ours}.rotary_pos_emb.inv_freq",),
            lambda stored: (_frequencies(stored),),
        )
        for index in range(encoder.num_hidden_layers):
            attention = f"{stack}.attn_layers.layers.{2 * index}"
            feed_forward = f"{stack}.attn_layers.layers.{2 * index + 1}"
            target = f"{ours}.layers.{index}"
            yield Rule(f"{attention}.0.0.g", (width,), (f"{target}.input_rmsnorm.weight",))
            for letter in "qkv":
                yield _table(f"{attention}.1.wrap.to_{letter}", f"{target}.self_attn.{letter}_proj", width, width)
            yield _table(f"{attention}.1.wrap.to_out", f"{target}.self_attn.out_proj", width, width)
            yield Rule(f"{attention}.1.wrap.to_out.bias", (width,), (f"{target}.self_attn.out_proj.bias",))
            yield Rule(f"{feed_forward}.0.0.g", (width,), (f"{target}.post_attention_rmsnorm.weight",))
            net, mlp = f"{feed_forward}.1.wrap.net", f"{target}.mlp"
            yield _table(f"{net}.0.proj", f"{mlp}.fc1.proj", 2 * inner, width)
            yield Rule(f"{net}.0.proj.bias", (2 * inner,), (f"{mlp}.fc1.proj.bias",))
            yield _table(f"{net}.3", f"{mlp}.fc2", width, inner)
            yield Rule(f"{net}.3.bias", (width,), (f"{mlp}.fc2.bias",))


def _frequencies(stored: torch.Tensor) -> torch.Tensor:
    """Return rotary frequencies; recompute them if the file has rounded them to a half type."""
    if stored.element_size() >= 4:
        return stored
    return 10000 ** -(torch.arange(len(stored), dtype=torch.float32) / len(stored))
