"""The base class of all CLVP models: random weights, loading, options."""

import torch
from torch import nn
from transformers import PreTrainedModel, initialization as init
from transformers.pytorch_utils import Conv1D

from clvp_fast.models.clvp.configuration import ClvpConfig, ClvpDecoderConfig, ClvpEncoderConfig
from clvp_fast.models.clvp.layers import ClvpRotaryPositionalEmbedding
from clvp_fast.models.common.parameters import arrange_parameters
from clvp_fast.models.common.plain import kinds_of
from clvp_fast.models.transformers_versions import CACHE


class ClvpPreTrainedModel(PreTrainedModel):
    """Weights initialisation, and loading and saving of checkpoints, for all CLVP models."""

    config: ClvpConfig
    config_class = ClvpConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ClvpEncoderLayer", "ClvpDecoderLayer", "ClvpConditioningEncoder"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012

    def post_init(self) -> None:
        """Initialise as transformers does, then arrange the parameters for the operators."""
        super().post_init()
        #: The class of each module at construction, which shows later replacements.
        self.kinds = kinds_of(self)
        arrange_parameters(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Layers of another width have `initializer_std`. transformers skips containers of classes outside its own
        # namespace, so only leaves are sure to be visited.
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv1d, nn.Embedding)):
            std = getattr(module, "initializer_std", 0.02 * self.config.initializer_factor)
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
                init.zeros_(bias)
        elif isinstance(module, ClvpRotaryPositionalEmbedding):
            init.copy_(module.inv_freq, module.initial_inv_freq())
        elif isinstance(scale := getattr(module, "logit_scale", None), nn.Parameter):
            init.constant_(scale, self.config.logit_scale_init_value)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a checkpoint: a directory, or a hub id. See `transformers.PreTrainedModel.from_pretrained`.

        A part of CLVP (an encoder, the decoder) is loaded from its own checkpoint or from a composite one.
        `config_type` (`"text_config"`, the default, or `"speech_config"`) chooses the encoder.
        """
        config_type = kwargs.pop("config_type", None)
        is_part = cls.config_class in (ClvpEncoderConfig, ClvpDecoderConfig)
        if config is None and is_part and pretrained_model_name_or_path is not None:
            hub = {
                k: kwargs[k] for k in ("cache_dir", "token", "revision", "subfolder", "local_files_only") if k in kwargs
            }
            stored, _ = ClvpConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            if stored.get("model_type") == "clvp":
                return cls._from_composite(pretrained_model_name_or_path, config_type or "text_config", **kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        arrange_parameters(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def _from_composite(cls, path, config_type: str, output_loading_info: bool = False, **kwargs):
        from clvp_fast.models.clvp.modeling import ClvpModelForConditionalGeneration

        composite, info = ClvpModelForConditionalGeneration.from_pretrained(path, output_loading_info=True, **kwargs)
        part = composite.part(cls, config_type)
        return (part, info) if output_loading_info else part

    def option(self, name: str, given: bool | None) -> bool:
        """Return an option of the call, or the configuration's if the call gives none."""
        return bool(getattr(self.config, name, False) if given is None else given)
