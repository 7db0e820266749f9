"""The text tower of CLAP: RoBERTa (arXiv:1907.11692), post-norm layers over absolute positions."""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from clvp_fast import ops
from clvp_fast.models.clap.configuration import ClapTextConfig
from clvp_fast.models.clap.layers import ClapIntermediate, feed_forward
from clvp_fast.models.clvp.layers import add_layer_norm
from clvp_fast.models.clvp.parameters import apply_linear, project_heads


class ClapTextEmbeddings(nn.Module):
    """Sum of token, type and position embeddings, normalised. Positions count from `pad_token_id + 1` on."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        self.padding_idx = config.pad_token_id
        self.max_positions = config.max_position_embeddings
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=self.padding_idx)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        for name, value in self.initial_buffers().items():
            self.register_buffer(name, value)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=self.padding_idx
        )

    def initial_buffers(self) -> dict[str, torch.Tensor]:
        """Part of the checkpoints; `[1, max_position_embeddings]`."""
        places = torch.arange(self.max_positions)[None]
        return {"position_ids": places, "token_type_ids": torch.zeros_like(places)}

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[batch, length]` ids, or `[batch, length, hidden_size]` embeddings → `[batch, length, hidden_size]`."""
        if position_ids is None:
            position_ids = self.positions(input_ids if inputs_embeds is None else inputs_embeds)
        if token_type_ids is None:
            token_type_ids = self.token_type_ids[:, :1]
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        embedded = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(add_layer_norm(self.LayerNorm, embedded)[1])

    def positions(self, inputs: torch.Tensor) -> torch.LongTensor:
        """The positions of ids `[batch, length]`, among which padding has none, or of embeddings, all places in turn.

        Raises `ValueError` for a text with more tokens than there are positions.
        """
        length, first = inputs.shape[1], self.padding_idx + 1
        if inputs.ndim == 3:
            positions = torch.arange(first, first + length, device=inputs.device)[None]
        else:
            present = inputs.ne(self.padding_idx).long()
            positions = present.cumsum(1) * present + self.padding_idx
        if first + length > self.max_positions and int(positions.max()) >= self.max_positions:
            raise ValueError(
                f"a text of {int(positions.max()) - self.padding_idx} tokens is too long: the model has positions for "
                f"{self.max_positions - first}; cut it with truncation=True, max_length={self.max_positions - first}"
            )
        return positions


class ClapTextSelfAttention(nn.Module):
    """Multi-head attention over a padded batch of texts."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        if width % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {width} and {self.num_heads}")
        self.scale = (width // self.num_heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[batch, length, hidden_size]` → the same, and the weights `[batch, heads, length, length]` if asked for."""
        query, key, value = project_heads([self.query, self.key, self.value], hidden_states, self.num_heads)
        options = dict(mask=mask, scale=self.scale, dropout_p=self.dropout.p if self.training else 0.0)
        if output_attentions:
            attended, weights = ops.rotary_attention_weights(query, key, value, **options)
        else:
            attended, weights = ops.rotary_attention(query, key, value, **options), None
        return attended.flatten(-2), weights


class ClapTextOutput(nn.Module):
    """The end of a block: a linear layer, the residual, their norm."""

    def __init__(self, config: ClapTextConfig, inner: int):
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`[..., inner]` and the residual `[..., hidden_size]` → `[..., hidden_size]`."""
        return self.add(apply_linear(self.dense, hidden_states), residual)

    def add(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same of what the linear layer gave already."""
        return add_layer_norm(self.LayerNorm, self.dropout(hidden_states), residual)[1]


class ClapTextAttention(nn.Module):
    """Attention, residual and norm."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        self.self = ClapTextSelfAttention(config)
        self.output = ClapTextOutput(config, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[batch, length, hidden_size]` → the same, and the attention weights if asked for."""
        attended, weights = self.self(hidden_states, mask, output_attentions)
        return self.output(attended, hidden_states), weights


class ClapTextLayer(nn.Module):
    """Post-norm layer: attention, feed-forward."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        self.attention = ClapTextAttention(config)
        self.intermediate = ClapIntermediate(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.output = ClapTextOutput(config, config.intermediate_size)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[batch, length, hidden_size]` → the same, and the attention weights if asked for."""
        hidden_states, weights = self.attention(hidden_states, mask, output_attentions)
        inner = feed_forward(self.intermediate, self.output.dense, hidden_states)
        return self.output.add(inner, hidden_states), weights


class ClapTextEncoder(nn.Module):
    """The layers, one after another."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([ClapTextLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """`[batch, length, hidden_size]` → the same; if asked for, the inputs of all layers too, and the weights."""
        all_hidden_states, all_attentions = [], []
        for layer in self.layer:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states, weights = layer(hidden_states, mask, output_attentions)
            all_attentions.append(weights)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class ClapTextPooler(nn.Module):
    """The first place of a text `[batch, length, hidden_size]`, through a linear layer and tanh: `[batch, …]`."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(apply_linear(self.dense, hidden_states[:, 0]))


def padding_mask(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """A mask `[batch, length]` as booleans; masks of four axes, boolean or additive, pass.

    Raises `ValueError` for any other shape.
    """
    if attention_mask is None or attention_mask.ndim == 4:
        return attention_mask
    if attention_mask.ndim != 2 or attention_mask.shape[1] != length:
        raise ValueError(f"attention_mask must be [batch, {length}] as the text, got {list(attention_mask.shape)}")
    return attention_mask.bool()
