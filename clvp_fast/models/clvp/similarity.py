"""The similarity of texts and speech, from their embeddings."""

from typing import TypedDict

import torch
import torch.nn.functional as F


class Similarity(TypedDict):
    """The fields of an output that compare texts with speech; see `similarity`."""

    logits_per_speech: torch.Tensor
    logits_per_text: torch.Tensor
    text_embeds: torch.Tensor
    speech_embeds: torch.Tensor


def normalized(embeds: torch.Tensor) -> torch.Tensor:
    """Scale each row of `embeds` `[..., projection_dim]` to length 1."""
    return embeds / embeds.norm(p=2, dim=-1, keepdim=True)


def similarity(text_embeds: torch.Tensor, speech_embeds: torch.Tensor, logit_scale: torch.Tensor) -> Similarity:
    """Return the fields of an output that compare texts with speech.

    Args:
        text_embeds: `[texts, projection_dim]`, not normalised.
        speech_embeds: `[clips, projection_dim]`, likewise.
        logit_scale: the logarithm of the scale, a scalar.

    Returns:
        Scaled cosines `logits_per_speech` `[clips, texts]` and `logits_per_text`, its transpose, and the normalised
        `text_embeds` and `speech_embeds`.
    """
    text_embeds, speech_embeds = normalized(text_embeds), normalized(speech_embeds)
    logits_per_text = text_embeds @ speech_embeds.t() * logit_scale.exp()
    return Similarity(
        logits_per_speech=logits_per_text.t(),
        logits_per_text=logits_per_text,
        text_embeds=text_embeds,
        speech_embeds=speech_embeds,
    )


def contrastive_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """Return the symmetric cross entropy of matching each text to its own speech and back, from square logits."""
    texts, candidates = logits_per_text.shape
    if texts != candidates:
        raise ValueError(
            f"return_loss=True pairs the i-th text with the i-th clip, got {texts} texts and {candidates} clips: "
            "give equally many"
        )
    pairs = torch.arange(texts, device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, pairs) + F.cross_entropy(logits_per_text.t(), pairs)) / 2
