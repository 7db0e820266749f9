"""The outputs of the CLVP classes. Fields that were not asked for are `None` and left out of the tuple form."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class ClvpEncoderOutput(ModelOutput):
    """Output of [`ClvpEncoder`].

    Args:
        embeds: `[batch, projection_dim]`, the projection of `pooler_output`.
        last_hidden_state: `[batch, length, hidden_size]`.
        pooler_output: `[batch, hidden_size]`.
        hidden_states: input of the first layer and output of each, the last one normalised; each as
            `last_hidden_state`.
        attentions: attention weights of each layer, `[batch, heads, length, length]`.
    """

    embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ClvpOutput(ModelOutput):
    """Output of [`ClvpModelForConditionalGeneration`].

    Args:
        loss: contrastive loss, a scalar (with `return_loss=True`).
        speech_ids: `[candidates, length]`, generated codes without the start token, stop tokens replaced as
            `fix_speech_decoder_output` does.
        logits_per_speech: `[candidates, texts]`, scaled cosine similarities.
        logits_per_text: `[texts, candidates]`, its transpose.
        text_embeds, speech_embeds: normalised embeddings, `[texts | candidates, projection_dim]`.
        text_model_output, speech_model_output: pooled outputs of the encoders.
        decoder_hidden_states, text_encoder_hidden_states, speech_encoder_hidden_states: hidden states, if asked for.
        sequences: `[candidates, 1 + generated]`, the decoder's output: the start token, codes, stop tokens.
        scores, logits, decoder_attentions: of each generation step, if asked for (`output_scores`, `output_logits`,
            `output_attentions`), in the form of `GenerationMixin`.
    """

    loss: torch.Tensor | None = None
    speech_ids: torch.Tensor | None = None
    logits_per_speech: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    speech_embeds: torch.Tensor | None = None
    text_model_output: torch.Tensor | None = None
    speech_model_output: torch.Tensor | None = None
    decoder_hidden_states: tuple | None = None
    text_encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    speech_encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    sequences: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple | None = None

    def candidate_scores(self) -> torch.Tensor:
        """Return each text's scores of its own candidates, `[texts, candidates of a text]`, from `logits_per_text`."""
        logits = self.logits_per_text
        assert logits is not None  # every forward of the whole model sets them
        texts, candidates = logits.shape
        if candidates % texts:
            raise ValueError(f"{candidates} candidates cannot be shared out among {texts} texts")
        own = logits.view(texts, texts, candidates // texts)
        return own.diagonal(dim1=0, dim2=1).t()
