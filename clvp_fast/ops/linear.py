"""Linear layers between the operators, and the product that is fastest at their number of rows.

    out = activation((x W^T) * scale + b) + residual

Torch's own products serve on a GPU. The few rows of a decode step on a CPU, which wait for the weights to come from
memory, have a kernel in the native library of `csrc/`, and int8 weights on a GPU have one in Triton: both read weights
as they lie, round nothing but the result, and give a row the same bits whatever rows are beside it. Many rows on a CPU
have another one, which packs the weights first (many_rows.py).
"""

import ctypes

import torch
import torch.nn.functional as F

from clvp_fast.ops import many_rows
from clvp_fast.ops.activations import ACTIVATIONS, activate, reference_activation
from clvp_fast.ops.dispatch import (
    Implementation,
    Operator,
    as_rows,
    autocasts,
    check_residual,
    check_same,
    gradient,
    interpreted,
    needs_grad,
    shape_error,
    unserved_by_triton,
)

_FUSED = (None, "gelu_new", "gelu_pytorch_tanh")


def reference(x, weight, bias, scale, activation, residual=None):
    """The mathematics, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) @ weight.to(wide).T
    if scale is not None:
        out = out * scale.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    out = out if activation is None else reference_activation(out, activation)
    return out.to(x.dtype) if residual is None else out.to(residual.dtype) + residual


def _add(out, residual):
    """`out + residual`, in the place of `out` where that may be."""
    if residual is None:
        return out
    if out.dtype != residual.dtype or needs_grad(out, residual):  # autocast gives two dtypes too
        return out + residual
    return out.add_(residual)


def _torch(x, weight, bias, scale, activation, residual=None):
    if scale is None:
        out = F.linear(x, weight, bias)
    else:
        out = F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
        out = out if bias is None else out + bias
    out = out if activation is None else activate(out, activation)
    return _add(out, residual)


def _fake(x, weight, bias, scale, activation, residual=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype if residual is None else residual.dtype)


def _operands(x, weight, bias, scale, activation, residual=None):
    """x as rows, vectors contiguous, and the result to be written."""
    out = _fake(x, weight, bias, scale, activation, residual)
    return as_rows(x), *(None if vector is None else vector.contiguous() for vector in (bias, scale)), out


def _triton(x, weight, bias, scale, activation, residual=None):
    """kernels/linear.py."""
    from clvp_fast.kernels import linear as kernels

    rows, bias, scale, out = _operands(x, weight, bias, scale, activation)
    if out.numel() > 0:
        kernels.linear(rows, weight, scale, bias, activation or "linear", out=out.view(-1, len(weight)))
    return _add(out, residual)


def _native(x, weight, bias, scale, activation, residual=None):
    """csrc/cpu/linear.cpp."""
    from clvp_fast import native

    rows, bias, scale, out = _operands(x, weight, bias, scale, activation, residual)
    residual = None if residual is None else residual.contiguous()
    dtype = native.FLOAT32 if x.dtype == torch.float32 else native.BFLOAT16
    call = native.LinearCall(
        rows.data_ptr(),
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        rows.stride(0),
        weight.stride(0),
        len(rows),
        *reversed(weight.shape),
        dtype,
        native.INT8 if weight.dtype == torch.int8 else dtype,
        native.NO_ACTIVATION if activation is None else native.GELU_TANH,
    )
    native.check(native.library().clvp_fast_linear_cpu(ctypes.byref(call), torch.get_num_threads(), None))
    return out


def _cpu(*args):
    return (_native_many if many_rows.are_many(args[0]) else _native)(*args)


def _native_many(x, weight, bias, scale, activation, residual=None):
    return many_rows.layers(x, weight, bias, None, None, residual, activation)


def _takes_int8(x, weight, *others):
    return weight.dtype == torch.int8


def _why_not(x, weight, bias, activation):
    rows, columns = weight.shape
    if x.shape[-1] != columns or columns == 0:
        return f"it serves x with as many columns as the weights, at least one, not {x.shape[-1]}, {columns}"
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (rows,)):
        return f"bias must be [{rows}] of the dtype of x, {x.dtype}, not {list(bias.shape)}, {bias.dtype}"
    return None if activation in _FUSED else f"activation must be one of {_FUSED}, not {activation!r}"


def _why_not_type_triton(device, dtype):
    return "on a GPU it serves int8 weights, and torch's own products all others"


def _why_not_triton(x, weight, bias, scale, activation, residual=None):
    if weight.dtype != torch.int8:
        return _why_not_type_triton(x.device, x.dtype)
    return _why_not(x, weight, bias, activation) or unserved_by_triton("x", x.dtype)


def _why_not_cpu(x, weight, bias, scale, activation, residual=None):
    int8 = weight.dtype == torch.int8
    if reason := _why_not(x, weight, bias, activation) or many_rows.unserved_type(x.device, x.dtype, int8):
        return reason
    if many_rows.are_many(x):
        return many_rows.unserved(x, activation, weight)
    if not int8 and weight.dtype != x.dtype:
        return f"it serves weights of the dtype of x, {x.dtype}, or int8, not {weight.dtype}"
    if weight.shape[1] % 32 or weight.stride(1) != 1:
        return f"it serves rows of 32 n columns, side by side in memory, not {list(weight.shape)}, {weight.stride()}"
    return None


_CALLS = f"rows of 32 n columns; up to {many_rows.FEW_ROWS} of them with int8 weights too"
_OPERATOR = Operator(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, str? activation, Tensor? residual=None) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations=(
        # For int8 weights torch has no product, only one over a wider copy of them.
        Implementation("triton", _triton, _why_not_triton, _why_not_type_triton, pays=_takes_int8),
        Implementation("cpu", _cpu, _why_not_cpu, many_rows.unserved_type, calls=_CALLS, warns=False),
        Implementation("torch", _torch),
    ),
    yields=lambda x, weight, *others: weight.dtype != torch.int8 or (x.device.type == "cpu" and not interpreted()),
)


def check_scale(scale: torch.Tensor | None, weight: torch.Tensor, x: torch.Tensor, name: str = "scale") -> None:
    """Raise unless there is a scale where `weight` is int8, and none elsewhere, of its rows and beside `x`."""
    if (weight.dtype == torch.int8) != (scale is not None):
        given = "missing" if scale is None else "given"
        raise ValueError(f"{name} belongs to weights of int8: it is {given}, and the weights are {weight.dtype}")
    if scale is not None:
        if scale.shape != weight.shape[:1]:
            raise shape_error(name, f"{list(weight.shape[:1])}", scale)
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, not {scale.dtype}")
        check_same(name, scale, "x", x, dtype=False)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer, with an activation behind it if one is named, and a residual added if one is given.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, of the dtype of `x`; or int8, with `scale` `[out]` float32, which each row is times.
        bias: `[out]`.
        activation: as `gelu_mlp` names them.
        residual: `[..., out]`, of the dtype of `x` or, beside a half type, float32.

    Returns:
        `[..., out]`, contiguous, of the dtype of the residual; without one that of `x`.

    Raises:
        ValueError, TypeError: an unknown activation; a scale without int8, or none with it; a residual that is not of
            the result's shape, or of another dtype or device.
    """
    args = (x, weight, bias, scale, activation, residual)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    check_scale(scale, weight, x)
    cast = autocasts(x.device)
    if residual is not None:
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise shape_error("residual", f"{[*x.shape[:-1], weight.shape[0]]}", residual)
        if not cast:
            check_residual(residual, x)
        if residual.dtype != torch.float32 or activation not in _FUSED:
            return _add(linear(x, weight, bias, scale=scale, activation=activation), residual)
    if activation not in _FUSED:
        return activate(linear(x, weight, bias, scale=scale), activation)
    if cast or torch.compiler.is_compiling():
        training = "autocast is on, or a compiler"
    else:
        training = gradient(x, weight, bias, residual)
    return _OPERATOR.choose(args, training)(*args)
