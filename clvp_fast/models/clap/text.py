"""The text tower of CLAP: RoBERTa (arXiv:1907.11692), post-norm layers over absolute positions."""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from clvp_fast import ops
from clvp_fast.models.clap.configuration import ClapTextConfig
from clvp_fast.models.clap.layers import Intermediate, feed_forward, feed_forward_activation
from clvp_fast.models.common.layers import add_norm, attend
from clvp_fast.models.common.parameters import ArrangedLayer, apply_linear, pack_linears, project_heads
from clvp_fast.models.common.plain import is_plain


class ClapTextEmbeddings(nn.Module):
    """Sum of token, type and position embeddings, normalised. Positions count from `pad_token_id + 1`."""

    token_type_ids: torch.Tensor

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
        """Return the buffers of checkpoints, each `[1, max_position_embeddings]`."""
        places = torch.arange(self.max_positions)[None]
        return {"position_ids": places, "token_type_ids": torch.zeros_like(places)}

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed ids `[batch, length]`, or their embeddings, as `[batch, length, hidden_size]`."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None  # the model has checked that exactly one is given
        size = given.shape[:2]
        if position_ids is None:
            position_ids = self.positions(given)
            if not is_plain(self.position_embeddings, nn.Embedding):
                position_ids = position_ids.expand(size)  # hooks see the expanded positions
        if token_type_ids is None:
            token_type_ids = self.token_type_ids[:, :1]
            if not is_plain(self.token_type_embeddings, nn.Embedding):
                token_type_ids = token_type_ids.expand(size)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        embedded = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(add_norm(self.LayerNorm, embedded)[1])

    def positions(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the positions of ids `[batch, length]`, not counting padding, or of embeddings, counting all.

        Raises `ValueError` for a text with more tokens than there are positions, and for a configuration without a
        `pad_token_id`.
        """
        padding = self.padding_idx
        if padding is None:
            raise ValueError("positions count from pad_token_id + 1 on, and it is None: give position_ids")
        length, first = inputs.shape[1], padding + 1
        if inputs.ndim == 3:
            positions = torch.arange(first, first + length, device=inputs.device)[None]
        else:
            present = inputs.ne(padding).long()
            positions = present.cumsum(1) * present + padding
        if first + length > self.max_positions and int(positions.max()) >= self.max_positions:
            raise ValueError(
                f"a text of {int(positions.max()) - padding} tokens is too long: the model has positions for "
                f"{self.max_positions - first}; cut it with truncation=True, max_length={self.max_positions - first}"
            )
        return positions


class ClapTextSelfAttention(ArrangedLayer):
    """Multi-head attention over a padded batch of texts."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        if width % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {width} and {self.num_heads}")
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scale = (width // self.num_heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def arrange_parameters(self) -> None:
        """Put the weights of queries, keys and values one after another, if they may be moved."""
        pack_linears(self._projections)

    @property
    def _projections(self) -> list[nn.Module]:
        return [self.query, self.key, self.value]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over `[batch, length, hidden_size]`; return weights `[batch, heads, length, length]` if needed."""
        query, key, value = project_heads(self._projections, hidden_states, self.num_heads)
        dropout_p = self.attention_dropout if self.training else 0.0
        operator = ops.rotary_attention_weights if need_weights else ops.rotary_attention
        found = operator(query, key, value, mask=attention_mask, scale=self.scale, dropout_p=dropout_p)
        attended, weights = found if isinstance(found, tuple) else (found, None)
        return attended.flatten(-2), weights


class _Output(nn.Module):
    """The end of a block: a linear layer, the residual, their norm."""

    def __init__(self, config: ClapTextConfig, inner: int):
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """Project `[..., inner]` and add the residual `[..., hidden_size]`; the result has the residual's shape."""
        return self.add(apply_linear(self.dense, hidden_states), input_tensor)

    def add(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Do the same with the result of the linear layer."""
        return add_norm(self.LayerNorm, self.dropout(hidden_states), residual)[1]


class ClapTextSelfOutput(_Output):
    """The projection, residual and norm after the attention."""


class ClapTextIntermediate(Intermediate):
    """First half of the feed-forward layer."""


class ClapTextOutput(_Output):
    """The end of the feed-forward layer."""


class ClapTextAttention(nn.Module):
    """Attention, residual and norm."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        self.self = ClapTextSelfAttention(config)
        self.output = ClapTextSelfOutput(config, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attentions: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Attend over `[batch, length, hidden_size]`; attention weights are appended to `attentions`."""
        attended = attend(self.self, ClapTextSelfAttention, hidden_states, attentions, attention_mask=attention_mask)
        return self.output(attended, hidden_states)


class ClapTextLayer(nn.Module):
    """Post-norm layer: attention, feed-forward."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        self.attention = ClapTextAttention(config)
        self.intermediate = ClapTextIntermediate(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.output = ClapTextOutput(config, config.intermediate_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """Map `[batch, length, hidden_size]` to the same shape; `kwargs` are those of the attention."""
        hidden_states = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        halves = self.intermediate, ClapTextIntermediate, self.output, ClapTextOutput
        if (activation := feed_forward_activation(*halves)) is None:
            return self.output(self.intermediate(hidden_states), hidden_states)
        inner = feed_forward(self.intermediate, self.output.dense, hidden_states, activation)
        return self.output.add(inner, hidden_states)


class ClapTextEncoder(nn.Module):
    """The layers, one after another."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([ClapTextLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer_inputs: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Run all layers over `[batch, length, hidden_size]`; their inputs are appended to `layer_inputs`.

        `kwargs` are those of the layers.
        """
        for layer in self.layer:
            if layer_inputs is not None:
                layer_inputs.append(hidden_states)
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class ClapTextPooler(nn.Module):
    """Pool a text `[batch, length, hidden_size]` by its first position, through a linear layer and tanh."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Pool `[batch, length, hidden_size]` to `[batch, hidden_size]` by the first position."""
        return self.activation(apply_linear(self.dense, hidden_states[:, 0]))
