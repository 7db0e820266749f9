"""The decoder of speech tokens, without a head."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from clvp_fast.models.clvp.configuration import ClvpDecoderConfig
from clvp_fast.models.clvp.layers import ClvpDecoderMLP, ClvpSelfAttention
from clvp_fast.models.clvp.pretrained import ClvpPreTrainedModel
from clvp_fast.models.common.layers import add_feed_forward, add_norm, attend, embed
from clvp_fast.models.common.masks import ALL_KEYS, boolean_mask
from clvp_fast.models.transformers_versions import CACHE, CheckpointsUnderGradients, takes_cache


class ClvpDecoderLayer(CheckpointsUnderGradients, GradientCheckpointingLayer):
    """Pre-norm GPT-2 layer."""

    def __init__(self, config: ClvpDecoderConfig, layer_idx: int | None = None):
        super().__init__()
        hidden_size = config.hidden_size
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_epsilon)
        self.attn = ClvpSelfAttention(config, layer_idx=layer_idx, causal=True)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = ClvpDecoderMLP(config.inner_size, config)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = False,
        attentions: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Map `[batch, length, hidden_size]` to the same shape; attention weights are appended to `attentions`.

        `kwargs` are the attention's.
        """
        attended = attend(
            self.attn,
            ClvpSelfAttention,
            add_norm(self.input_layernorm, hidden_states)[1],
            attentions,
            **{CACHE: cache},
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        residual, normed = add_norm(self.post_attention_layernorm, attended, hidden_states)
        return add_feed_forward(self.mlp, ClvpDecoderMLP, normed, residual)


class ClvpDecoder(ClvpPreTrainedModel):
    """Transformer decoder of `config.num_hidden_layers` [`ClvpDecoderLayer`]s."""

    config: ClvpDecoderConfig
    config_class = ClvpDecoderConfig

    def __init__(self, config: ClvpDecoderConfig):
        super().__init__(config)
        self.input_embeds_layer = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeds_layer = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList([ClvpDecoderLayer(config, layer_idx=i) for i in range(config.num_hidden_layers)])
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.input_embeds_layer

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.input_embeds_layer = value

    @can_return_tuple
    @takes_cache
    @merge_with_config_defaults  # gradient checkpointing switches off `use_cache`
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        embeds_have_positions: bool = False,
        candidates_per_prompt: int = 1,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode token ids `[batch, length]`, or their embeddings `[batch, length, hidden_size]`.

        Args:
            attention_mask: `[batch, past + length]`, 1 or True = a token, 0 = padding; attention is also causal. A mask
                of four axes `[batch, 1, length, past + length]`, boolean or additive, is used alone.
            token_type_ids: `[batch, length]`, tokens whose embeddings are added.
            position_ids: `[batch or 1, length]`; by default those after the cache.
            embeds_have_positions: `inputs_embeds` already include position embeddings (the conditioning encoder's do).
            candidates_per_prompt: `inputs_embeds` has groups of this many equal rows; each group is computed once and
                fills as many rows of an empty cache.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions`, or a tuple with `return_dict=False`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        output_attentions = self.option("output_attentions", output_attentions)
        output_hidden_states = self.option("output_hidden_states", output_hidden_states)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        length = given.shape[1]
        past_length = cache.get_seq_length() if cache is not None else 0
        positions = position_ids
        if positions is None:
            positions = (torch.arange(length, device=given.device) + past_length)[None]
        if inputs_embeds is None:
            hidden_states = embed(self.input_embeds_layer, given, self.position_embeds_layer, positions)
        elif embeds_have_positions:
            hidden_states = inputs_embeds
        else:
            hidden_states = inputs_embeds + self.position_embeds_layer(positions)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.input_embeds_layer(token_type_ids.view(-1, length))
        mask = boolean_mask(attention_mask, past_length + length, ALL_KEYS)
        if candidates_per_prompt > 1:
            hidden_states = hidden_states[::candidates_per_prompt]
            mask = None if mask is None else mask[::candidates_per_prompt]
        hidden_states = self.drop(hidden_states)

        all_hidden_states, all_attentions = [], []
        # Arguments that transformers' layers do not take are passed only if they are needed.
        asked: dict[str, list | int] = {"attentions": all_attentions} if output_attentions else {}
        if candidates_per_prompt > 1:
            asked["candidates_per_prompt"] = candidates_per_prompt
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states = layer(
                hidden_states,
                **{CACHE: cache},
                attention_mask=mask,
                position_ids=positions,
                use_cache=use_cache,
                **asked,
            )
        _, hidden_states = add_norm(self.layer_norm, hidden_states)
        if candidates_per_prompt > 1:
            hidden_states = hidden_states.repeat_interleave(candidates_per_prompt, 0)

        kept: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            **kept,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class ClvpModel(ClvpPreTrainedModel):
    """The bare decoder without a head. (Not to be confused with `CLVPModel`, the scorer of the first API.)"""

    config: ClvpDecoderConfig
    config_class = ClvpDecoderConfig

    def __init__(self, config: ClvpDecoderConfig):
        super().__init__(config)
        self.decoder = ClvpDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.decoder.input_embeds_layer

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.decoder.input_embeds_layer = value

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode as [`ClvpDecoder.forward`] does."""
        return self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            **{CACHE: cache},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
