"""CLVP's decoder as an expert of torch would write it, without pages and without kernels of their own.

It has one product for query, key and value, torch's attention over keys in one piece, and a copy of the prompt's keys
and values for every candidate. The host reads nothing in a step and no tensor moves, so that a step can be captured.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


class TorchLayers:
    """The decoder's layers by torch's operators alone, over packed weights.

    Args:
        model: a `ClvpForCausalLM`, whose weights are shared but for those of query, key and value.
    """

    @torch.no_grad()
    def __init__(self, model):
        self.model, self.decoder = model, model.model.decoder
        attentions = [layer.attn for layer in self.decoder.layers]
        linears = [(attn.q_proj, attn.k_proj, attn.v_proj) for attn in attentions]
        self.qkv = [torch.cat([linear.weight for linear in three]) for three in linears]
        biased = linears[0][0].bias is not None
        self.qkv_bias = [torch.cat([linear.bias for linear in three]) if biased else None for three in linears]
        self.num_heads = model.config.num_attention_heads

    def embedded(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embed tokens `[n]` at places `[n]` or `[1]` of the position table as `[n, hidden_size]`."""
        decoder = self.decoder
        positioned = F.embedding(positions, decoder.position_embeds_layer.weight)
        return F.embedding(tokens, decoder.input_embeds_layer.weight) + positioned

    def __call__(self, hidden: torch.Tensor, attend: Callable) -> torch.Tensor:
        """Return `[n, hidden_size]` behind the last layer.

        attend: `layer, q, k, v -> attended`, all but the layer's number `[n, num_heads, head_dim]`.
        """
        for index, layer in enumerate(self.decoder.layers):
            projected = F.linear(layer.input_layernorm(hidden), self.qkv[index], self.qkv_bias[index])
            q, k, v = projected.unflatten(-1, (3, self.num_heads, -1)).unbind(1)
            hidden = hidden + layer.attn.out_proj(attend(index, q, k, v).flatten(1))
            widened = layer.mlp.c_fc(layer.post_attention_layernorm(hidden))
            hidden = hidden + layer.mlp.c_proj(F.gelu(widened, approximate="tanh"))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.model.final_norm(self.decoder.layer_norm(hidden)))


class TorchDecoder:
    """A decode step over existing keys. It computes logits and draws nothing.

    Args:
        model: as `TorchLayers` takes it.
        keys, values: `[num_layers, candidates, num_heads, tokens, head_dim]`, the last token's still to be written.
        position: of the token that is entered, in the position table.
    """

    def __init__(self, model, keys: torch.Tensor, values: torch.Tensor, position: int):
        self.layers, self.keys, self.values = TorchLayers(model), keys, values
        self.position = torch.tensor([position], device=keys.device)

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits `[candidates, vocab_size]` behind `tokens` `[candidates]`."""
        hidden = self.layers(self.layers.embedded(tokens, self.position), self._attend)
        return self.layers.logits(hidden)

    def _attend(self, index, q, k, v):
        keys, values = self.keys[index], self.values[index]
        keys[:, :, -1], values[:, :, -1] = k, v
        return F.scaled_dot_product_attention(q[:, :, None], keys, values)
