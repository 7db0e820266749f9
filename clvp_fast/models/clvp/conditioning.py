"""Turns a text and a voice clip into the embeddings that the decoder continues."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from clvp_fast.models.clvp.configuration import ClvpConfig
from clvp_fast.models.clvp.layers import ClvpSelfAttention
from clvp_fast.models.clvp.tokens import PaddedText, insert_eos_at_first_pad, most_text, text_begin, text_end
from clvp_fast.models.common.convolution import Conv1d
from clvp_fast.models.common.plain import is_plain


class ClvpConditioningEncoder(nn.Module):
    """Embed a text and summarise a voice clip; the result is the decoder's prompt.

    The log-mel features of a clip become one vector (attention over the frames; the first frame's output is kept). Text
    tokens become token plus position embeddings, which follow the vector.
    """

    def __init__(self, config: ClvpConfig):
        super().__init__()
        self.text_config = config.text_config
        self.decoder_config = config.decoder_config
        width = self.decoder_config.hidden_size
        self.text_token_embedding = nn.Embedding(self.text_config.vocab_size, width)
        self.text_position_embedding = nn.Embedding(self.decoder_config.max_text_tokens, width)
        self.mel_conv = Conv1d(self.decoder_config.feature_size, width, kernel_size=1)
        self.mel_conv.initializer_std = config.initializer_factor
        num_groups = self.compute_groupnorm_groups(width)
        num_blocks = self.decoder_config.num_mel_attn_blocks
        self.group_norms = nn.ModuleList([nn.GroupNorm(num_groups, width, eps=1e-5) for _ in range(num_blocks)])
        self.mel_attn_blocks = nn.ModuleList([ClvpSelfAttention(self.decoder_config) for _ in range(num_blocks)])
        self.gradient_checkpointing = False

    def compute_groupnorm_groups(self, channels: int, groups: int = 32) -> int:
        """Count the groups of the norms: 8 up to 16 channels, 16 up to 64, else 32, halved until they divide them."""
        if channels <= 64:
            groups = 8 if channels <= 16 else 16
        while channels % groups != 0:
            groups //= 2
        if groups <= 2:
            raise ValueError(
                f"the group norms need more than 2 groups, but a hidden_size of {channels} splits into {groups}: "
                "use a hidden_size that is a multiple of 4"
            )
        return groups

    def encode_voice(self, input_features: torch.Tensor) -> torch.Tensor:
        """Encode log-mel features `[clips, feature_size, frames]` as one vector per clip, `[clips, hidden_size]`."""
        bins = self.decoder_config.feature_size
        if input_features.dim() != 3 or input_features.shape[1] != bins or not input_features.shape[2]:
            raise ValueError(f"input_features must be [clips, {bins}, frames], got {list(input_features.shape)}")
        recompute = self.gradient_checkpointing and self.training

        def block(index: int, frames: torch.Tensor) -> torch.Tensor:
            normed = self.group_norms[index](frames).transpose(1, 2)
            attention = self.mel_attn_blocks[index]
            if not is_plain(attention, ClvpSelfAttention) or not is_plain(attention.out_proj, nn.Linear):
                return (attention(normed)[0] + frames.transpose(1, 2)).transpose(1, 2)
            # Only the first frame is used after the last block, so only it has to attend there.
            num_queries = 1 if index == len(self.mel_attn_blocks) - 1 else None
            attended, _ = attention(normed, num_queries=num_queries, need_weights=False)
            return frames[..., :num_queries] + attended.transpose(1, 2)

        frames = self.mel_conv(input_features)
        for index in range(len(self.mel_attn_blocks)):
            frames = checkpoint(block, index, frames, use_reentrant=False) if recompute else block(index, frames)
        return frames[..., 0]

    def _surround(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        num_ends: int | None,
    ) -> PaddedText:
        """Put the text between its begin token and `num_ends` end tokens, at the ends that the mask shows.

        `None`: one end token, placed by transformers' rule, which looks for token 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        by_mask, num_ends = num_ends is not None, 1 if num_ends is None else num_ends
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        limit = most_text(self.decoder_config, num_ends)
        if not 0 < tokens.shape[1] <= limit:
            raise ValueError(
                f"the text must have 1 to {limit} tokens for this checkpoint, it has {tokens.shape[1]}: "
                "split a long text into sentences"
            )
        if attention_mask is not None and attention_mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"attention_mask must be {list(tokens.shape[:2])} as the text is, got {list(attention_mask.shape)}"
            )
        bos, eos = text_begin(self.text_config), text_end(self.text_config)
        text = PaddedText(tokens, attention_mask)
        if inputs_embeds is None and not by_mask:
            ids = insert_eos_at_first_pad(F.pad(tokens, (1, 0), value=bos), 0, eos)
            return PaddedText(ids, F.pad(text.mask, (2, 0), value=1))
        if inputs_embeds is not None:
            bos, eos = self.text_token_embedding(torch.tensor([bos, eos], device=tokens.device))
        text = text.surround(bos, None)
        for _ in range(num_ends):
            text = text.surround(None, eos)
        return text

    def _embed_text(self, text: PaddedText) -> torch.Tensor:
        """Add token and position embeddings: `[texts, length, hidden_size]`."""
        embeds = self.text_token_embedding(text.tokens) if text.tokens.dim() == 2 else text.tokens
        # Padding on the left lies before position 0, and may take any row of the table.
        positions = (text.mask.cumsum(-1) - 1).clamp(min=0)
        return embeds + self.text_position_embedding(positions)

    def forward(
        self,
        input_features: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_ends: int | None = None,
    ) -> torch.Tensor:
        """Make the decoder's prompt `[batch, 1 + text, hidden_size]`: one voice vector, then the text's embeddings.

        Args:
            input_features: `[clips, feature_size, frames]`.
            input_ids: `[texts, length]`; or `inputs_embeds` `[texts, length, hidden_size]`, embedded without positions.
            attention_mask: `[texts, length]`, 1 = a token, 0 = padding.
            num_ends: how many end tokens follow each text, at the end that the mask shows; None: one, where
                transformers puts it.

        One text may have any number of clips, and one clip any number of texts; otherwise their numbers must be equal.
        """
        text = self._surround(input_ids, inputs_embeds, attention_mask, num_ends)
        return self.join(self.encode_voice(input_features), self._embed_text(text))

    def prompt(
        self,
        input_features: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_ends: int = 2,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the prompt from which Tortoise generates, and the mask `[batch, 1 + text]` of its padding.

        Unlike in `forward`, there are `num_ends` end tokens, and the begin and end tokens are put directly around a
        padded text, on whichever side its padding is.
        """
        self._check_mask(attention_mask)
        mask = self._surround(input_ids, inputs_embeds, attention_mask, num_ends).mask
        if not input_features.isfinite().all():
            raise ValueError("input_features hold NaN or infinite values: is the recording damaged?")
        embeds = self(  # called as a module, as transformers does, so that hooks run
            input_features=input_features,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            num_ends=num_ends,
        )
        return embeds, self._prompt_mask(embeds, mask)

    def prompt_text(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_ends: int = 2,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the text's part of `prompt`: embeddings `[texts, text, hidden_size]` and mask `[texts, text]`."""
        self._check_mask(attention_mask)
        text = self._surround(input_ids, inputs_embeds, attention_mask, num_ends)
        return self._embed_text(text), text.mask

    @staticmethod
    def _check_mask(attention_mask: torch.Tensor | None) -> None:
        if attention_mask is not None and not attention_mask.bool().any(1).all():
            raise ValueError("attention_mask hides every token of a text: each text must keep at least one")

    @staticmethod
    def _prompt_mask(embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Make the mask of prompts `embeds` from the mask of their texts, with one more position for the voice."""
        return F.pad(mask, (1, 0), value=1).expand(embeds.shape[0], -1)

    def join_prompt(
        self, voices: torch.Tensor, text_embeds: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make `prompt` from encoded voices `[clips, hidden_size]` and the results of `prompt_text`."""
        embeds = self.join(voices, text_embeds)
        return embeds, self._prompt_mask(embeds, mask)

    @staticmethod
    def join(voices: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Put voice vectors `[clips, hidden]` before text embeddings `[texts, length, hidden]`."""
        clips, texts = voices.shape[0], text_embeds.shape[0]
        if clips != texts and 1 not in (clips, texts):
            raise ValueError(
                f"The number of texts and number of audios must be same, or one of them 1. "
                f"Found {texts} texts vs {clips} audios"
            )
        batch = max(clips, texts)
        voices = voices[:, None].expand(batch, -1, -1)
        return torch.cat([voices, text_embeds.expand(batch, -1, -1)], dim=1)
