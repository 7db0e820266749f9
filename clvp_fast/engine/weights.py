"""The weights of a decoder, in the layout that the engine's operators take."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn

from clvp_fast import ops
from clvp_fast.engine.products import Product, in_int8
from clvp_fast.models.clvp.causal_lm import ClvpForCausalLM
from clvp_fast.models.clvp.decoder import ClvpDecoderLayer
from clvp_fast.models.common.layers import is_plain_embedding
from clvp_fast.models.common.parameters import pack_linears, transpose_storage
from clvp_fast.models.common.plain import activation_name, changed_module, drop_probability
from clvp_fast.ops.panels import room

# The attributes of norms and activations that steps are bound with.
_SETTINGS = ("eps", "negative_slope", "alpha")


@dataclass(frozen=True)
class Norm:
    """A layer norm: `weight` `[hidden_size]`, and `bias` of the same shape or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Normalise `x` `[..., hidden_size]` as a bound step does, bit for bit, with a result of `dtype`."""
        return ops.add_norm(x, None, **vars(self), kind="layer", out_dtype=dtype, always=True)[1]


@dataclass(frozen=True)
class LayerWeights:
    """One layer of a decoder.

    projections: of queries, keys and values: one product, or three if their weights cannot lie one after another.
    activation: its name in `ops.ACTIVATIONS`; None if the operators do not know it: `act` is then called between the
        two products.
    """

    num_heads: int
    input_norm: Norm
    projections: tuple[Product, ...]
    out: Product
    post_norm: Norm
    mlp_in: Product
    mlp_out: Product
    activation: str | None
    act: nn.Module

    def project(self, hidden: torch.Tensor, always: bool = False) -> tuple[torch.Tensor, ...]:
        """Project `[tokens, hidden_size]` to queries, keys and values `[tokens, num_heads, head_dim]`.

        always: as for `ops.linear`, here and below.
        """
        heads = self.num_heads, hidden.shape[-1] // self.num_heads
        projected = [
            product(hidden, always=always).unflatten(-1, (-1, *heads)).unbind(-3) for product in self.projections
        ]
        return tuple(one for several in projected for one in several)

    def behind_attention(self, attended: torch.Tensor, residual: torch.Tensor, always: bool = False) -> torch.Tensor:
        """Compute the rest of a layer from `attended` and the residual, both `[tokens, hidden_size]`."""
        if attended.device.type == "cpu":  # there the product adds the residual, elsewhere the norm does
            residual = self.out(attended, residual, always=always)
            return self.feed_forward(self.post_norm(residual, attended.dtype), residual, always)
        affine = dict(**vars(self.post_norm), kind="layer")
        residual, normed = ops.add_norm(self.out(attended, always=always), residual, **affine)
        return self.feed_forward(normed, residual, always)

    def feed_forward(self, hidden: torch.Tensor, residual: torch.Tensor, always: bool = False) -> torch.Tensor:
        """Compute both products with the activation between them, and add the residual, whose dtype the result has."""
        if self.is_one_block:
            return ops.gelu_mlp(hidden, **self.block(), residual=residual)
        wide = self.mlp_in(hidden, activation=self.activation, always=always)
        return self.mlp_out(self.act(wide) if self.activation is None else wide, residual, always=always)

    @property
    def is_one_block(self) -> bool:
        """Tell whether `gelu_mlp` computes the feed-forward block; otherwise its two products are called one by one."""
        return self.activation is not None and self.mlp_in.panels is None

    def with_products(self, change: Callable[[Product], Product]) -> "LayerWeights":
        """Return the layer with each of its products changed."""
        names = ("out", "mlp_in", "mlp_out")
        changed = {name: change(getattr(self, name)) for name in names}
        return replace(self, projections=tuple(map(change, self.projections)), **changed)

    def block(self) -> dict:
        """Return the arguments of `gelu_mlp` for the layer."""
        first, second = self.mlp_in, self.mlp_out
        return dict(
            w_in=first.weight,
            b_in=first.bias,
            w_out=second.weight,
            b_out=second.bias,
            activation=self.activation,
            scale_in=first.scale,
            scale_out=second.scale,
        )


@dataclass(frozen=True)
class DecoderWeights:
    """Hold the shared parameters of a `ClvpForCausalLM` in the layout that operators read best.

    In-place changes are seen. If parameters move, this object keeps the old storage for as long as steps that read it
    may run; `sources` shows the move, and `take` reads the new parameters.
    """

    model: ClvpForCausalLM
    token_table: torch.Tensor
    position_table: torch.Tensor
    layers: tuple[LayerWeights, ...]
    last_norm: Norm
    final_norm: Norm
    head: Product

    @classmethod
    @torch.no_grad()
    def take(cls, model: ClvpForCausalLM) -> "DecoderWeights | str":
        """Take the weights of a `ClvpForCausalLM` in eval mode; return a reason if it computes more than they say."""
        if (reason := changed_module(model, model.kinds)) is not None:
            return f"{reason}, and the engine reads its parameters: take it off (merge adapters) first"
        stack = model.model.decoder
        tables = stack.input_embeds_layer, stack.position_embeds_layer
        if not all(map(is_plain_embedding, tables)) or tables[0].weight.dtype != tables[1].weight.dtype:
            return "an embedding does more than look rows up, or the two have other dtypes: the engine reads tables"
        layers = layers_of(model)
        if any(drop_probability(layer.mlp.dropout) for layer in layers):
            return "the model is in training mode, with dropout: call its eval()"
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        if any(norm.weight is None for norm in (*norms, stack.layer_norm, model.final_norm)):
            return "a layer norm has no weight, which the engine reads: give it one of ones"
        return cls(
            model,
            tables[0].weight.detach(),
            tables[1].weight.detach(),
            tuple(map(_layer, layers)),
            _norm(stack.layer_norm),
            _norm(model.final_norm),
            _product(model.lm_head.weight, model.lm_head.bias),
        )

    def in_int8(self) -> "DecoderWeights":
        """Return the weights with int8 copies of the layers' products, made now; later changes do not affect them."""
        return replace(self, layers=tuple(layer.with_products(in_int8) for layer in self.layers))

    def packed(self, int8_activations: bool = False) -> "DecoderWeights":
        """Return the weights with panels of all products, which are copies made now; `repack` renews them.

        Weights that no kernel reads from panels stay as they are.

        Args:
            int8_activations: products of the layers, whose weights are int8, round what they multiply to 8 bits.

        Raises:
            ValueError: no kernel computes such a product, with the reason.
        """
        dtype = self.head.weight.dtype
        within = room((product.weight for product in self.products()[:-1]), int8_activations)

        def change(product: Product) -> Product:
            return product.in_8_bits(dtype, within) if int8_activations else product.packed(dtype, within)

        layers = tuple(layer.with_products(change) for layer in self.layers)
        return replace(self, layers=layers, head=self.head.packed(dtype))

    def products(self) -> list[Product]:
        """Return all products, the head last."""
        layers = [(*layer.projections, layer.out, layer.mlp_in, layer.mlp_out) for layer in self.layers]
        return [*chain.from_iterable(layers), self.head]

    def repack(self) -> None:
        """Write all panels again from the weights as they are now."""
        for product in self.products():
            product.repack()

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the step reads, as the model has them now."""
        return list(self.model.parameters())

    def sources(self) -> tuple:
        """Return what a bound step depends on: addresses of parameters, and settings of norms and activations.

        This runs at each admission, so it walks through the modules without the names and sets of `parameters()`.
        """
        found: list = []
        waiting: list[nn.Module | None] = [self.model]
        while waiting:
            module = waiting.pop()
            if module is not None:
                found += [None if p is None else p.data_ptr() for p in module._parameters.values()]
                found += [vars(module).get(name) for name in _SETTINGS]
                waiting += module._modules.values()
        return tuple(found)


def layers_of(model: ClvpForCausalLM) -> list[ClvpDecoderLayer]:
    """Return the layers of a model; its modules must be this package's own."""
    layers = []
    for layer in model.model.decoder.layers:
        assert isinstance(layer, ClvpDecoderLayer)
        layers.append(layer)
    return layers


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(*_kept(norm.weight, norm.bias), norm.eps)


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    return Product(*_kept(weight, bias))


def _kept(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return tensors that keep the storage of parameters alive, even if a parameter gets another one."""
    return weight.detach(), None if bias is None else bias.detach()


def _layer(layer: ClvpDecoderLayer) -> LayerWeights:
    """Return one layer's weights; those that must lie elsewhere are moved."""
    attn, mlp = layer.attn, layer.mlp
    linears = [attn.q_proj, attn.k_proj, attn.v_proj]
    packed = pack_linears(linears)
    pairs = [(linear.weight, linear.bias) for linear in linears] if packed is None else [packed]
    for conv in (mlp.c_fc, mlp.c_proj):
        transpose_storage(conv)
    return LayerWeights(
        attn.num_heads,
        _norm(layer.input_layernorm),
        tuple(_product(*pair) for pair in pairs),
        _product(attn.out_proj.weight, attn.out_proj.bias),
        _norm(layer.post_attention_layernorm),
        _product(mlp.c_fc.weight.t(), mlp.c_fc.bias),
        _product(mlp.c_proj.weight.t(), mlp.c_proj.bias),
        activation_name(mlp.act),
        mlp.act,
    )
