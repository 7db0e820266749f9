"""Small CLVP configurations of several shapes, pairs of stock and own models with the same weights, and comparison.

Stock is transformers' own implementation, the oracle of the parity tests. Weights are random, norms not identities,
queries and keys strong enough that the softmax prefers some places over others.
"""

import copy
from collections.abc import Mapping

import torch
import transformers

import clvp_fast

START, STOP, CODES = 292, 293, 300


def _shape(encoder: dict, decoder: dict, **speech) -> dict:
    encoder = {"num_hidden_layers": 2, "vocab_size": 256, "attention_dropout": 0.0, "dropout": 0.0} | encoder
    decoder = {
        "vocab_size": CODES,
        "max_position_embeddings": 80,
        "max_text_tokens": 64,
        "num_hidden_layers": 2,
        "num_mel_attn_blocks": 2,
        "feature_size": 20,
        "bos_token_id": START,
        "eos_token_id": STOP,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
    } | decoder
    return {
        "text_config": encoder,
        "speech_config": encoder | {"vocab_size": CODES} | speech,
        "decoder_config": decoder,
        "projection_dim": encoder["projection_dim"],
    }


#: Head sizes 20, 32, 64 and 80; biases on and off; every kind of pooling, with a projection too; odd sizes; several
#: activations, one of which (hardswish) no operator of this package knows.
SHAPES = {
    "heads64": _shape(
        {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256, "projection_dim": 128},
        {"hidden_size": 128, "num_attention_heads": 2},
    ),
    "heads32": _shape(
        {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "intermediate_size": 150,
            "projection_dim": 70,
            "use_attention_bias": True,
            "hidden_act": "hardswish",
            "summary_type": "last",
        },
        {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "n_inner": 130,
            "activation_function": "hardswish",
            "use_attention_bias": False,
        },
        summary_type="first",
    ),
    "heads80": _shape(
        {
            "hidden_size": 160,
            "num_attention_heads": 2,
            "intermediate_size": 201,
            "projection_dim": 202,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-3,
            "summary_use_proj": True,
            "summary_activation": "tanh",
            "summary_first_dropout": 0.2,
        },
        {
            "hidden_size": 80,
            "num_attention_heads": 1,
            "num_hidden_layers": 3,
            "n_inner": 77,
            "activation_function": "silu",
            "layer_norm_epsilon": 1e-3,
            "num_mel_attn_blocks": 1,
        },
        num_hidden_layers=1,
    ),
    "unrotated": _shape(
        {
            "hidden_size": 60,
            "num_attention_heads": 3,
            "intermediate_size": 33,
            "projection_dim": 31,
            "hidden_act": "quick_gelu",
            "summary_type": "cls_index",
            "use_rotary_embedding": False,
        },
        {"hidden_size": 60, "num_attention_heads": 3, "activation_function": "tanh", "num_mel_attn_blocks": 3},
    ),
}


def composite_config(package, shape: str = "heads64", **changes):
    """Make the composite configuration of a shape by `package` (`transformers` or `clvp_fast`).

    `changes` are made in all three parts that have the field.
    """
    fields = copy.deepcopy(SHAPES[shape])
    for part in ("text_config", "speech_config", "decoder_config"):
        known = vars(getattr(package, "ClvpDecoderConfig" if part == "decoder_config" else "ClvpEncoderConfig")())
        fields[part] |= {name: value for name, value in changes.items() if name in known}
    return package.ClvpConfig(**fields)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw weights of std 0.08 (queries, keys 0.15), embeddings 0.5, gains 1 ± 0.3, biases 0.1; stop is unlikely."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "logit_scale" or ("norm" in name and name.endswith("weight")):
            value = 1 + 0.3 * noise
        elif "embed" in name:
            value = 0.5 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        else:
            value = (0.15 if "q_proj" in name or "k_proj" in name else 0.08) * noise
        parameter.copy_(value)
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            parameter[STOP] = -3.0
    return model


def pair(
    class_name: str = "ClvpModelForConditionalGeneration",
    shape: str = "heads64",
    side: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes,
):
    """Return `(stock, ours)` of a class in eval mode, with equal weights. `side` is the part of the configuration."""
    if side is None:
        side = {"ClvpModelForConditionalGeneration": None, "ClvpEncoder": "text_config"}.get(
            class_name, "decoder_config"
        )
    models = []
    for package in (transformers, clvp_fast):
        config = composite_config(package, shape, **changes)
        models.append(getattr(package, class_name)(config if side is None else getattr(config, side)))
    stock, ours = models
    randomize(stock, seed)
    ours.load_state_dict(stock.state_dict())
    return stock.to(dtype).eval(), ours.to(dtype).eval()


def texts(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids `[batch, length]` of text, none of them special."""
    return torch.randint(3, 255, (batch, length), generator=torch.Generator().manual_seed(seed))


def codes(batch: int = 2, length: int = 9, seed: int = 2) -> torch.Tensor:
    """Speech tokens `[batch, length]`, none of them special."""
    return torch.randint(0, START, (batch, length), generator=torch.Generator().manual_seed(seed))


def clips(batch: int = 2, frames: int = 21, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    """Return log-mel features `[batch, 20, frames]`."""
    return torch.randn(batch, 20, frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def padding(batch: int, length: int, side: str) -> torch.Tensor | None:
    """Return a mask `[batch, length]` that hides `row + 1` places on a side; None for `side="none"`."""
    if side == "none":
        return None
    hidden = torch.arange(batch)[:, None] + 1
    place = torch.arange(length)[None]
    return (place < length - hidden if side == "right" else place >= hidden).long()


def assert_same(found, expected, where: str = "output", tolerance: float | None = None) -> None:
    """Assert that both are equal up to rounding: 1e-5 in float32, 1e-10 in float64, relative to magnitudes above 1.

    Containers are compared item by item, the keys of mappings too; integers, infinities (scores of forbidden tokens)
    and what is no tensor exactly. NaN is equal to nothing.
    """
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), f"{where}: {list(found)} instead of {list(expected)}"
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}", tolerance)
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), f"{where}: {len(found)} items instead of {len(expected)}"
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]", tolerance)
    elif not isinstance(expected, torch.Tensor):
        assert found == expected, where
    else:
        assert found is not expected and found.shape == expected.shape, f"{where}: {found.shape}, {expected.shape}"
        assert found.dtype == expected.dtype, f"{where}: {found.dtype} instead of {expected.dtype}"
        if not expected.is_floating_point():
            assert torch.equal(found, expected), where
            return
        if tolerance is None:
            tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}[expected.dtype]
        finite = expected.isfinite()
        assert finite.any() and torch.equal(found[~finite], expected[~finite]), f"{where} is not finite"
        scale = max(1.0, expected[finite].abs().max().item())
        error = (found - expected)[finite].abs().max().item()
        assert error <= tolerance * scale, f"{where} is off by {error} at a scale of {scale}"


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of the parameters that have one; at least one must."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found, "no parameter has a gradient"
    return found
