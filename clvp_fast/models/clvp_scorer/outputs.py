"""The outputs of the scorer's classes. Fields that were not asked for are `None` and left out of the tuple form."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class CLVPTextModelOutput(ModelOutput):
    """Output of [`CLVPTextModelWithProjection`].

    Args:
        text_embeds: `[texts, projection_dim]`, the projection of the pooled states, not normalised.
        last_hidden_state: `[texts, length, hidden_size]`.
        hidden_states: input of the first layer and output of each, the last one normalised; each as
            `last_hidden_state`.
        attentions: attention weights of each layer, `[texts, heads, length, length]`.
    """

    text_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CLVPSpeechModelOutput(ModelOutput):
    """Output of [`CLVPSpeechModelWithProjection`].

    Args:
        speech_embeds: `[clips, projection_dim]`, the projection of the pooled states, not normalised.
        last_hidden_state, hidden_states, attentions: as in [`CLVPTextModelOutput`].
    """

    speech_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CLVPOutput(ModelOutput):
    """Output of [`CLVPModel`], the scorer. ([`ClvpOutput`] is that of the full CLVP.)

    Args:
        loss: contrastive loss, a scalar (with `return_loss=True`).
        logits_per_speech: `[clips, texts]`, scaled cosine similarities.
        logits_per_text: `[texts, clips]`, its transpose.
        text_embeds, speech_embeds: normalised embeddings, `[texts | clips, projection_dim]`.
        text_model_output, speech_model_output: outputs of [`CLVPTextModel`] and [`CLVPSpeechModel`].
    """

    loss: torch.Tensor | None = None
    logits_per_speech: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    speech_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    speech_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        """Return the fields that are not None; the outputs of the two models become tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())
