"""Building blocks of CLVP's encoders, decoder and conditioning encoder; each calls the operators of `clvp_fast.ops`."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from clvp_fast import ops
from clvp_fast.models.clvp.cache import GrowingLayer
from clvp_fast.models.common.parameters import (
    ArrangedLayer,
    apply_linear,
    pack_linears,
    project_heads,
)
from clvp_fast.models.common.plain import (
    activation_module,
    activation_name,
    drop_probability,
    is_plain,
    is_plain_linear,
)
from clvp_fast.models.transformers_versions import takes_cache


class ClvpRotaryPositionalEmbedding(nn.Module):
    """Rotary angles of the encoders (arXiv:2104.09864), for the first `max(projection_dim / (2 heads), 32)` channels.

    `inv_freq` is part of the checkpoints. It and the angles stay in float32 when the model is cast to a half type:
    bfloat16 cannot tell position 257 from 258.
    """

    def __init__(self, config):
        super().__init__()
        self.dim = max(config.projection_dim // (config.num_attention_heads * 2), 32)
        head_dim = config.hidden_size // config.num_attention_heads
        if self.dim > head_dim:
            raise ValueError(
                f"rotary embedding turns {self.dim} channels (at least 32) but a head has {head_dim}: "
                f"use fewer heads, a wider hidden_size ({config.hidden_size}), or use_rotary_embedding=False"
            )
        self.register_buffer("inv_freq", self.initial_inv_freq())

    def initial_inv_freq(self) -> torch.Tensor:
        return 1.0 / (10000 ** (torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim))

    def _apply(self, fn, recurse=True):
        precise = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype in (torch.float16, torch.bfloat16):
            self.inv_freq = precise.to(self.inv_freq.device)
        return self

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return angles `[1, length, dim]`, in float32 at least, for `hidden_states` `[batch, length, ...]`."""
        angles = self._angles(torch.arange(hidden_states.shape[1], device=hidden_states.device)[None])
        return torch.cat((angles, angles), -1)

    def cos_sin(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines `[..., length, 1, dim / 2]`, in float32 at least, of positions `[..., length]`.

        Both halves of the rotary channels turn by the same angles.
        """
        angles = self._angles(position_ids)[:, :, None]
        return angles.cos(), angles.sin()

    def _angles(self, position_ids: torch.Tensor) -> torch.Tensor:
        inv_freq = self.inv_freq.to(torch.promote_types(self.inv_freq.dtype, torch.float32))
        return position_ids[..., None].to(inv_freq.dtype) * inv_freq


def wants_whole_buffers(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Tell whether a decoding step should attend over a cache's whole buffers, with spare positions masked causally.

    Otherwise torch's CPU products in half types, which copy operands with gaps between the heads, copy all keys and
    values at every step.
    """
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[1] == 1
        and (mask is None or mask.dim() == 2)
    )


class ClvpSelfAttention(ArrangedLayer):
    """Multi-head self-attention: rotary in the encoders, causal in the decoder, plain in the conditioning encoder."""

    def __init__(self, config, layer_idx: int | None = None, causal: bool = False):
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        if self.head_dim * self.num_heads != self.embed_dim:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.embed_dim} and {self.num_heads}"
            )
        self.scale = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.layer_idx = layer_idx
        self.causal = causal
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=config.use_attention_bias)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=config.use_attention_bias)
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=config.use_attention_bias)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def arrange_parameters(self) -> None:
        """Put the weights of queries, keys and values one after another, if they may be moved."""
        pack_linears(self._projections)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys, values `[batch, length, heads, head_dim]`, views of one projection where possible."""
        query, key, value = project_heads(self._projections, hidden_states, self.num_heads)
        return query, key, value

    @property
    def _projections(self) -> list[nn.Module]:
        return [self.q_proj, self.k_proj, self.v_proj]

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        need_weights: bool = True,
        num_queries: int | None = None,
        candidates_per_prompt: int = 1,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over `hidden_states` `[batch, length, hidden_size]` and the content of the cache.

        Args:
            rotary_pos_emb: for the encoders, the angles `[1, positions, dim]` that `position_ids` select from; or the
                selected cosines and sines.
            attention_mask: True or 1 = attend: `[batch, keys]`; or `[batch, 1, queries, keys]`, boolean or additive,
                which then includes causality.
            position_ids: `[batch or 1, length]`, with angles.
            use_cache: has no effect.
            need_weights: also return the attention's weights.
            num_queries: compute only the first `num_queries` positions.
            candidates_per_prompt: how many rows of the cache each row of the batch fills.

        Returns:
            `[batch, queries, hidden_size]`, and the weights `[batch, heads, queries, keys]` with `need_weights`.
        """
        cos, sin = self._cos_sin(rotary_pos_emb, position_ids)
        query, key, value = self.project(hidden_states)
        query = query[:, :num_queries]
        query_offset = None
        if cache is not None:
            assert self.layer_idx is not None  # every layer of the decoder has an index
            new_key, new_value = (x.transpose(1, 2) for x in (key, value))
            if candidates_per_prompt > 1:
                cache.update(
                    new_key.repeat_interleave(candidates_per_prompt, 0),
                    new_value.repeat_interleave(candidates_per_prompt, 0),
                    self.layer_idx,
                )
            else:
                new_key, new_value = cache.update(new_key, new_value, self.layer_idx)
                kept = cache.layers[self.layer_idx]
                if isinstance(kept, GrowingLayer) and wants_whole_buffers(query, attention_mask):
                    query_offset = new_key.shape[2] - 1
                    new_key, new_value = kept.whole()
                    if attention_mask is not None:
                        attention_mask = F.pad(attention_mask, (0, new_key.shape[2] - query_offset - 1))
                key, value = new_key.transpose(1, 2), new_value.transpose(1, 2)

        operator = ops.rotary_attention_weights if need_weights else ops.rotary_attention
        found = operator(
            query,
            key,
            value,
            cos=cos,
            sin=sin,
            mask=attention_mask,
            causal=self.causal and (attention_mask is None or attention_mask.dim() == 2),
            query_offset=query_offset,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended, weights = found if isinstance(found, tuple) else (found, None)
        return apply_linear(self.out_proj, attended.flatten(-2)), weights

    @staticmethod
    def _cos_sin(rotary_pos_emb, position_ids) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not isinstance(rotary_pos_emb, torch.Tensor):
            return rotary_pos_emb or (None, None)
        if position_ids is None:
            raise ValueError("position_ids must be given with rotary_pos_emb, whose angles they pick")
        angles = rotary_pos_emb.squeeze(0)[position_ids]
        return angles.cos(), angles.sin()


class ClvpGatedLinearUnit(nn.Module):
    """`value * activation(gate)`, both halves from one projection (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.activation_fn = activation_module(config.hidden_act)
        self.proj = nn.Linear(config.hidden_size, config.intermediate_size * 2)
        self.proj.initializer_std = (2 * config.hidden_size) ** -0.5 * config.initializer_factor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return value * self.activation_fn(gate)


class ClvpEncoderMLP(nn.Module):
    """The gated feed-forward layer of the encoders."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.fc1 = ClvpGatedLinearUnit(config)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.fc2.initializer_std = (
            2 * config.hidden_size * config.num_hidden_layers
        ) ** -0.5 * config.initializer_factor
        self.dropout_layer = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Map `[..., hidden_size]` to the same shape; a `residual` is added and gives the result its dtype."""
        fc1, fc2 = self.fc1, self.fc2
        if (
            is_plain(fc1, ClvpGatedLinearUnit)
            and is_plain_linear(fc1.proj)
            and (activation := activation_name(fc1.activation_fn)) is not None
            and is_plain(self.dropout_layer, nn.Dropout)
            and is_plain_linear(fc2)
        ):
            proj = fc1.proj
            return ops.geglu_mlp(
                hidden_states,
                proj.weight,
                proj.bias,
                fc2.weight,
                fc2.bias,
                residual=residual,
                activation=activation,
                dropout_p=drop_probability(self.dropout_layer),
            )
        hidden_states = fc2(self.dropout_layer(fc1(hidden_states)))
        return hidden_states if residual is None else residual + hidden_states


class ClvpDecoderMLP(nn.Module):
    """The feed-forward layer of the decoder, with GPT-2's `Conv1D` weights."""

    def __init__(self, intermediate_size: int, config):
        super().__init__()
        self.config = config
        self.c_fc = Conv1D(intermediate_size, config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, intermediate_size)
        # As in GPT-2, residual projections start smaller in deeper models.
        self.c_proj.initializer_std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
        self.act = activation_module(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Map `[..., hidden_size]` to the same shape; a `residual` is added and gives the result its dtype."""
        c_fc, c_proj = self.c_fc, self.c_proj
        if (
            is_plain(c_fc, Conv1D)
            and (activation := activation_name(self.act)) is not None
            and is_plain(c_proj, Conv1D)
            and is_plain(self.dropout, nn.Dropout)
            and not drop_probability(self.dropout)
        ):
            return ops.gelu_mlp(
                hidden_states,
                c_fc.weight.t(),
                c_fc.bias,
                c_proj.weight.t(),
                c_proj.bias,
                residual=residual,
                activation=activation,
            )
        hidden_states = self.dropout(c_proj(self.act(c_fc(hidden_states))))
        return hidden_states if residual is None else residual + hidden_states


class ClvpSequenceSummary(nn.Module):
    """One vector for a sequence: its mean, its last or first position, or that of a class token."""

    def __init__(self, config):
        super().__init__()
        self.summary_type = getattr(config, "summary_type", "last")
        if self.summary_type not in ("last", "first", "mean", "cls_index"):
            raise NotImplementedError(
                f"summary_type must be 'last', 'first', 'mean' or 'cls_index', not {self.summary_type!r}"
            )
        self.pool_padding = getattr(config, "pool_padding", True)
        self.summary = nn.Identity()
        if getattr(config, "summary_use_proj", False):
            to_labels = getattr(config, "summary_proj_to_labels", False) and config.num_labels > 0
            self.summary = nn.Linear(config.hidden_size, config.num_labels if to_labels else config.hidden_size)
        activation = getattr(config, "summary_activation", None)
        self.activation = activation_module(activation) if activation else nn.Identity()
        first, last = (getattr(config, f"summary_{which}_dropout", 0.0) for which in ("first", "last"))
        self.first_dropout = nn.Dropout(first) if first > 0 else nn.Identity()
        self.last_dropout = nn.Dropout(last) if last > 0 else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        cls_index: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summarise `[batch, length, hidden_size]` as `[batch, hidden_size]`; `attention_mask` is `[batch, length]`."""
        mask = None if attention_mask is None or attention_mask.dim() != 2 or self.pool_padding else attention_mask
        if mask is not None and self.summary_type == "mean":
            weight = mask.to(hidden_states.dtype)[..., None]
            pooled = (hidden_states * weight).sum(1) / weight.sum(1).clamp(min=1)
        elif mask is not None and self.summary_type != "cls_index":
            places = torch.arange(hidden_states.shape[1], device=hidden_states.device) * mask.bool()
            first = mask.bool().int().argmax(1)
            pooled = self._gather(hidden_states, places.argmax(1) if self.summary_type == "last" else first)
        elif self.summary_type == "mean":
            pooled = hidden_states.mean(dim=1)
        elif self.summary_type == "first":
            pooled = hidden_states[:, 0]
        elif self.summary_type == "last" or cls_index is None:
            pooled = hidden_states[:, -1]
        else:
            pooled = self._gather(hidden_states, cls_index)
        return self.last_dropout(self.activation(self.summary(self.first_dropout(pooled))))

    @staticmethod
    def _gather(hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return hidden_states.take_along_dim(index.view(-1, 1, 1), dim=1).squeeze(1)
