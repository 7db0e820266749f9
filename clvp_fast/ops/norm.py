"""Residual addition and normalisation in one operator; the decoder's two final norms in one.

s = x + residual                                                  in the dtype of the residual
rms:   s * rsqrt(mean(s^2) + eps) * weight                        statistics and normalisation in float32
layer: (s - mean(s)) * rsqrt(var(s) + eps) * weight + bias

With x of a half type the residual may be float32: a model's residual is a sum over all its layers, which a half type
would round after each of them.

The conditioning encoder's group norms have no kernel: they are six launches for a voice, over some 2 MB each, once a
request, which is little beside hundreds of decode steps with sixty norms each.
"""

import torch
import torch.nn.functional as F

from clvp_fast.ops.binding import BoundCall, Scratch, side_by_side, writing
from clvp_fast.ops.checks import (
    as_rows,
    check_floating,
    check_residual,
    check_same,
    shape_error,
    unserved_by_triton,
    unserved_natively,
)
from clvp_fast.ops.dispatch import Implementation, Operator, gradient, needs_grad


def _normed_dtype(x, weight, kind, out_dtype):
    if out_dtype is not None:
        return out_dtype
    return torch.promote_types(x.dtype, weight.dtype) if kind == "rms" else x.dtype


def reference(x, residual, weight, bias, eps, kind, out_dtype=None):
    """Compute the formula, step by step."""
    total = x if residual is None else x + residual
    dtype = _normed_dtype(x, weight, kind, out_dtype)
    if kind == "rms":
        # float32 for float64 input too, because transformers' RMSNorm does so and numbers must agree.
        wide = total.to(torch.float32)
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(total.dtype)
        return total, (weight * normed).to(dtype)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = normed * weight.to(wide.dtype)
    return total, (normed if bias is None else normed + bias.to(wide.dtype)).to(dtype)


def layer_norm(x, weight, bias, eps, dtype):
    """Compute the layer norm of `x` with a result of `dtype`, rounded once."""
    # Torch's function returns the dtype of x, and takes no narrower weights.
    if dtype == x.dtype and weight.dtype.itemsize >= x.dtype.itemsize:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias, eps).to(dtype)


def _torch(x, residual, weight, bias, eps, kind, out_dtype=None):
    total = x if residual is None else x + residual
    dtype = _normed_dtype(x, weight, kind, out_dtype)
    if kind == "layer":
        return total, layer_norm(total, weight, bias, eps, dtype)
    wide = total.to(torch.float32)
    # F.rms_norm differs from transformers' RMSNorm in the last bit.
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(total.dtype)
    if weight.dtype != normed.dtype or needs_grad(normed, weight):
        return total, (weight * normed).to(dtype)
    return total, normed.mul_(weight).to(dtype)


def _unaliased(x, residual, *others):
    total, normed = _torch(x, residual, *others)
    return (x.new_empty(0) if residual is None else total), normed


def _fake(x, residual, weight, bias, eps, kind, out_dtype=None):
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=residual.dtype)
    return total, x.new_empty(x.shape, dtype=_normed_dtype(x, weight, kind, out_dtype))


def unserved(width, *dtypes):
    """Return why the kernels cannot serve rows of this width and tensors of these dtypes (None: absent), or None."""
    from clvp_fast.kernels.norm import MAX_WIDTH

    if width > MAX_WIDTH:
        return f"rows must be at most {MAX_WIDTH} wide, not {width}"
    for dtype in dtypes:
        if dtype is not None and (reason := unserved_type(None, dtype)):
            return reason
    return None


def unserved_type(device, dtype):
    return unserved_by_triton("tensors", dtype)


def _why_not(x, residual, weight, bias, eps, kind, out_dtype=None):
    others = (None if tensor is None else tensor.dtype for tensor in (residual, weight, bias))
    return unserved(x.shape[-1], x.dtype, out_dtype, *others)


def _triton(x, residual, weight, bias, eps, kind, out_dtype=None, *, out=None):
    from clvp_fast.kernels import norm

    total, normed = _fake(x, residual, weight, bias, eps, kind, out_dtype) if out is None else out
    if x.numel():
        others = (None, None) if residual is None else (as_rows(residual), as_rows(total))
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        norm.add_norm(as_rows(x), others[0], weight, bias, eps, kind, total=others[1], out=as_rows(normed))
    return total, normed


# The fewest numbers for which an RMS norm that is not bound costs less by the library's kernel than by torch.
# Torch's layer norm is one pass already.
_MANY_NUMBERS = 2**17


def _native(x, residual, weight, bias, eps, kind, out_dtype=None):
    """Run csrc/cpu/norm.cpp."""
    out = _fake(x, residual, weight, bias, eps, kind, out_dtype)
    _native_call(out, x, residual, weight, bias, eps, kind)()
    return out


def _native_call(out, x, residual, weight, bias, eps, kind):
    """Bind the kernel to these tensors, or to contiguous copies made now if needed."""
    from clvp_fast import native

    rows, (total, normed) = as_rows(x), out
    residual, bias = (None if given is None else given.contiguous() for given in (residual, bias))
    weight = weight.contiguous()
    call = native.NormCall(
        rows.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else total.data_ptr(),
        normed.data_ptr(),
        rows.stride(0),
        *rows.shape,
        native.number_of(x.dtype),
        native.number_of(x.dtype if residual is None else residual.dtype),
        native.number_of(weight.dtype),
        native.number_of(normed.dtype),
        kind == "rms",
        eps,
    )
    kept = rows, residual, weight, bias, total, normed
    return native.Bound("clvp_fast_norm_cpu", call, torch.get_num_threads(), *kept)


def _bind_native(out, scratch, x, residual, weight, bias, eps, kind, out_dtype=None):
    if not side_by_side(*out, x, residual, weight, bias):
        return None
    return _native_call(out, x, residual, weight, bias, eps, kind)


def _why_not_native(x, residual, weight, bias, eps, kind, out_dtype=None):
    if x.shape[-1] == 0:
        return "it serves rows of at least one number"
    others = (None if tensor is None else tensor.dtype for tensor in (residual, weight, bias))
    reasons = (unserved_natively(x.device, dtype) for dtype in (x.dtype, out_dtype, *others) if dtype is not None)
    return next((reason for reason in reasons if reason), None)


def _pays_natively(x, residual, weight, bias, eps, kind, out_dtype=None):
    return kind == "rms" and x.numel() >= _MANY_NUMBERS and not torch.compiler.is_compiling()


# A registered operator may not return its argument: without a residual its first result is empty, and x stands in.
_OPERATOR = Operator(
    "add_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, str kind, ScalarType? out_dtype=None)"
    " -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    implementations=(
        Implementation("triton", _triton, _why_not, unserved_type, bind=writing(_triton)),
        Implementation(
            "cpu",
            _native,
            _why_not_native,
            unserved_natively,
            _pays_natively,
            f"RMS norms of at least {_MANY_NUMBERS} numbers on a CPU, and all norms of a decode step",
            warns=False,
            bind=_bind_native,
            pays_bound=lambda *args: True,
        ),
        Implementation("torch", _torch),
    ),
    unaliased=_unaliased,
)


def _double_reference(x, weight1, bias1, eps1, weight2, bias2, eps2, out_dtype=None):
    first = reference(x, None, weight1, bias1, eps1, "layer")[1]
    return first, reference(first, None, weight2, bias2, eps2, "layer", out_dtype)[1]


def _double_torch(x, weight1, bias1, eps1, weight2, bias2, eps2, out_dtype=None):
    first = layer_norm(x, weight1, bias1, eps1, x.dtype)
    return first, layer_norm(first, weight2, bias2, eps2, out_dtype or x.dtype)


def _double_fake(x, weight1, bias1, eps1, weight2, bias2, eps2, out_dtype=None):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype)


def _double_why_not(x, weight1, bias1, eps1, weight2, bias2, eps2, out_dtype=None):
    others = (None if tensor is None else tensor.dtype for tensor in (weight1, bias1, weight2, bias2))
    return unserved(x.shape[-1], x.dtype, out_dtype, *others)


def _double_triton(x, weight1, bias1, eps1, weight2, bias2, eps2, out_dtype=None, *, out=None):
    from clvp_fast.kernels import norm

    first, second = _double_fake(x, weight1, bias1, eps1, weight2, bias2, eps2, out_dtype) if out is None else out
    if x.numel():
        weight1, bias1, weight2, bias2 = (
            None if affine is None else affine.contiguous() for affine in (weight1, bias1, weight2, bias2)
        )
        results = {"first": as_rows(first), "out": as_rows(second)}
        norm.double_layer_norm(as_rows(x), weight1, bias1, eps1, weight2, bias2, eps2, **results)
    return first, second


_DOUBLE = Operator(
    "double_layer_norm",
    "(Tensor x, Tensor weight1, Tensor? bias1, float eps1, Tensor weight2, Tensor? bias2, float eps2,"
    " ScalarType? out_dtype=None) -> (Tensor, Tensor)",
    reference=_double_reference,
    fake=_double_fake,
    implementations=(
        Implementation("triton", _double_triton, _double_why_not, unserved_type, bind=writing(_double_triton)),
        Implementation("torch", _double_torch),
    ),
)


def _check_affine(x, weight, bias, number=""):
    if weight.shape != x.shape[-1:]:
        raise shape_error(f"weight{number}", f"{list(x.shape[-1:])}, the last axis of x", weight)
    if weight.device != x.device:
        check_same(f"weight{number}", weight, "x", x, dtype=False)
    if bias is not None:
        if bias.shape != weight.shape:
            raise shape_error(f"bias{number}", f"that of weight{number}, {list(weight.shape)}", bias)
        check_same(f"bias{number}", bias, f"weight{number}", weight)


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float,
    kind: str,
    out_dtype: torch.dtype | None = None,
    always: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual and normalise the sum over its last axis.

    Args:
        x: `[..., C]`.
        residual: of the shape and device of `x`, and of its dtype or, with a half type, float32; None: nothing is
            added.
        weight: `[C]`.
        bias: `[C]`, only with `kind="layer"`.
        eps: added to the mean square or variance.
        kind: `"rms"` (transformers' RMSNorm bit for bit: in float32, cast to the dtype of the sum, then times `weight`)
            or `"layer"` (`torch.nn.functional.layer_norm`).
        out_dtype: dtype of the normed sum; None: that of `x`, or with `kind="rms"` that of `weight` if it is wider.
        always: take our own kernel wherever one serves, also where torch's norm is faster.

    Returns:
        `x + residual`, of the dtype of the residual (`x` itself without one), and the normed sum; both of the shape of
        `x`.

    Raises:
        ValueError, TypeError: an unknown kind, or shapes, dtypes or devices that do not match.
    """
    args = (x, residual, weight, bias, eps, kind, out_dtype)
    _check(*args)
    total, normed = _OPERATOR.choose(args, gradient(x, residual, weight, bias), always)(*args)
    return (x if residual is None else total), normed


def bind_add_norm(
    out: tuple[torch.Tensor | None, torch.Tensor],
    scratch: Scratch,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float,
    kind: str,
) -> BoundCall:
    """Bind `add_norm` of these arguments into `out`, in its dtypes, as `Operator.bind` does.

    The first result is None if and only if there is no residual.
    """
    args = (x, residual, weight, bias, eps, kind, out[1].dtype)
    _check(*args)
    return _OPERATOR.bind(args, out, scratch)


def _check(x, residual, weight, bias, eps, kind, out_dtype):
    if kind != "rms" and kind != "layer":
        raise ValueError(f"kind must be 'rms' or 'layer', not {kind!r}")
    if bias is not None and kind == "rms":
        raise ValueError("bias must be None with kind='rms': an RMSNorm has none")
    check_floating("out_dtype", out_dtype)
    _check_affine(x, weight, bias)
    if residual is not None:
        if residual.shape != x.shape:
            raise shape_error("residual", f"that of x, {list(x.shape)}", residual)
        check_residual(residual, x)


def double_layer_norm(
    x: torch.Tensor,
    *,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    eps1: float,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    eps2: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a layer norm over the last axis, and a second one over its result.

    Args:
        x: `[..., C]`.
        weight1, bias1, weight2, bias2: `[C]`; a bias may be None.
        eps1, eps2: added to the variances.
        out_dtype: dtype of the second norm's result; None: that of `x`.

    Returns:
        The results of the first (rounded to the dtype of `x`) and of the second norm, both of the shape of `x`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not match.
    """
    args = (x, weight1, bias1, eps1, weight2, bias2, eps2, out_dtype)
    _check_double(*args)
    return _DOUBLE.choose(args, gradient(x, weight1, bias1, weight2, bias2))(*args)


def bind_double_layer_norm(
    out: tuple[torch.Tensor, torch.Tensor],
    scratch: Scratch,
    x: torch.Tensor,
    *,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    eps1: float,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    eps2: float,
) -> BoundCall:
    """Bind `double_layer_norm` of these arguments into `out`, the second in its dtype, as `Operator.bind` does."""
    args = (x, weight1, bias1, eps1, weight2, bias2, eps2, out[1].dtype)
    _check_double(*args)
    return _DOUBLE.bind(args, out, scratch)


def _check_double(x, weight1, bias1, eps1, weight2, bias2, eps2, out_dtype):
    check_floating("out_dtype", out_dtype)
    _check_affine(x, weight1, bias1, "1")
    _check_affine(x, weight2, bias2, "2")
