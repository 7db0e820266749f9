"""The storage of parameters.

Parameters are those of the checkpoints (`q_proj`, `k_proj`, ... each its own), in the storage that the operators want:
query, key and value weights of a layer lie in one block, and `Conv1D` weights, which checkpoints keep as `[in, out]`,
are transposed views of `[out, in]` storage. Both are made on first use, or all at once by `arrange_parameters`, where
the weights are found in another layout (after loading, moving or assigning them), and hold no second copy.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clvp_fast import ops
from clvp_fast.models.common.plain import is_plain


def apply_linear(linear: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`linear(hidden_states)`, `[..., in]` → `[..., out]`, through the operator where that is the same.

    A residual is added, and the result has its dtype.
    """
    if is_plain(linear, nn.Linear):
        return ops.linear(hidden_states, linear.weight, linear.bias, residual=residual)
    out = linear(hidden_states)
    return out if residual is None else residual + out


def project_heads(linears: list[nn.Module], hidden_states: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
    """`[..., heads, head_dim]` of each linear layer of one input, where possible views of one projection."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not can_pack(linears):
        return tuple(linear(hidden_states).unflatten(-1, (num_heads, -1)) for linear in linears)
    packed = ops.linear(hidden_states, *pack_linears(linears))
    return packed.unflatten(-1, (len(linears), num_heads, -1)).unbind(-3)


def can_pack(linears: list[nn.Module]) -> bool:
    """Whether `pack_linears` serves: plain linear layers of one dtype, all with a bias or none; their storage moves."""
    return (
        all(is_plain(linear, nn.Linear) and _is_movable(linear.weight) for linear in linears)
        and len({linear.weight.dtype for linear in linears}) == 1
        and len({linear.bias is None for linear in linears}) == 1
    )


def _is_movable(weight: torch.Tensor) -> bool:
    """Whether a weight's storage may be another: it is the module's own, of no inference mode, under no `torch.func`.

    `functional_call` puts a caller's tensors in the place of weights, and what a transform makes ends with it. Whether
    one is under way has no public name in torch.
    """
    if type(weight) is not nn.Parameter or weight.is_inference():
        return False
    transformed = getattr(torch._C, "_are_functorch_transforms_active", None)
    return transformed is None or not transformed()


def arrange_parameters(model: nn.Module) -> None:
    """Bring the parameters of all layers of `model` into their storage, which first use would do one by one.

    What a layer frees on first use lies between the other memory of that run, and is of no use for it.
    """
    for module in model.modules():
        if hasattr(module, "arrange_parameters"):
            module.arrange_parameters()


def pack_linears(linears: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One `[sum of out, in]` weight and one bias for several linear layers of one input, as views of their parameters.

    Where the parameters do not lie one behind the other yet, they are moved there; this must not be called under
    autograd.
    """
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    return _pack(weights), None if biases[0] is None else _pack(biases)


@torch.no_grad()
@torch.inference_mode(False)  # else the parameters became inference tensors, of no use for training
def _pack(parameters: list[nn.Parameter]) -> torch.Tensor:
    first = parameters[0]
    if _lie_in_a_row(parameters):
        return first.as_strided((sum(p.shape[0] for p in parameters), *first.shape[1:]), first.stride())
    packed = torch.cat([p.data for p in parameters])
    for parameter, view in zip(parameters, packed.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = view
    return packed


def _lie_in_a_row(parameters: list[nn.Parameter]) -> bool:
    storage = parameters[0].untyped_storage().data_ptr()
    address = parameters[0].data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != address or parameter.untyped_storage().data_ptr() != storage:
            return False
        if not parameter.is_contiguous():
            return False
        address += parameter.numel() * parameter.element_size()
    return True


@torch.no_grad()
@torch.inference_mode(False)
def transpose_storage(conv: Conv1D) -> None:
    """Keep the `[in, out]` weight of `conv` as the transposed view of contiguous `[out, in]` storage, if it has one."""
    if _is_movable(conv.weight) and not conv.weight.t().is_contiguous():
        conv.weight.data = conv.weight.data.t().contiguous().t()
