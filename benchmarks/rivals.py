"""What somebody who knows torch would write for one decode step, without pages and without kernels of their own."""

import torch
import torch.nn.functional as F


class TorchDecoder:
    """A decode step by torch's operators alone: one product for query, key and value, SDPA over keys in one piece.

    Every candidate has the prompt's keys and values for itself. Nothing in a step is read on the host and nothing
    changes its place, so that it can be captured. It gives logits and draws nothing.

    Args:
        model: a `ClvpForCausalLM`, whose weights are shared but for those of query, key and value.
        keys, values: `[num_layers, candidates, num_heads, tokens, head_dim]`, the last token's still to be written.
        position: of the token that is entered, in the position table.
    """

    @torch.no_grad()
    def __init__(self, model, keys: torch.Tensor, values: torch.Tensor, position: int):
        self.model, self.keys, self.values = model, keys, values
        attentions = [layer.attn for layer in model.model.decoder.layers]
        linears = [(attn.q_proj, attn.k_proj, attn.v_proj) for attn in attentions]
        self.qkv = [torch.cat([linear.weight for linear in three]) for three in linears]
        biased = linears[0][0].bias is not None
        self.qkv_bias = [torch.cat([linear.bias for linear in three]) if biased else None for three in linears]
        self.position = model.model.decoder.position_embeds_layer.weight[position]

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[candidates, vocab_size]` behind `tokens` `[candidates]`."""
        decoder = self.model.model.decoder
        hidden = F.embedding(tokens, decoder.input_embeds_layer.weight) + self.position
        heads = self.keys.shape[2]
        for index, layer in enumerate(decoder.layers):
            normed = layer.input_layernorm(hidden)
            projected = F.linear(normed, self.qkv[index], self.qkv_bias[index])
            q, k, v = projected.view(len(tokens), 3, heads, -1).unbind(1)
            keys, values = self.keys[index], self.values[index]
            keys[:, :, -1], values[:, :, -1] = k, v
            attended = F.scaled_dot_product_attention(q[:, :, None], keys, values)
            hidden = hidden + layer.attn.out_proj(attended.flatten(1))
            widened = layer.mlp.c_fc(layer.post_attention_layernorm(hidden))
            hidden = hidden + layer.mlp.c_proj(F.gelu(widened, approximate="tanh"))
        return self.model.lm_head(self.model.final_norm(decoder.layer_norm(hidden)))
