"""Configurations of CLVP: two encoders (text, speech), a decoder, and the composite of the three.

Field names, defaults and JSON are those that transformers documents, so that checkpoints can be exchanged both ways.
The options of this project (`pool_padding`, `contiguous_positions`) are extra keys: absent ones have their default, and
they are written only if they are set.
"""

import os
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# The rows of the speech encoder's embedding in every trained CLVP: the decoder's 8194 codes without start and stop
# tokens.
NUM_SPEECH_CODES = 8192

# The `model_type` of `CLVPModel`, the scorer (`models.clvp_scorer`), whose checkpoints have no decoder.
SCORER_TYPE = "clvp_scorer"


@strict
class ClvpEncoderConfig(PreTrainedConfig):
    """Configuration of a [`ClvpEncoder`], for the text or for the speech side.

    Args:
        vocab_size: rows of the token embedding.
        hidden_size: width of the layers and of the pooled output.
        intermediate_size: width of the gated feed-forward layer.
        projection_dim: width of the embedding that text and speech share.
        num_hidden_layers: number of layers.
        num_attention_heads: number of heads of each attention layer.
        hidden_act: activation of the gate: "gelu", "relu", "selu", "gelu_new", "quick_gelu", ….
        layer_norm_eps: epsilon of the normalisations.
        attention_dropout: dropout of the attention weights in training.
        dropout: dropout inside the feed-forward layers in training.
        use_rotary_embedding: rotate queries, keys and values by position.
        use_attention_bias: biases in the query, key and value projections.
        summary_type: how the pooled output is made: "mean", "last", "first" or "cls_index".
        initializer_factor: factor on the standard deviations of random weights.
        bos_token_id, eos_token_id: ids put around the text for the conditioning encoder.

    `pool_padding=False` (an option of this project, absent by default) leaves padded positions out of the mean, so that
    a text in a padded batch is embedded as it would be alone; transformers averages over the padding too.
    """

    model_type = "clvp_encoder"
    base_config_key: ClassVar[Any] = ["text_config", "speech_config"]

    vocab_size: int = 256
    hidden_size: int = 768
    intermediate_size: int = 1536
    projection_dim: int = 768
    num_hidden_layers: int = 20
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.1
    dropout: float | int = 0.1
    use_rotary_embedding: bool = True
    use_attention_bias: bool = False
    summary_type: str = "mean"
    initializer_factor: float = 1.0
    bos_token_id: int | None = 255
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, config_type: str = "text_config", **kwargs
    ) -> "ClvpEncoderConfig":
        """Load from an encoder's own checkpoint, or one side (`config_type`) of a composite CLVP checkpoint."""
        if config_type not in cls.base_config_key:
            raise ValueError(f"config_type must be 'text_config' or 'speech_config', not {config_type!r}")
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "clvp":
            config_dict = config_dict[config_type]
        return cls.from_dict(config_dict, **kwargs)


@strict
class ClvpDecoderConfig(PreTrainedConfig):
    """Configuration of the GPT-2-like decoder of speech tokens and of the conditioning encoder before it.

    Args:
        vocab_size: speech tokens, start and stop token included.
        max_position_embeddings: positions of speech tokens; bounds what can be generated.
        max_text_tokens: positions of text tokens, including the three that are put around a text.
        hidden_size, num_hidden_layers, num_attention_heads: size of the decoder.
        n_inner: width of the feed-forward layers; `None` is 4 times `hidden_size`.
        num_mel_attn_blocks: attention blocks of the conditioning encoder.
        activation_function: "relu", "silu", "gelu", "tanh" or "gelu_new".
        resid_pdrop, embd_pdrop, attention_dropout: dropout in training.
        layer_norm_epsilon: epsilon of the layer normalisations.
        initializer_range: standard deviation on which random residual projections are scaled.
        summary_type, summary_use_proj, summary_activation, summary_proj_to_labels, summary_first_dropout: kept for
            compatibility; no class of CLVP uses them for the decoder.
        use_cache: whether to return keys and values for the next step.
        bos_token_id, eos_token_id: the start and the stop token of speech.
        feature_size: mel bins of the voice clip's features.
        use_attention_bias: biases in the query, key and value projections.
        initializer_factor: factor on the standard deviations of random weights.
        decoder_fixing_codes: what `fix_speech_decoder_output` writes from the first stop token on, and at the end.

    `contiguous_positions=True` (an option of this project, absent by default) gives the k-th generated token
    position k, as in training; transformers and Tortoise with its cache give it k + 1.
    """

    model_type = "clvp_decoder"
    base_config_key = "decoder_config"

    vocab_size: int = 8194
    max_position_embeddings: int = 608
    max_text_tokens: int = 404
    hidden_size: int = 1024
    num_hidden_layers: int = 30
    num_attention_heads: int = 16
    n_inner: int | None = None
    num_mel_attn_blocks: int = 6
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float | int = 0.1
    use_cache: bool = True
    bos_token_id: int | None = 8192
    eos_token_id: int | list[int] | None = 8193
    pad_token_id: int | None = None
    feature_size: int = 80
    use_attention_bias: bool = True
    initializer_factor: float = 1.0
    decoder_fixing_codes: list[int] | tuple[int, ...] = (83, 45, 45, 248)
    add_cross_attention: bool = False

    @property
    def inner_size(self) -> int:
        """The width of the feed-forward layers."""
        return 4 * self.hidden_size if self.n_inner is None else self.n_inner


@strict
class ClvpConfig(PreTrainedConfig):
    """Configuration of [`ClvpModelForConditionalGeneration`]. ([`CLVPConfig`] is the scorer's.)

    Args:
        text_config: a [`ClvpEncoderConfig`] or its dictionary; `None` takes the defaults.
        speech_config: likewise; `None` takes the defaults with the 8192 rows that trained speech encoders have.
        decoder_config: a [`ClvpDecoderConfig`] or its dictionary; `None` takes the defaults.
        projection_dim: width of the shared embedding.
        logit_scale_init_value: initial value of `logit_scale`, the logarithm of the similarity's scale.
        initializer_factor: factor on the standard deviations of random weights.
    """

    model_type = "clvp"
    # transformers up to 5.17 reads `sub_configs`, later ones `sub_configs_defaults`.
    sub_configs: ClassVar[Any] = {
        "text_config": ClvpEncoderConfig,
        "speech_config": ClvpEncoderConfig,
        "decoder_config": ClvpDecoderConfig,
    }
    sub_configs_defaults: ClassVar[Any] = dict(sub_configs)

    if TYPE_CHECKING:  # types of the arguments, and of their values after `__post_init__`
        text_config: ClvpEncoderConfig
        speech_config: ClvpEncoderConfig
        decoder_config: ClvpDecoderConfig

        def __init__(
            self,
            text_config: dict | ClvpEncoderConfig | None = None,
            speech_config: dict | ClvpEncoderConfig | None = None,
            decoder_config: dict | ClvpDecoderConfig | None = None,
            projection_dim: int = 768,
            logit_scale_init_value: float = 2.6592,
            initializer_factor: float = 1.0,
            **kwargs: Any,
        ): ...
    else:
        text_config: dict | PreTrainedConfig | None = None
        speech_config: dict | PreTrainedConfig | None = None
        decoder_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 768
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs):
        if self.speech_config is None:
            self.speech_config = ClvpEncoderConfig(vocab_size=NUM_SPEECH_CODES)
        for key, config_class in type(self).sub_configs.items():
            value = getattr(self, key)
            if value is None or isinstance(value, dict):
                setattr(self, key, config_class(**(value or {})))
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """Read a configuration as transformers does; raise ValueError for that of a scorer."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == SCORER_TYPE:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds the scorer CLVPModel, a text and a speech encoder without a "
                "decoder: load it with CLVPModel, not with a class that begins with Clvp"
            )
        return config_dict, kwargs

    @classmethod
    def from_sub_model_configs(
        cls,
        text_config: ClvpEncoderConfig,
        speech_config: ClvpEncoderConfig,
        decoder_config: ClvpDecoderConfig,
        **kwargs,
    ) -> "ClvpConfig":
        """Make a composite of three configurations; `kwargs` are other fields of [`ClvpConfig`]."""
        return cls(
            text_config=text_config.to_dict(),
            speech_config=speech_config.to_dict(),
            decoder_config=decoder_config.to_dict(),
            **kwargs,
        )
