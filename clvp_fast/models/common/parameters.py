"""The storage of parameters: it is arranged when they change, and only read when they are used.

Parameters are those of the checkpoints (`q_proj`, `k_proj` and so on), in the storage that the operators want: query,
key and value weights of a layer lie in one block, and `Conv1D` weights, which checkpoints keep as `[in, out]`, become
transposed views of `[out, in]` storage before candidates are drawn. There is no second copy, so changes in place are
seen.

An [`ArrangedLayer`] arranges its parameters when it is loaded, moved, cast, copied or gets another module; models do so
at the end of construction. After a change that no module notices (`linear.weight = ...`, `weight.data = ...`), layers
are computed one by one until `arrange_parameters`, or an engine of the model, arranges the parameters again.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clvp_fast import ops
from clvp_fast.models.common.plain import is_plain


def apply_linear(linear: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `linear(hidden_states)`, `[..., in]` → `[..., out]`, through the operator if that gives the same.

    A residual is added, and the result has its dtype.
    """
    if is_plain(linear, nn.Linear):
        return ops.linear(hidden_states, linear.weight, linear.bias, residual=residual)
    out = linear(hidden_states)
    return out if residual is None else residual + out


def project_heads(linears: list[nn.Module], hidden_states: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
    """Project to `[..., heads, head_dim]` by each linear layer, with views of one projection where possible."""
    packed = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else packed_linears(linears)
    if packed is None:
        return tuple(linear(hidden_states).unflatten(-1, (num_heads, -1)) for linear in linears)
    return ops.linear(hidden_states, *packed).unflatten(-1, (len(linears), num_heads, -1)).unbind(-3)


def packed_linears(linears: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return one `[sum of out, in]` weight and bias of linear layers with the same input, as views of their parameters.

    Returns None if the parameters do not lie one after another, or a layer is not plain. Nothing is moved.
    """
    plain = [linear for linear in linears if is_plain(linear, nn.Linear)]
    if len(plain) < len(linears) or (weight := _joined([linear.weight for linear in plain])) is None:
        return None
    biases: list[torch.Tensor | None] = [linear.bias for linear in plain]
    if biases[0] is None:
        return (weight, None) if biases.count(None) == len(biases) else None
    bias = _joined(biases)
    return None if bias is None else (weight, bias)


def _joined(parameters: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return one view of parameters that lie one after another; None for others."""
    first = parameters[0]
    if type(first) is not nn.Parameter:  # `functional_call` puts in tensors that may have no address
        return None
    begin = end = first.data_ptr()
    dtype, strides, rows = first.dtype, first.stride(), 0
    for parameter in parameters:
        if (
            type(parameter) is not nn.Parameter
            or parameter.data_ptr() != end
            or parameter.dtype != dtype
            or parameter.stride() != strides
            or not parameter.is_contiguous()
        ):
            return None
        end += parameter.nbytes
        rows += len(parameter)
    # Parameters of different storages may be neighbours by chance.
    storage = first.untyped_storage()
    if end - storage.data_ptr() > storage.nbytes() or begin == end:
        return None
    return first.as_strided((rows, *first.shape[1:]), strides)


class ArrangedLayer(nn.Module):
    """A layer that keeps its modules' parameters in the operators' storage, through every change that it notices.

    A subclass defines their order in `arrange_parameters`. That is called after the layer was moved or cast (`_apply`),
    loaded, copied or unpickled, or one of its modules was replaced; `forward` never calls it.
    """

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_post_hook(_arrange_loaded)

    def arrange_parameters(self) -> None:
        """Move parameters into their storage, if they lie elsewhere and may be moved."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.arrange_parameters()
        return self

    def __setattr__(self, name, value):
        replaces = isinstance(value, nn.Module) and name in self._modules
        super().__setattr__(name, value)
        if replaces:
            self.arrange_parameters()

    def __setstate__(self, state):
        super().__setstate__(state)
        self.arrange_parameters()


def _arrange_loaded(layer: ArrangedLayer, incompatible_keys) -> None:
    layer.arrange_parameters()


def arrange_parameters(model: nn.Module) -> None:
    """Move the parameters of all layers of `model` into their storage."""
    for module in model.modules():
        if isinstance(module, ArrangedLayer):
            module.arrange_parameters()


def arrange_for_decoding(model: nn.Module) -> None:
    """Move all parameters of `model`, `Conv1D` weights too, into the storage that a decode step reads fastest.

    `Conv1D` weights keep the checkpoint's layout until candidates are drawn, because some torch functions on a module's
    weights (such as pruning) view them as one row of numbers.
    """
    arrange_parameters(model)
    for module in model.modules():
        if is_plain(module, Conv1D):
            transpose_storage(module)


def can_pack(linears: Sequence[nn.Module]) -> TypeGuard[Sequence[nn.Linear]]:
    """Tell whether the parameters of plain linear layers with the same input can be moved one after another.

    They must have one dtype and device, all layers or none must have a bias, and all must be movable.
    """
    if not all(is_plain(linear, nn.Linear) for linear in linears):
        return False
    weights, biases = ([linear._parameters.get(name) for linear in linears] for name in ("weight", "bias"))
    parameters = weights if biases.count(None) == len(biases) else weights + biases
    movable = [parameter for parameter in parameters if _is_movable(parameter)]
    return (
        len(set(map(id, movable))) == len(parameters)
        and all(parameter.numel() for parameter in movable)  # DeepSpeed leaves empty parameters
        and len({(parameter.dtype, parameter.device) for parameter in movable}) == 1
        and len({weight.shape[1:] for weight in movable[: len(weights)]}) == 1
    )


def _is_movable(parameter: torch.Tensor | None) -> TypeGuard[nn.Parameter]:
    """Tell whether a parameter may get another storage.

    It must be the module's own, made outside inference mode and `torch.func`, and not shared with another process.
    `functional_call` puts a caller's tensors in place of parameters, and tensors made in a transform end with it. Torch
    has no public way to ask for a transform under way.
    """
    if type(parameter) is not nn.Parameter or parameter.is_inference():
        return False
    if parameter.device.type == "cpu" and parameter.is_shared():
        return False
    transformed = getattr(torch._C, "_are_functorch_transforms_active", None)
    return transformed is None or not transformed()


def pack_linears(linears: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return `packed_linears`, after moving parameters that do not lie so yet; None if they cannot be moved."""
    if (packed := packed_linears(linears)) is None and can_pack(linears):
        _pack([linear.weight for linear in linears])
        if linears[0].bias is not None:
            _pack([linear.bias for linear in linears])
        packed = packed_linears(linears)
    return packed


@torch.no_grad()
@torch.inference_mode(False)  # inference tensors could no longer be trained
def _pack(parameters: list[torch.Tensor]) -> None:
    packed = torch.cat([parameter.data for parameter in parameters])
    for parameter, view in zip(parameters, packed.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = view


@torch.no_grad()
@torch.inference_mode(False)
def transpose_storage(conv: Conv1D) -> None:
    """Keep the `[in, out]` weight of `conv`, if any, as the transposed view of contiguous `[out, in]` storage."""
    weight = conv._parameters.get("weight")
    if _is_movable(weight) and weight.dim() == 2 and not weight.t().is_contiguous():
        weight.data = weight.data.t().contiguous().t()
