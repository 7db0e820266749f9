"""The outputs of the CLAP classes. Fields that were not asked for are `None` and left out of the tuple form."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class ClapTextModelOutput(ModelOutput):
    """Output of [`ClapTextModelWithProjection`].

    Args:
        text_embeds: `[batch, projection_dim]`, the projection of the pooled output; not normalised.
        last_hidden_state: `[batch, length, hidden_size]`.
        hidden_states: input of the first layer and output of each; each as `last_hidden_state`.
        attentions: attention weights of each layer, `[batch, heads, length, length]`.
    """

    text_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ClapAudioModelOutput(ModelOutput):
    """Output of [`ClapAudioModelWithProjection`].

    Args:
        audio_embeds: `[batch, projection_dim]`, the projection of the pooled output; not normalised.
        last_hidden_state: `[batch, hidden_size, frequencies, times]` of the last stage.
        hidden_states: the patch embeddings and the output of each stage, `[batch, channels, rows, columns]`.
        attentions: attention weights of each stage's last layer, `[batch * windows, heads, positions, positions]`.
    """

    audio_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ClapOutput(ModelOutput):
    """Output of [`ClapModel`].

    Args:
        loss: contrastive loss, a scalar (with `return_loss=True`).
        logits_per_audio: `[clips, texts]`, cosine similarities times `exp(logit_scale_a)`.
        logits_per_text: `[texts, clips]`, cosine similarities times `exp(logit_scale_t)`.
        text_embeds, audio_embeds: normalised embeddings, `[texts | clips, projection_dim]`.
        text_model_output, audio_model_output: outputs of the towers.
    """

    loss: torch.Tensor | None = None
    logits_per_audio: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    audio_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    audio_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        """Return the fields that are not None; the towers' outputs become tuples too."""
        return tuple(part.to_tuple() if isinstance(part, ModelOutput) else part for part in self.values())
