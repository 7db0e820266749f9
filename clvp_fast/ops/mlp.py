"""The two feed-forward blocks.

gelu_mlp:  out = act(x W_in^T + b_in) W_out^T + b_out (+ residual)
geglu_mlp: h, gate = split(x W_in^T + b_in);  out = dropout(h * act(gate)) W_out^T + b_out (+ residual)

The result has the dtype of the residual, which may be float32 with half types. The weights of gelu_mlp may be int8,
with a scale for each row: (x W^T) * scale in place of x W^T.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from clvp_fast.ops import many_rows
from clvp_fast.ops.activations import ACTIVATIONS, activate, reference_activation
from clvp_fast.ops.binding import BoundCall, Scratch, in_turn, writing
from clvp_fast.ops.checks import as_rows, check_residual, check_same, shape_error, unserved_by_triton
from clvp_fast.ops.dispatch import Implementation, Operator, autocasts, gradient, needs_grad
from clvp_fast.ops.linear import bind_linear, check_scale, linear


def _out_dtype(x, residual):
    return x.dtype if residual is None else residual.dtype


def _wide(*tensors: torch.Tensor | None) -> list[Any]:  # None for None, and a tensor for each other
    return [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def gelu_reference(x, w_in, b_in, w_out, b_out, residual, activation, scale_in=None, scale_out=None):
    """Compute the formula, step by step, in float32 at least."""
    dtype = _out_dtype(x, residual)
    x, b_in, b_out, residual = _wide(x, b_in, b_out, residual)
    w_in, w_out = (
        weight.to(x.dtype) * (1 if scale is None else scale[:, None])
        for weight, scale in ((w_in, scale_in), (w_out, scale_out))
    )
    out = reference_activation(x @ w_in.T + b_in, activation) @ w_out.T + b_out
    return (out if residual is None else out + residual).to(dtype)


def geglu_reference(x, w_in, b_in, w_out, b_out, residual, activation, dropout_p=0.0):
    """Compute the formula, step by step, in float32 at least."""
    dtype = _out_dtype(x, residual)
    x, w_in, b_in, w_out, b_out, residual = _wide(x, w_in, b_in, w_out, b_out, residual)
    h, gate = (x @ w_in.T + b_in).chunk(2, dim=-1)
    out = F.dropout(h * reference_activation(gate, activation), dropout_p) @ w_out.T + b_out
    return (out if residual is None else out + residual).to(dtype)


def _gelu_torch(x, w_in, b_in, w_out, b_out, residual, activation, scale_in=None, scale_out=None):
    hidden = linear(x, w_in, b_in, scale=scale_in, activation=activation)
    return linear(hidden, w_out, b_out, scale=scale_out, residual=residual)


def _bind_gelu_torch(out, scratch, x, w_in, b_in, w_out, b_out, residual, activation, scale_in=None, scale_out=None):
    hidden = scratch("mlp", len(x), len(w_in), dtype=x.dtype)
    return in_turn(
        bind_linear(hidden, scratch, x, w_in, b_in, scale=scale_in, activation=activation),
        bind_linear(out, scratch, hidden, w_out, b_out, scale=scale_out, residual=residual),
    )


def _geglu_torch(x, w_in, b_in, w_out, b_out, residual, activation, dropout_p=0.0):
    h, gate = linear(x, w_in, b_in).chunk(2, dim=-1)
    gate = activate(gate, activation)
    h = h * gate if needs_grad(h, gate) else gate.mul_(h)
    if dropout_p > 0:
        h = F.dropout(h, dropout_p)
    return linear(h, w_out, b_out, residual=residual)


def _fake(x, w_in, b_in, w_out, b_out, residual, activation, scale_in=None, scale_out=None):
    return x.new_empty((*x.shape[:-1], w_out.shape[0]), dtype=_out_dtype(x, residual))


def _why_not_type_triton(device, dtype):
    return unserved_by_triton("x", dtype)


def _why_not_triton(x, w_in, b_in, w_out, b_out, residual, activation, *scales):
    from clvp_fast.kernels.mlp import ACTIVATIONS as SERVED

    if reason := unserved_by_triton("x", x.dtype):
        return reason
    if activation not in SERVED:
        return f"activation must be one of {', '.join(SERVED)}, not {activation!r}"
    return None


def _why_not_cpu(x, w_in, b_in, w_out, b_out, residual, activation, *scales):
    return many_rows.unserved(x, activation, w_in, w_out)


def _triton(x, w_in, b_in, w_out, b_out, residual, activation, scale_in=None, scale_out=None, *, gated=False, out=None):
    from clvp_fast.kernels import mlp

    outer, inner = w_out.shape
    out = _fake(x, w_in, b_in, w_out, b_out, residual, activation) if out is None else out
    if out.numel() == 0:
        return out
    flat = as_rows(x)
    sizes = mlp.workspace(len(flat), outer, inner, x.element_size(), scale_in is not None)
    mlp.mlp(
        flat,
        w_in,
        b_in.contiguous(),
        w_out,
        b_out.contiguous(),
        None if residual is None else as_rows(residual),
        activation,
        gated,
        hidden=x.new_empty(len(flat), inner),
        out=out.view(-1, outer),
        partial=x.new_empty(sizes.partial, dtype=torch.float32) if sizes.partial else None,
        arrivals=x.new_empty(sizes.arrivals, dtype=torch.int32) if sizes.arrivals else None,
        scale_in=None if scale_in is None else scale_in.contiguous(),
        scale_out=None if scale_out is None else scale_out.contiguous(),
    )
    return out


def _cpu(x, w_in, b_in, w_out, b_out, residual, activation, *scales, gated=False):
    return many_rows.layers(x, w_in, b_in, w_out, b_out, residual, activation, gated=gated)


def _pays(x, *others):
    """Tell whether x has many rows and nothing is being compiled; few rows are faster as two products."""
    return many_rows.are_many(x) and not torch.compiler.is_compiling()


def _implementations(plain, gated, bind=None):
    triton, cpu = partial(_triton, gated=gated), partial(_cpu, gated=gated)
    # A CPU is not expected to have a kernel for every dtype.
    return (
        Implementation("triton", triton, _why_not_triton, _why_not_type_triton, calls=_CALLS, bind=writing(triton)),
        Implementation("cpu", cpu, _why_not_cpu, many_rows.unserved_type, _pays, _CALLS, warns=False),
        Implementation("torch", plain, bind=bind),
    )


_ARGUMENTS = "Tensor x, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, Tensor? residual, str activation"
_CALLS = f"more than {many_rows.FEW_ROWS} rows on a CPU, where fewer are two calls of linear"
_GELU = Operator(
    "gelu_mlp",
    f"({_ARGUMENTS}, Tensor? scale_in=None, Tensor? scale_out=None) -> Tensor",
    reference=gelu_reference,
    fake=_fake,
    implementations=_implementations(_gelu_torch, gated=False, bind=_bind_gelu_torch),
)
_GEGLU = Operator(
    "geglu_mlp",
    f"({_ARGUMENTS}) -> Tensor",
    reference=geglu_reference,
    fake=_fake,
    implementations=_implementations(_geglu_torch, gated=True),
)


def _check(halves, x, w_in, b_in, w_out, b_out, residual, activation, scale_in=None, scale_out=None):
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    x_shape, in_shape, out_shape = x.shape, w_in.shape, w_out.shape
    if len(in_shape) != 2 or in_shape[1] != x_shape[-1] or in_shape[0] % halves:
        rows = "an even number" if halves == 2 else "intermediate"
        raise shape_error("w_in", f"[{rows}, {x_shape[-1]}]", w_in)
    if len(out_shape) != 2 or out_shape[1] * halves != in_shape[0]:
        raise shape_error("w_out", f"[out, {in_shape[0] // halves}]", w_out)
    if b_in.shape != (in_shape[0],):
        raise shape_error("b_in", f"[{in_shape[0]}]", b_in)
    if b_out.shape != (out_shape[0],):
        raise shape_error("b_out", f"[{out_shape[0]}]", b_out)
    if residual is not None and residual.shape != (*x_shape[:-1], out_shape[0]):
        raise shape_error("residual", f"{[*x_shape[:-1], out_shape[0]]}", residual)
    cast = autocasts(x.device)
    device, dtype = x.device, x.dtype
    for name, tensor in (("w_in", w_in), ("b_in", b_in), ("w_out", w_out), ("b_out", b_out)):
        if tensor.dtype != dtype or tensor.device != device:
            int8 = scale_in is not None and name[0] == "w" and tensor.dtype == torch.int8
            check_same(name, tensor, "x", x, dtype=not (cast or int8))
    if scale_in is not None or scale_out is not None:
        for name, scale, weight in (("scale_in", scale_in, w_in), ("scale_out", scale_out, w_out)):
            check_scale(scale, weight, x, name)
            if scale is None:
                raise ValueError(f"{name} is missing: both weights are int8, or none")
    if residual is not None and not cast:
        check_residual(residual, x)


def training(*tensors):
    """Return why a call needs torch's own functions, or None."""
    return "autocast is on" if autocasts(tensors[0].device) else gradient(*tensors)


def gelu_mlp(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "gelu_new",
    scale_in: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute two linear layers with an activation between them.

    Args:
        x: `[..., H]`.
        w_in, b_in: `[I, H]`, `[I]`; any strides, fastest with the last axis contiguous. All have the dtype of `x`, or
            both weights are int8 and have scales.
        w_out, b_out: `[O, I]`, `[O]`.
        residual: `[..., O]`, added to the result; of the dtype of `x` or, with a half type, float32.
        activation: by transformers' name: gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, quick_gelu, relu, relu2, silu,
            swish, selu, sigmoid, tanh, mish, leaky_relu, elu or linear.
        scale_in, scale_out: `[I]`, `[O]` float32, which multiply the rows of int8 weights.

    Returns:
        `[..., O]`, of the dtype of the residual, or of `x` without one.

    Raises:
        ValueError, TypeError: an unknown activation, or shapes, dtypes or devices that do not match.
    """
    args = (x, w_in, b_in, w_out, b_out, residual, activation)
    if scale_in is not None or scale_out is not None:
        args = (*args, scale_in, scale_out)
    _check(1, *args)
    return _GELU.choose(args, training(*args[:6]))(*args)


def bind_gelu_mlp(
    out: torch.Tensor,
    scratch: Scratch,
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "gelu_new",
    scale_in: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
) -> BoundCall:
    """Bind `gelu_mlp` of these arguments, `x` `[N, H]`, into `out`, as `Operator.bind` does."""
    args = (x, w_in, b_in, w_out, b_out, residual, activation, scale_in, scale_out)
    _check(1, *args)
    return _GELU.bind(args, out, scratch)


def geglu_mlp(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Compute a gated feed-forward block: the first hidden half times the activation of the second.

    Args:
        x: `[..., H]`.
        w_in, b_in: `[2 I, H]`, `[2 I]`: values first, gates second. All have the dtype of `x`.
        w_out, b_out: `[O, I]`, `[O]`.
        residual, activation: as in `gelu_mlp`.
        dropout_p: probability of dropping a gated value (training).

    Returns:
        `[..., O]`, of the same dtype as from `gelu_mlp`.

    Raises:
        ValueError, TypeError: as in `gelu_mlp`.
    """
    args = (x, w_in, b_in, w_out, b_out, residual, activation)
    _check(2, *args)
    if dropout_p > 0:
        return _GEGLU.choose(args, "dropout is for training")(*args, dropout_p)
    return _GEGLU.choose(args, training(*args[:6]))(*args)
