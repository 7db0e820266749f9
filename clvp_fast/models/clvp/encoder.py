"""The encoder of text or of speech tokens into their shared space."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from clvp_fast import ops
from clvp_fast.models.clvp.configuration import ClvpEncoderConfig
from clvp_fast.models.clvp.layers import (
    ClvpEncoderMLP,
    ClvpRotaryPositionalEmbedding,
    ClvpSelfAttention,
    ClvpSequenceSummary,
)
from clvp_fast.models.clvp.outputs import ClvpEncoderOutput
from clvp_fast.models.clvp.pretrained import ClvpPreTrainedModel
from clvp_fast.models.common.layers import ClvpRMSNorm, add_feed_forward, add_norm, attend
from clvp_fast.models.common.masks import ALL_KEYS, boolean_mask
from clvp_fast.models.common.parameters import apply_linear
from clvp_fast.models.common.plain import changed_module, is_plain


class ClvpEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer: rotary attention, gated feed-forward."""

    def __init__(self, config: ClvpEncoderConfig):
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.self_attn = ClvpSelfAttention(config)
        self.mlp = ClvpEncoderMLP(config)
        self.input_rmsnorm = ClvpRMSNorm(self.embed_dim, eps=config.layer_norm_eps)
        self.post_attention_rmsnorm = ClvpRMSNorm(self.embed_dim, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        attentions: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Map `[batch, length, hidden_size]` to the same shape; attention weights are appended to `attentions`.

        `rotary_pos_emb` and `position_ids` are as [`ClvpSelfAttention`] takes them.
        """
        attended = attend(
            self.self_attn,
            ClvpSelfAttention,
            self.input_rmsnorm(hidden_states),
            attentions,
            rotary_pos_emb=rotary_pos_emb,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        residual, normed = add_norm(self.post_attention_rmsnorm, attended, hidden_states)
        return add_feed_forward(self.mlp, ClvpEncoderMLP, normed, residual)

    def packed(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> torch.Tensor:
        """Map `[tokens, hidden_size]` of joined sequences to the same shape; see [`ClvpEncoder.embed_packed`]."""
        attention = self.self_attn
        cos, sin = rotary if rotary is not None else (None, None)
        attended = ops.rotary_attention(
            *attention.project(self.input_rmsnorm(hidden_states)),
            cos=cos,
            sin=sin,
            scale=attention.scale,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        attended = apply_linear(attention.out_proj, attended.flatten(-2))
        residual, normed = add_norm(self.post_attention_rmsnorm, attended, hidden_states)
        return self.mlp(normed, residual)


class ClvpEncoder(ClvpPreTrainedModel):
    """Transformer encoder of `config.num_hidden_layers` [`ClvpEncoderLayer`]s, with pooling and projection.

    `from_pretrained` also takes a composite CLVP checkpoint; `config_type="speech_config"` then picks the speech
    encoder.

    Args:
        with_projection: `False` leaves out the projection, and so `embeds`.
    """

    config: ClvpEncoderConfig
    config_class = ClvpEncoderConfig

    def __init__(self, config: ClvpEncoderConfig, with_projection: bool = True):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_pos_emb = ClvpRotaryPositionalEmbedding(config) if config.use_rotary_embedding else None
        self.layers = nn.ModuleList([ClvpEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.sequence_summary = ClvpSequenceSummary(config)
        self.pool_padding = self.sequence_summary.pool_padding
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = None
        if with_projection:
            self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
            self.projection.initializer_std = config.initializer_factor * config.hidden_size**-0.5
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding by `value`."""
        self.token_embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ClvpEncoderOutput:
        """Encode token ids `[batch, length]`, or their embeddings `[batch, length, hidden_size]`.

        Args:
            attention_mask: `[batch, length]`, 1 or True = a token, 0 = padding.
            position_ids: `[batch or 1, length]`, the rotary positions; 0, 1, ... by default.

        Returns:
            [`ClvpEncoderOutput`], or a tuple with `return_dict=False`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        output_attentions = self.option("output_attentions", output_attentions)
        output_hidden_states = self.option("output_hidden_states", output_hidden_states)

        hidden_states = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        positions = position_ids
        if positions is None:
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        rotary = None
        if self.rotary_pos_emb is not None:
            rotary = self.rotary_pos_emb.cos_sin(positions) if self._turns() else self.rotary_pos_emb(hidden_states)
        mask = boolean_mask(attention_mask, hidden_states.shape[1], ALL_KEYS)

        all_hidden_states, all_attentions = [], []
        asked = {"attentions": all_attentions} if output_attentions else {}
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states = layer(hidden_states, rotary, mask, positions, **asked)
        _, last_hidden_state = add_norm(self.final_layer_norm, hidden_states)
        masked = {} if self.pool_padding else {"attention_mask": mask}
        pooled = self.sequence_summary(last_hidden_state, **masked)

        return ClvpEncoderOutput(
            embeds=None if self.projection is None else self.projection(pooled),
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            hidden_states=(*all_hidden_states, last_hidden_state) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def _turns(self) -> bool:
        """Tell whether modules may get cosines and sines instead of angles."""
        return is_plain(self.rotary_pos_emb, ClvpRotaryPositionalEmbedding) and all(
            is_plain(layer, ClvpEncoderLayer) and is_plain(layer.self_attn, ClvpSelfAttention) for layer in self.layers
        )

    def embed_packed(self, input_ids: torch.LongTensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        """Embed sequences of any lengths without padding, each as `forward` embeds it alone.

        This is for inference, without dropout and gradient checkpointing. If a module of the encoder is not plain, each
        sequence goes through `forward`.

        Args:
            input_ids: `[tokens]`, the sequences one after another.
            cu_seqlens: `[sequences + 1]` int32, the start of each sequence and the end of the last; none is empty.
            max_seqlen: the length of the longest sequence.

        Returns:
            `[sequences, projection_dim]`.

        Raises:
            ValueError: the encoder has no projection.
        """
        if self.projection is None:
            raise ValueError("embed_packed() returns projections, and this encoder has none: make it with_projection")
        if changed_module(self, self.kinds) is not None:
            rows = input_ids.split(cu_seqlens.diff().tolist())
            return torch.cat([self(input_ids=row[None]).embeds for row in rows])
        hidden_states = self.token_embedding(input_ids)
        rotary = None
        if self.rotary_pos_emb is not None:
            rotary = self.rotary_pos_emb.cos_sin(torch.arange(max_seqlen, device=input_ids.device)[None])
        for layer in self.layers:
            assert isinstance(layer, ClvpEncoderLayer)  # the modules were checked above
            hidden_states = layer.packed(hidden_states, rotary, cu_seqlens, max_seqlen)
        _, last_hidden_state = add_norm(self.final_layer_norm, hidden_states)
        # Each sequence has one position left, which every kind of summary returns unchanged.
        pooled = self._pool_packed(last_hidden_state, cu_seqlens)
        return self.projection(self.sequence_summary(pooled[:, None]))

    def _pool_packed(self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Pool `[tokens, hidden_size]` to `[sequences, hidden_size]`, as `sequence_summary` pools one sequence."""
        kind = self.sequence_summary.summary_type
        if kind == "first":
            return hidden_states[cu_seqlens[:-1]]
        if kind != "mean":  # "last", and "cls_index" without an index
            return hidden_states[cu_seqlens[1:] - 1]
        # In float32, as a mean over one axis accumulates; `unsafe` skips checks that would wait for the device.
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mean = torch.segment_reduce(wide, "mean", lengths=cu_seqlens.diff().long(), axis=0, unsafe=True)
        return mean.to(hidden_states.dtype)
