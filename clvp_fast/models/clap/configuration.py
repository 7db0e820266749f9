"""Configurations of CLAP: a RoBERTa text tower, an HTSAT (Swin) audio tower, and the composite of the two.

Field names, defaults and JSON are those of transformers' classes, so that checkpoints can be exchanged both ways.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class ClapTextConfig(PreTrainedConfig):
    """Configuration of a [`ClapTextModel`].

    Args:
        vocab_size: rows of the token embedding.
        hidden_size: width of the layers and of the pooled output.
        num_hidden_layers: number of layers.
        num_attention_heads: number of heads of each attention layer.
        intermediate_size: width of the feed-forward layers.
        hidden_act: activation of the feed-forward layers: "gelu", "relu", "silu", "gelu_new", ….
        hidden_dropout_prob: dropout of embeddings and layer outputs in training.
        attention_probs_dropout_prob: dropout of the attention weights in training.
        max_position_embeddings: rows of the position embedding; a text may have `pad_token_id + 1` fewer tokens.
        type_vocab_size: rows of the embedding of `token_type_ids`.
        initializer_factor: factor on the standard deviations of random weights.
        layer_norm_eps: epsilon of the layer norms.
        projection_dim: width of the embedding that text and audio share.
        pad_token_id, bos_token_id, eos_token_id: RoBERTa's.
        projection_hidden_act: activation between the two layers of the projection.
    """

    model_type = "clap_text_model"
    base_config_key = "text_config"

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    initializer_factor: float = 1.0
    layer_norm_eps: float = 1e-12
    projection_dim: int = 512
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    projection_hidden_act: str = "relu"


@strict
class ClapAudioConfig(PreTrainedConfig):
    """Configuration of a [`ClapAudioModel`].

    Args:
        window_size: rows and columns of an attention window, in patches.
        num_mel_bins: mel channels of the features; divides `spec_size`.
        spec_size: side of the square image that the spectrogram is folded into: `spec_size / num_mel_bins` strips of
            time, one above the other.
        hidden_act: activation of the feed-forward layers.
        patch_size, patch_stride: side of the image's patches and distance between them, one number or two.
        num_classes: kept for compatibility; no class uses it.
        hidden_size: width of the pooled output: `patch_embeds_hidden_size * 2 ** (stages - 1)`.
        projection_dim: width of the embedding that text and audio share.
        depths: layers of each stage.
        num_attention_heads: heads of each stage.
        enable_fusion: take four spectrograms per clip, the whole and three crops, and fuse them if the clip is longer
            than the model's input.
        hidden_dropout_prob: dropout of the feed-forward layers in training.
        fusion_type: kept for compatibility; "aff_2d" is what is computed.
        patch_embed_input_channels: channels of the image.
        flatten_patch_embeds: must be True.
        patch_embeds_hidden_size: width of the first stage; each further one is twice as wide.
        enable_patch_layer_norm: normalise the patch embeddings.
        drop_path_rate: in training, share of attention blocks dropped in the last layer; fewer in earlier ones.
        attention_probs_dropout_prob: dropout of attention weights and outputs in training.
        qkv_bias: biases in the query, key and value projections.
        mlp_ratio: width of the feed-forward layers, relative to that of their stage.
        aff_block_r: the factor by which the fusion is narrower inside.
        num_hidden_layers: number of stages; it only affects the spread of random weights.
        projection_hidden_act: activation between the two layers of the projection.
        layer_norm_eps: epsilon of the layer norms around attention and feed-forward layers.
        initializer_factor: factor on the standard deviations of random weights.
    """

    model_type = "clap_audio_model"
    base_config_key = "audio_config"

    window_size: int = 8
    num_mel_bins: int = 64
    spec_size: int = 256
    hidden_act: str = "gelu"
    patch_size: int | list[int] | tuple[int, int] = 4
    patch_stride: int | list[int] | tuple[int, ...] = (4, 4)
    num_classes: int = 527
    hidden_size: int = 768
    projection_dim: int = 512
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_attention_heads: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    enable_fusion: bool = False
    hidden_dropout_prob: float | int = 0.1
    fusion_type: str | None = None
    patch_embed_input_channels: int = 1
    flatten_patch_embeds: bool = True
    patch_embeds_hidden_size: int = 96
    enable_patch_layer_norm: bool = True
    drop_path_rate: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    qkv_bias: bool = True
    mlp_ratio: float = 4.0
    aff_block_r: int = 4
    num_hidden_layers: int = 4
    projection_hidden_act: str = "relu"
    layer_norm_eps: float = 1e-5
    initializer_factor: float = 1.0


@strict
class ClapConfig(PreTrainedConfig):
    """Configuration of [`ClapModel`].

    Args:
        text_config: a [`ClapTextConfig`] or its dictionary; `None` takes the defaults.
        audio_config: a [`ClapAudioConfig`] or its dictionary; `None` takes the defaults.
        logit_scale_init_value: initial scale of the similarities; both parameters begin as its logarithm.
        projection_dim: width of the shared embedding; passed on to both parts.
        projection_hidden_act: activation of the projections; passed on to both parts.
        initializer_factor: factor on the standard deviations of random weights.
    """

    model_type = "clap"
    # transformers up to 5.17 reads `sub_configs`, later ones `sub_configs_defaults`.
    sub_configs: ClassVar[Any] = {"text_config": ClapTextConfig, "audio_config": ClapAudioConfig}
    sub_configs_defaults: ClassVar[Any] = dict(sub_configs)

    if TYPE_CHECKING:  # types of the arguments, and of their values after `__post_init__`
        text_config: ClapTextConfig
        audio_config: ClapAudioConfig

        def __init__(
            self,
            text_config: dict | ClapTextConfig | None = None,
            audio_config: dict | ClapAudioConfig | None = None,
            logit_scale_init_value: float = 1 / 0.07,
            projection_dim: int = 512,
            projection_hidden_act: str = "relu",
            initializer_factor: float = 1.0,
            **kwargs: Any,
        ): ...
    else:
        text_config: dict | PreTrainedConfig | None = None
        audio_config: dict | PreTrainedConfig | None = None
    logit_scale_init_value: float = 1 / 0.07
    projection_dim: int = 512
    projection_hidden_act: str = "relu"
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs):
        for key, config_class in type(self).sub_configs.items():
            value = getattr(self, key)
            if value is None or isinstance(value, dict):
                setattr(self, key, config_class(**(value or {})))
            part = getattr(self, key)
            part.projection_dim = self.projection_dim
            part.projection_hidden_act = self.projection_hidden_act
        self.hidden_size = self.text_config.hidden_size
        self.num_hidden_layers = self.text_config.num_hidden_layers + len(self.audio_config.depths)
        super().__post_init__(**kwargs)

    @classmethod
    def from_text_audio_configs(
        cls, text_config: ClapTextConfig, audio_config: ClapAudioConfig, **kwargs
    ) -> "ClapConfig":
        """Make a composite of two configurations; `kwargs` are other fields of [`ClapConfig`]."""
        return cls(text_config=text_config.to_dict(), audio_config=audio_config.to_dict(), **kwargs)
