"""CLVP's decode step and its pass over a prompt as graphs of ONNX, exported from the layers of `torch_decoder.py`.

Stored keys and values are inputs of the step, and are attended to where they lie: a graph that appends to them copies
all of them at every step.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.rivals.decoder_process import built
from benchmarks.rivals.torch_decoder import TorchLayers

FILE = "decoder.onnx"
_AS_DYNAMO = dict(dynamo=True, external_data=True, verbose=False)


class _Step(torch.nn.Module):
    """The graph: a token's embedding, and stored keys and values, to logits and the token's own keys and values."""

    def __init__(self, layers: TorchLayers):
        super().__init__()
        self.model, self.layers = layers.model, layers

    def forward(self, hidden, keys, values):
        new: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attend(index, q, k, v):
            new.append((k, v))
            q = q[:, :, None] * q.shape[-1] ** -0.5
            k, v = k[:, :, None], v[:, :, None]
            stored, own = q @ keys[index].transpose(-1, -2), (q * k).sum(-1, keepdim=True)
            weights = torch.cat((stored, own), -1).softmax(-1)
            return (weights[..., :-1] @ values[index] + weights[..., -1:] * v)[:, :, 0]

        hidden = self.layers(hidden, attend)
        return self.layers.logits(hidden), [k for k, _ in new], [v for _, v in new]


class _Prompt(torch.nn.Module):
    """The graph: embeddings of a prompt and a token, to logits behind it and keys and values of all of them."""

    def __init__(self, layers: TorchLayers):
        super().__init__()
        self.model, self.layers = layers.model, layers

    def forward(self, hidden):
        stored: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attend(index, q, k, v):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            stored.append((k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

        hidden = self.layers(hidden, attend)
        return self.layers.logits(hidden[-1:]), [k for k, _ in stored], [v for _, v in stored]


def exported(layers: TorchLayers) -> Path:
    """Return the file of the step's graph in float32, which is made where it is missing."""
    return built("onnx-float32", layers, lambda folder: _export(layers, folder)) / FILE


def exported_prompt(layers: TorchLayers) -> Path:
    """Return the file of the prompt's graph in float32, which is made where it is missing."""
    return built("onnx-prompt-float32", layers, lambda folder: _export_prompt(layers, folder)) / FILE


@torch.no_grad()
def _export_prompt(layers: TorchLayers, folder: Path) -> None:
    config = layers.model.config
    numbers = range(config.num_hidden_layers)
    torch.onnx.export(
        _Prompt(layers).eval(),
        (torch.zeros(7, config.hidden_size),),
        folder / FILE,
        input_names=["hidden"],
        output_names=["logits", *(f"{kind} {n}" for kind in ("keys", "values") for n in numbers)],
        dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},),
        **_AS_DYNAMO,
    )


@torch.no_grad()
def _export(layers: TorchLayers, folder: Path) -> None:
    config = layers.model.config
    heads, width, count = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    # Of other objects than the keys: the exporter takes two arguments that are one tensor for one input.
    keys, values = ([torch.zeros(3, heads, 5, width // heads) for _ in range(count)] for _ in range(2))
    rows, tokens = torch.export.Dim("rows", min=1), torch.export.Dim("tokens", min=1)
    shape = [{0: rows, 2: tokens}] * count
    numbers = range(count)
    torch.onnx.export(
        _Step(layers).eval(),
        (torch.zeros(3, width), keys, values),
        folder / FILE,
        input_names=["hidden", *(f"{kind} {n}" for kind in ("keys", "values") for n in numbers)],
        output_names=["logits", *(f"new {kind} {n}" for kind in ("keys", "values") for n in numbers)],
        dynamic_shapes=({0: rows}, shape, shape),
        **_AS_DYNAMO,
    )
