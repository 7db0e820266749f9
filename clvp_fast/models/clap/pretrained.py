"""The base class of all CLAP models: random weights, loading, options."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel, initialization as init

from clvp_fast.models.clap.audio_attention import ClapAudioSelfAttention
from clvp_fast.models.clap.configuration import ClapConfig
from clvp_fast.models.clap.text import ClapTextEmbeddings
from clvp_fast.models.common.parameters import arrange_parameters


class ClapPreTrainedModel(PreTrainedModel):
    """Weights initialisation, and loading and saving of checkpoints, for all CLAP models."""

    config: ClapConfig
    config_class = ClapConfig
    base_model_prefix = "clap"
    input_modalities: str | tuple[str, ...] = ("audio", "text")
    supports_gradient_checkpointing = False
    _no_split_modules = ["ClapTextLayer", "ClapAudioLayer"]  # noqa: RUF012

    def post_init(self) -> None:
        """Initialise as transformers does, then arrange the parameters for the operators."""
        super().post_init()
        arrange_parameters(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        factor = self.config.initializer_factor
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=0.02 * factor)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            std = (2 * self.config.hidden_size * self.config.num_hidden_layers) ** -0.5 * factor
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (ClapAudioSelfAttention, ClapTextEmbeddings)):
            for name, value in module.initial_buffers().items():
                init.copy_(getattr(module, name), value)
            if isinstance(module, ClapAudioSelfAttention):
                init.zeros_(module.relative_position_bias_table)
        elif hasattr(module, "logit_scale_a"):
            for name in ("logit_scale_a", "logit_scale_t"):
                init.constant_(getattr(module, name), math.log(self.config.logit_scale_init_value))
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a checkpoint: a directory, or a hub id. See `transformers.PreTrainedModel.from_pretrained`.

        A tower, with or without its projection, is loaded from its own checkpoint or from one of [`ClapModel`].
        """
        if config is None and cls.config_class is not ClapConfig and pretrained_model_name_or_path is not None:
            hub = {
                k: kwargs[k] for k in ("cache_dir", "token", "revision", "subfolder", "local_files_only") if k in kwargs
            }
            stored, _ = ClapConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            if stored.get("model_type") == "clap":
                return cls._from_composite(pretrained_model_name_or_path, **kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        arrange_parameters(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def _from_composite(cls, path, output_loading_info: bool = False, **kwargs):
        from clvp_fast.models.clap.modeling import ClapModel

        composite, info = ClapModel.from_pretrained(path, output_loading_info=True, **kwargs)
        part = composite.part(cls)
        return (part, info) if output_loading_info else part

    def option(self, name: str, given: bool | None) -> bool:
        """Return an option of the call, or the configuration's if the call gives none."""
        return bool(getattr(self.config, name, False) if given is None else given)
