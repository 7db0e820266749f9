"""Input that CLAP's models refuse, and their sentences."""

import pytest
import torch

import clvp_fast
from tests.models.clap.builders import SHAPES, composite_config, features, pair, texts


def audio(shape="unfused"):
    model = pair("ClapAudioModel", shape)[1]
    return model, features(model.config)


def test_text():
    model = pair("ClapTextModel")[1]
    ids, mask = texts()
    for inputs in ({}, dict(input_ids=ids, inputs_embeds=torch.zeros(3, 9, 48))):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**inputs)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, 9\] as the text, got \[3, 8\]"):
        model(ids, mask[:, :8])
    long = torch.full((2, 39), 5)
    message = (
        "text of 39 tokens is too long: the model has positions for 38; cut it with truncation=True, max_length=38"
    )
    with pytest.raises(ValueError, match=message):
        model(long)
    with pytest.raises(ValueError, match="text of 39 tokens is too long"):
        model(inputs_embeds=torch.zeros(1, 39, 48))
    long[:, 38] = 1  # padding takes no position
    assert model(long).last_hidden_state.shape == (2, 39, 48)


def test_no_padding_token():
    """Refuse a configuration without it, as positions count from it."""
    fields = SHAPES["unfused"]["text_config"] | dict(pad_token_id=None)
    model = clvp_fast.ClapTextModel(clvp_fast.ClapTextConfig(**fields)).eval()
    ids, _ = texts()
    with pytest.raises(ValueError, match=r"positions count from pad_token_id \+ 1 on, and it is None: give position_i"):
        model(ids)
    assert model(ids, position_ids=torch.arange(9)[None]).last_hidden_state.shape == (3, 9, 48)


def test_no_features():
    with pytest.raises(ValueError, match="You must specify input_features"):
        pair("ClapAudioModel")[1]()
    with pytest.raises(ValueError, match="You must specify input_features"):
        pair()[1](*texts()[:1])


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ("unfused", lambda x: x[:, 0], r"must be \[batch, 1, frames, 16\], got \[3, 180, 16\]"),
        ("unfused", lambda x: x.repeat(1, 4, 1, 1), "use a ClapFeatureExtractor with truncation='rand_trunc'"),
        ("fused", lambda x: x[:, :1], r"must be \[batch, 4, .*truncation='fusion' and feature_size=16"),
        ("unfused", lambda x: x[..., :8], r"got \[3, 1, 180, 8\]"),
        (
            "unfused",
            lambda x: x.repeat(1, 1, 2, 1),
            "hold 360 frames of 16 mel channels, and the model takes at most 256",
        ),
    ],
)
def test_features_of_another_model(shape, change, message):
    model, inputs = audio(shape)
    with pytest.raises(ValueError, match=message):
        model(change(inputs["input_features"]), inputs["is_longer"])


def test_is_longer():
    model, inputs = audio("fused")
    with pytest.raises(ValueError, match="is_longer is missing: a model with enable_fusion needs it"):
        model(inputs["input_features"])
    with pytest.raises(ValueError, match=r"is_longer must be \[3, 1\], one value a clip, got \[2, 1\]"):
        model(inputs["input_features"], inputs["is_longer"][:2])
    listed = model(inputs["input_features"], inputs["is_longer"].tolist())
    assert torch.equal(listed.pooler_output, model(**inputs).pooler_output)


def test_loss_of_unequal_numbers():
    _, model = pair()
    ids, mask = texts(2)
    with pytest.raises(ValueError, match="needs a clip for each text, and there are 2 texts and 3 clips"):
        model(ids, features(model.config.audio_config)["input_features"], attention_mask=mask, return_loss=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(flatten_patch_embeds=False), "flatten_patch_embeds must be True"),
        (dict(enable_fusion=True, fusion_type="channel_map"), "fusion_type 'channel_map' is not served"),
        (dict(num_attention_heads=[3, 4]), "a stage's width must be a multiple of its heads, got 32 and 3"),
        (dict(hidden_act="wave"), "unknown activation 'wave'"),
    ],
)
def test_configurations(changes, message):
    config = composite_config(clvp_fast).audio_config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        clvp_fast.ClapAudioModel(config)


def test_more_bad_configurations():
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_attention_heads, got 48 and 5"):
        clvp_fast.ClapTextModel(clvp_fast.ClapTextConfig(hidden_size=48, num_attention_heads=5))
    config = composite_config(clvp_fast)
    config.text_config = clvp_fast.ClapAudioConfig()
    with pytest.raises(TypeError, match="text_config must be a ClapTextConfig, not ClapAudioConfig"):
        clvp_fast.ClapModel(config)
    model, inputs = audio()
    model.audio_encoder.layers[1].blocks[0].window_size = 32
    with pytest.raises(ValueError, match="a stage has 16 x 16 patches, fewer than window_size 32"):
        model(**inputs)
