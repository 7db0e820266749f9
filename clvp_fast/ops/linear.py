"""Linear layers, computed by the product that is fastest at their number of rows.

    out = activation((x W^T) * scale + b) + residual

For the few rows of a decode step the time goes into reading the weights. They have a kernel in the native library of
`csrc/` on a CPU, and one in Triton on a GPU, which also serves int8 weights for any number of rows. Both read weights
as they lie, round only the result, and give a row the same bits whatever rows are beside it. Torch's own products serve
all other calls on a GPU. Many rows on a CPU have another kernel, which packs the weights first (many_rows.py). Weights
that were packed once (panels.py) have a third, for any number of rows, which reads each panel from beginning to end; if
they are int8, a fourth rounds rows of x to 8 bits, and multiplies integers.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from clvp_fast.ops import many_rows, panels as packing
from clvp_fast.ops.activations import ACTIVATIONS, activate, bind_activation, reference_activation
from clvp_fast.ops.binding import BoundCall, Scratch, copying, in_turn, side_by_side
from clvp_fast.ops.checks import as_rows, check_residual, check_same, shape_error, unserved_by_triton
from clvp_fast.ops.dispatch import Implementation, Operator, autocasts, gradient, interpreted, needs_grad

_FUSED = (None, "gelu_new", "gelu_pytorch_tanh")
# The most rows for which a bound step on a GPU takes the kernel's products.
_FEW_ROWS = 16


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Round each row of `x` `[..., in]` to 8 bits: to whole steps, 127 of which are its largest number.

    The result is of float32 at least. A row with a number that is not finite has results that are not finite.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    step = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide * (1 / step)).round().clamp(-127, 127) * step


def reference(x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False):
    """Compute the formula in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = (rounded(x) if int8_x else x.to(wide)) @ weight.to(wide).T
    if scale is not None:
        out = out * scale.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    out = out if activation is None else reference_activation(out, activation)
    return out.to(x.dtype) if residual is None else out.to(residual.dtype) + residual


def _add(out, residual):
    """Return `out + residual`, in the memory of `out` if possible."""
    if residual is None:
        return out
    if out.dtype != residual.dtype or needs_grad(out, residual):  # under autocast the dtypes may differ
        return out + residual
    return out.add_(residual)


def _product(x, weight, bias, scale, int8_x=False):
    if scale is None:
        return F.linear(x, weight, bias)
    if int8_x:
        few = rounded(x)
        return _product(few, weight, None if bias is None else bias.to(few.dtype), scale).to(x.dtype)
    out = F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    return out if bias is None else out + bias


def _torch(x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False):
    out = _product(x, weight, bias, scale, int8_x)
    out = out if activation is None else activate(out, activation)
    return _add(out, residual)


def _fake(x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype if residual is None else residual.dtype)


def _bind_torch(out, scratch, x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False):
    product = partial(_product, x, weight, bias, scale, int8_x)
    if residual is not None:
        return None if activation is not None else lambda: torch.add(product(), residual, out=out)
    # torch's stub of `linear` lacks `out`
    plain = partial(F.linear, x, weight, bias, out=out)  # pyright: ignore[reportCallIssue]
    write = plain if scale is None else copying(product, out)
    return write if activation is None else in_turn(write, bind_activation(out, activation))


def _operands(x, bias, scale):
    """Return x as rows, and vectors contiguous."""
    return as_rows(x), *(None if vector is None else vector.contiguous() for vector in (bias, scale))


def _triton(x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False, *, out=None):
    """Run kernels/linear.py."""
    from clvp_fast.kernels import linear as kernels

    rows, bias, scale = _operands(x, bias, scale)
    out = _fake(x, weight, bias, scale, activation) if out is None else out
    if out.numel() > 0:
        kernels.linear(rows, weight, scale, bias, activation or "linear", out=out.view(-1, len(weight)))
    return _add(out, residual)


def _bind_triton(out, scratch, *args):
    residual = args[5]
    # A residual of a wider type gives the result its type.
    return None if residual is not None and residual.dtype != args[0].dtype else partial(_triton, *args, out=out)


def _native(x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False):
    """Run csrc/cpu/linear.cpp, panel_linear.cpp or int8_linear.cpp."""
    out = _fake(x, weight, bias, scale, activation, residual)
    _native_call(out, x, weight, bias, scale, activation, residual, panels, int8_x)()
    return out


def _native_call(out, x, weight, bias, scale, activation, residual, panels=None, int8_x=False):
    """Bind the kernel to these tensors, or to contiguous copies made now if needed."""
    from clvp_fast import native

    rows, bias, scale = _operands(x, bias, scale)
    residual = None if residual is None else residual.contiguous()
    call = native.LinearCall(
        rows.data_ptr(),
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        None if panels is None else panels.data_ptr(),
        rows.stride(0),
        weight.stride(0),
        len(rows),
        *reversed(weight.shape),
        native.number_of(x.dtype),
        native.number_of(weight.dtype),
        native.NO_ACTIVATION if activation is None else native.GELU_TANH,
        int8_x,
    )
    kept = rows, weight, bias, scale, residual, out, panels
    return native.Bound("clvp_fast_linear_cpu", call, torch.get_num_threads(), *kept)


def _bind_cpu(out, scratch, x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False):
    if _packs(x, panels) or not side_by_side(out, x, bias, scale, residual):
        return None
    return _native_call(out, x, weight, bias, scale, activation, residual, panels, int8_x)


def _packs(x, panels):
    """Tell whether the kernel for `x` packs the weights at each call."""
    return panels is None and many_rows.are_many(x)


def _cpu(x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False):
    if _packs(x, panels):
        return _native_many(x, weight, bias, scale, activation, residual)
    return _native(x, weight, bias, scale, activation, residual, panels, int8_x)


def _native_many(x, weight, bias, scale, activation, residual=None):
    return many_rows.layers(x, weight, bias, None, None, residual, activation)


def _takes_int8(x, weight, *others):
    return weight.dtype == torch.int8


def _pays_bound(x, weight, *others):
    """Tell whether a step's product has few rows, or a result whose rows are not aligned, where torch is slow.

    Measured on an H200 in bfloat16: 4.6 µs instead of 7.4 for one row and 1024 x 1024, 6.7 instead of 14.5 for 16 rows
    and 8194 x 1024.
    """
    few = x.shape[:-1].numel() <= _FEW_ROWS or len(weight) % 8 != 0
    return weight.dtype == torch.int8 or (few and x.dtype in (torch.bfloat16, torch.float16))


def _why_not(x, weight, bias, activation):
    rows, columns = weight.shape
    if x.shape[-1] != columns or columns == 0:
        return f"it serves x with as many columns as the weights, at least one, not {x.shape[-1]}, {columns}"
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (rows,)):
        return f"bias must be [{rows}] of the dtype of x, {x.dtype}, not {list(bias.shape)}, {bias.dtype}"
    return None if activation in _FUSED else f"activation must be one of {_FUSED}, not {activation!r}"


def _why_not_type_triton(device, dtype):
    return unserved_by_triton("x", dtype)


def _why_not_triton(x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False):
    if int8_x:
        return "it multiplies x as it is, and does not round it to 8 bits"
    if reason := _why_not(x, weight, bias, activation) or unserved_by_triton("x", x.dtype):
        return reason
    if weight.dtype not in (torch.int8, x.dtype):
        return f"it serves weights of the dtype of x, {x.dtype}, or int8, not {weight.dtype}"
    return None


def _why_not_cpu(x, weight, bias, scale, activation, residual=None, panels=None, int8_x=False):
    int8 = weight.dtype == torch.int8
    if reason := _why_not(x, weight, bias, activation) or many_rows.unserved_type(x.device, x.dtype, int8):
        return reason
    if panels is not None:
        return packing.unserved(x.dtype, weight, int8_x)
    if int8_x:
        return "it rounds x to 8 bits over packed weights alone: give panels"
    if many_rows.are_many(x):
        return many_rows.unserved(x, activation, weight)
    if not int8 and weight.dtype != x.dtype:
        return f"it serves weights of the dtype of x, {x.dtype}, or int8, not {weight.dtype}"
    return many_rows.unserved_layout(weight)


_CALLS = f"rows of {many_rows.COLUMNS} n columns; up to {many_rows.FEW_ROWS} of them with int8 weights too"
_OPERATOR = Operator(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, str? activation, "
    "Tensor? residual=None, Tensor? panels=None, bool int8_x=False) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations=(
        # Torch has no product for int8 weights, only products over a wider copy of them.
        Implementation(
            "triton",
            _triton,
            _why_not_triton,
            _why_not_type_triton,
            pays=_takes_int8,
            pays_bound=_pays_bound,
            calls="over int8 weights; in half types few rows of a bound step too",
            bind=_bind_triton,
        ),
        Implementation("cpu", _cpu, _why_not_cpu, many_rows.unserved_type, calls=_CALLS, warns=False, bind=_bind_cpu),
        Implementation("torch", _torch, bind=_bind_torch),
    ),
    yields=lambda x, weight, *others: weight.dtype != torch.int8 or (x.device.type == "cpu" and not interpreted()),
)


def check_scale(scale: torch.Tensor | None, weight: torch.Tensor, x: torch.Tensor, name: str = "scale") -> None:
    """Raise unless an int8 `weight` has a scale for each row on the device of `x`, and any other weight has none."""
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
    panels: torch.Tensor | None = None,
    int8_x: bool = False,
    always: bool = False,
) -> torch.Tensor:
    """Compute a linear layer, then the activation if one is named, and add the residual if one is given.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, of the dtype of `x`; or int8, with `scale` `[out]` float32 that multiplies its rows.
        bias: `[out]`.
        activation: a name that `gelu_mlp` takes.
        residual: `[..., out]`, of the dtype of `x` or, with a half type, float32.
        panels: the same weights packed by `panels.pack`, which a CPU kernel reads instead.
        int8_x: round each row of `x` to 8 bits (`rounded`), and multiply integers; with int8 weights, of which `panels`
            are packed for that.
        always: take our own kernel wherever one serves, also where torch's product is faster.

    Returns:
        `[..., out]`, contiguous, of the dtype of the residual, or of `x` without one.

    Raises:
        ValueError, TypeError: an unknown activation; tensors on several devices; a scale without int8 weights, or int8
            weights without a scale; a residual of another shape than the result, or of another dtype; panels of other
            weights; `int8_x` without int8 weights.
    """
    args = (x, weight, bias, scale, activation, residual, panels, int8_x)
    cast = autocasts(x.device)
    _check(*args, cast)
    product = partial(linear, x, weight, bias, scale=scale, panels=panels, int8_x=int8_x, always=always)
    if residual is not None and (residual.dtype != torch.float32 or activation not in _FUSED):
        return _add(product(activation=activation), residual)
    if activation not in _FUSED:
        return activate(product(), activation)
    if cast or torch.compiler.is_compiling():
        training = "autocast is on, or a compiler"
    else:
        training = gradient(x, weight, bias, residual)
    return _OPERATOR.choose(args, training, always)(*args)


def bind_linear(
    out: torch.Tensor,
    scratch: Scratch,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    panels: torch.Tensor | None = None,
    int8_x: bool = False,
    always: bool = False,
) -> BoundCall:
    """Bind `linear` of these arguments into `out`, as `Operator.bind` does; `always` is as for `linear`."""
    args = (x, weight, bias, scale, activation, residual, panels, int8_x)
    _check(*args, cast=False)
    settings: dict[str, Any] = dict(scale=scale, panels=panels, int8_x=int8_x, always=always)
    if residual is not None and residual.dtype != torch.float32:
        product = bind_linear(out, scratch, x, weight, bias, activation=activation, **settings)
        return in_turn(product, partial(out.add_, residual))
    if activation not in _FUSED:
        if residual is not None:
            return copying(partial(linear, x, weight, bias, activation=activation, residual=residual, **settings), out)
        return in_turn(bind_linear(out, scratch, x, weight, bias, **settings), bind_activation(out, activation))
    return _OPERATOR.bind(args, out, scratch, always)


def _check(x, weight, bias, scale, activation, residual, panels, int8_x, cast):
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    check_same("weight", weight, "x", x, dtype=False)
    if bias is not None:
        check_same("bias", bias, "x", x, dtype=False)
    check_scale(scale, weight, x)
    if residual is not None:
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise shape_error("residual", f"{[*x.shape[:-1], weight.shape[0]]}", residual)
        if not cast:
            check_residual(residual, x)
    if int8_x and weight.dtype != torch.int8:
        raise TypeError(f"int8_x multiplies weights of int8, not {weight.dtype}")
    if panels is not None:
        packing.check(panels, weight, int8_x)
