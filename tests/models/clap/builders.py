"""Small CLAP configurations of several shapes, and pairs of stock and own models with the same weights."""

import copy

import torch
import transformers

import clvp_fast

PAD = 1


def _text(**changes) -> dict:
    fields = dict(vocab_size=120, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=70)
    fields |= dict(max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return fields | changes


def _audio(**changes) -> dict:
    fields = dict(spec_size=64, num_mel_bins=16, window_size=4, patch_size=2, patch_stride=2, hidden_size=64)
    fields |= dict(patch_embeds_hidden_size=32, depths=[2, 2], num_attention_heads=[2, 4], hidden_dropout_prob=0.0)
    return fields | changes


#: "fused" and "unfused" as the checkpoints are; "odd" has overlapping patches, no biases, no patch norm, three strips
#: of 20 rows (so that mel channels are stretched too), windows that need padding, and other activations.
SHAPES = {
    "unfused": dict(text_config=_text(), audio_config=_audio(), projection_dim=24),
    "fused": dict(
        text_config=_text(type_vocab_size=2, layer_norm_eps=1e-5),
        audio_config=_audio(enable_fusion=True, fusion_type="aff_2d", depths=[2, 2, 1], num_attention_heads=[2, 4, 4])
        | dict(hidden_size=128),
        projection_dim=24,
    ),
    "odd": dict(
        text_config=_text(hidden_act="hardswish", pad_token_id=3, layer_norm_eps=1e-3),
        audio_config=_audio(spec_size=60, patch_size=[4, 2], qkv_bias=False, enable_patch_layer_norm=False)
        | dict(hidden_act="hardswish", mlp_ratio=2.5, layer_norm_eps=1e-3, window_size=7, enable_fusion=True),
        projection_dim=20,
        projection_hidden_act="gelu",
        logit_scale_init_value=5.0,
    ),
}
SIDES = {
    "ClapModel": None,
    "ClapTextModel": "text_config",
    "ClapTextModelWithProjection": "text_config",
    "ClapAudioModel": "audio_config",
    "ClapAudioModelWithProjection": "audio_config",
}


def fields_of(shape: str, **changes) -> dict:
    """Return the fields of a shape, with `changes` in both parts that have the field."""
    fields = copy.deepcopy(SHAPES[shape])
    for part, known in (("text_config", clvp_fast.ClapTextConfig()), ("audio_config", clvp_fast.ClapAudioConfig())):
        fields[part] |= {name: value for name, value in changes.items() if hasattr(known, name)}
    return fields


def composite_config(package, shape: str = "unfused", **changes):
    """Make the composite configuration of a shape by `package` (`transformers` or `clvp_fast`)."""
    return package.ClapConfig(**fields_of(shape, **changes))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw weights so that nothing is an identity: gains 1 ± 0.3, biases 0.1, bias tables 1, norms' statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.startswith("logit_scale"):
            value = 1 + 0.3 * noise
        elif name.endswith("running_var"):
            value = 1 + noise.abs()
        elif tensor.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.3 * noise
        elif name.endswith("bias_table"):
            value = noise
        elif "embeddings.weight" in name:
            value = 0.5 * noise
        elif name.endswith(("bias", "running_mean")):
            value = 0.1 * noise
        else:
            value = noise * (2.0 if "query" in name or "key" in name else 1.0) / tensor[0].numel() ** 0.5
        tensor.copy_(value)
    return model


def pair(class_name: str = "ClapModel", shape: str = "unfused", dtype: torch.dtype = torch.float32, **changes):
    """Return `(stock, ours)` of a class in eval mode, with equal weights."""
    models = []
    for package in (transformers, clvp_fast):
        config = composite_config(package, shape, **changes)
        side = SIDES[class_name]
        models.append(getattr(package, class_name)(config if side is None else getattr(config, side)))
    stock, ours = models
    randomize(stock)
    ours.load_state_dict(stock.state_dict())
    return stock.to(dtype).eval(), ours.to(dtype).eval()


def texts(batch: int = 3, length: int = 9, pad: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids `[batch, length]` and their mask; row i ends with i places of padding."""
    ids = torch.randint(4, 120, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) < length - torch.arange(batch)[:, None]
    return ids.masked_fill(~mask, pad), mask.long()


def features(config, batch: int = 3, frames: int = 180, dtype: torch.dtype = torch.float32):
    """Return `input_features` and `is_longer` (every second clip is) for the model of an audio configuration."""
    shape = batch, 4 if config.enable_fusion else 1, frames, config.num_mel_bins
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return {"input_features": noise, "is_longer": torch.arange(batch)[:, None] % 2 == 1}


def inputs_of(class_name: str, config, dtype: torch.dtype = torch.float32) -> dict:
    """Return inputs of a model of the class, for a composite configuration; numbers of clips and texts differ."""
    found = {}
    if "Audio" not in class_name:
        ids, mask = texts(pad=config.text_config.pad_token_id)
        found |= dict(input_ids=ids, attention_mask=mask)
    if "Text" not in class_name:
        found |= features(config.audio_config, batch=4, dtype=dtype)
    return found
