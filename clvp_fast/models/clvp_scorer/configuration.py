"""Configurations of CLVP's scorer: a text encoder, a speech encoder, and the two together.

The encoders and their fields are those of `models.clvp`. Each class reads the configuration of its own kind of
checkpoint, and its part of a full CLVP checkpoint's.
"""

import os
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from clvp_fast.models.clvp.configuration import NUM_SPEECH_CODES, SCORER_TYPE, ClvpConfig, ClvpEncoderConfig


@strict
class CLVPTextConfig(ClvpEncoderConfig):
    """Configuration of a [`CLVPTextModel`]: the fields and defaults of [`ClvpEncoderConfig`].

    `from_pretrained` reads the configuration of a text model, of a [`CLVPModel`], of a [`ClvpEncoder`], or of a full
    CLVP.
    """

    model_type = "clvp_text_model"
    base_config_key = "text_config"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "CLVPTextConfig":
        """Read the configuration of this side; raise ValueError for a model that has none."""
        return _load_side(cls, pretrained_model_name_or_path, **kwargs)


@strict
class CLVPSpeechConfig(ClvpEncoderConfig):
    """Configuration of a [`CLVPSpeechModel`]: the fields of [`ClvpEncoderConfig`], with the 8192 rows of speech codes.

    `from_pretrained` reads the configuration of a speech model, of a [`CLVPModel`], of a [`ClvpEncoder`], or of a full
    CLVP.
    """

    model_type = "clvp_speech_model"
    base_config_key = "speech_config"

    vocab_size: int = NUM_SPEECH_CODES

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "CLVPSpeechConfig":
        """Read the configuration of this side; raise ValueError for a model that has none."""
        return _load_side(cls, pretrained_model_name_or_path, **kwargs)


@strict
class CLVPConfig(PreTrainedConfig):
    """Configuration of [`CLVPModel`], the scorer. ([`ClvpConfig`] is the full CLVP's, with a decoder.)

    `from_pretrained` reads a scorer's configuration or the encoders' part of a full CLVP's.

    Args:
        text_config: a [`CLVPTextConfig`], another [`ClvpEncoderConfig`], or a dictionary; `None` takes the defaults.
        speech_config: likewise, with [`CLVPSpeechConfig`].
        projection_dim: width of the shared embedding, which both parts must have; `None` takes it from them.
        logit_scale_init_value: initial value of `logit_scale`, the logarithm of the similarity's scale.
        initializer_factor: factor on the standard deviations of random weights.

    Raises:
        ValueError: the widths of the shared embedding differ.
    """

    model_type = SCORER_TYPE
    # transformers up to 5.17 reads `sub_configs`, later ones `sub_configs_defaults`.
    sub_configs: ClassVar[Any] = {"text_config": CLVPTextConfig, "speech_config": CLVPSpeechConfig}
    sub_configs_defaults: ClassVar[Any] = dict(sub_configs)

    if TYPE_CHECKING:  # types of the arguments, and of their values after `__post_init__`
        text_config: CLVPTextConfig
        speech_config: CLVPSpeechConfig

        def __init__(
            self,
            text_config: dict | CLVPTextConfig | None = None,
            speech_config: dict | CLVPSpeechConfig | None = None,
            projection_dim: int | None = None,
            logit_scale_init_value: float = 2.6592,
            initializer_factor: float = 1.0,
            **kwargs: Any,
        ): ...
    else:
        text_config: dict | PreTrainedConfig | None = None
        speech_config: dict | PreTrainedConfig | None = None
    projection_dim: int | None = None
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs):
        for key, config_class in type(self).sub_configs.items():
            value = getattr(self, key)
            if not isinstance(value, config_class):
                setattr(self, key, config_class(**_fields(value)))
        widths = [self.text_config.projection_dim, self.speech_config.projection_dim]
        if self.projection_dim is None:
            self.projection_dim = widths[0]
        if {self.projection_dim} != set(widths):
            raise ValueError(
                f"projection_dim is {self.projection_dim}, {widths[0]} in text_config and {widths[1]} in "
                "speech_config: texts and speech share one embedding, so give all the same width"
            )
        super().__post_init__(**kwargs)

    @classmethod
    def from_text_speech_configs(
        cls, text_config: CLVPTextConfig, speech_config: CLVPSpeechConfig, **kwargs
    ) -> "CLVPConfig":
        """Make a configuration of two encoders; `kwargs` are other fields of [`CLVPConfig`]."""
        return cls(text_config=text_config.to_dict(), speech_config=speech_config.to_dict(), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "CLVPConfig":
        """Read the configuration of a scorer or of a full CLVP; raise ValueError for another model's."""
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        _check_type(cls, pretrained_model_name_or_path, config_dict, ClvpConfig.model_type, cls.model_type)
        if config_dict["model_type"] == ClvpConfig.model_type:
            # The file omits defaults of the full CLVP, which differ from those of the classes here.
            composite = ClvpConfig.from_dict(config_dict).to_dict()
            others = ("decoder_config", "projection_dim", "model_type", "architectures")
            config_dict = {key: value for key, value in composite.items() if key not in others}
        return cls.from_dict(config_dict, **kwargs)


_Side = TypeVar("_Side", bound=ClvpEncoderConfig)


def _load_side(cls: type[_Side], name: str | os.PathLike, **kwargs) -> _Side:
    config_dict, kwargs = cls.get_config_dict(name, **kwargs)
    whole = (ClvpConfig.model_type, CLVPConfig.model_type)
    _check_type(cls, name, config_dict, *whole, ClvpEncoderConfig.model_type, cls.model_type)
    kind = config_dict["model_type"]
    if kind == CLVPConfig.model_type:
        config_dict = config_dict[cls.base_config_key]
    elif kind != cls.model_type:
        encoder = ClvpConfig if kind == ClvpConfig.model_type else ClvpEncoderConfig
        encoder = encoder.from_dict(config_dict)
        config_dict = _fields(getattr(encoder, cls.base_config_key, encoder))
    return cls.from_dict(config_dict, **kwargs)


def _fields(value: dict | PreTrainedConfig | None) -> dict:
    """Return the fields of a sub-configuration; all of them if `value` is a configuration of another class."""
    fields = value.to_dict() if isinstance(value, PreTrainedConfig) else value or {}
    return {key: field for key, field in fields.items() if key != "model_type"}


def _check_type(cls: type, name: str | os.PathLike, config_dict: dict, *readable: str) -> None:
    kind = config_dict.get("model_type")
    if kind not in readable:
        raise ValueError(
            f"{name} is a checkpoint of model_type {kind!r}, and {cls.__name__} reads {', '.join(readable)}: CLVP... "
            "are the classes of the scorer, Clvp... those of the full model and of its decoder"
        )
