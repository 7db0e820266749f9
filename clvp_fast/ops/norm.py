"""Residual addition and normalisation in one operator.

s = x + residual
rms:   s * rsqrt(mean(s^2) + eps) * weight                        statistics and normalisation in float32
layer: (s - mean(s)) * rsqrt(var(s) + eps) * weight + bias
"""

import torch
import torch.nn.functional as F

from clvp_fast.ops.dispatch import Operator, check_same, needs_grad, shape_error


def reference(x, residual, weight, bias, eps, kind):
    """The mathematics, step by step."""
    total = x if residual is None else x + residual
    if kind == "rms":
        # float32 for float64 input too: so does transformers' RMSNorm, and numbers must agree.
        wide = total.to(torch.float32)
        return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = normed * weight.to(wide.dtype)
    return total, (normed if bias is None else normed + bias.to(wide.dtype)).to(x.dtype)


def _torch(x, residual, weight, bias, eps, kind):
    total = x if residual is None else x + residual
    if kind == "layer":
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)
    wide = total.to(torch.float32)
    # Not F.rms_norm: it differs from transformers' RMSNorm in the last bit.
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight.dtype != x.dtype or needs_grad(normed, weight):
        return total, weight * normed
    return total, normed.mul_(weight)


def _unaliased(x, residual, weight, bias, eps, kind):
    total, normed = _torch(x, residual, weight, bias, eps, kind)
    return (x.new_empty(0) if residual is None else total), normed


def _fake(x, residual, weight, bias, eps, kind):
    dtype = torch.promote_types(x.dtype, weight.dtype) if kind == "rms" else x.dtype
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return total, x.new_empty(x.shape, dtype=dtype)


# A registered operator may not return its argument: without a residual its first result is empty, and x stands in.
_OPERATOR = Operator(
    "add_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, str kind) -> (Tensor, Tensor)",
    reference=reference,
    torch_path=_torch,
    unaliased=_unaliased,
    fake=_fake,
)


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual and normalise the sum over its last axis.

    Args:
        x: `[..., C]`.
        residual: the shape, dtype and device of `x`; None: nothing is added.
        weight: `[C]`.
        bias: `[C]`, with `kind="layer"` alone.
        eps: added to the mean square or variance.
        kind: `"rms"` (transformers' RMSNorm bit for bit: in float32, cast to the dtype of `x`, then times `weight`) or
            `"layer"` (`torch.nn.functional.layer_norm`).

    Returns:
        `x + residual` (`x` itself without a residual) and the normed sum, both of the shape of `x`.

    Raises:
        ValueError, TypeError: an unknown kind, or shapes, dtypes or devices that do not match.
    """
    if kind != "rms" and kind != "layer":
        raise ValueError(f"kind must be 'rms' or 'layer', not {kind!r}")
    shape = x.shape
    if weight.shape != shape[-1:]:
        raise shape_error("weight", f"{list(shape[-1:])}, the last axis of x", weight)
    if weight.device != x.device:
        check_same("weight", weight, "x", x, dtype=False)
    if residual is not None:
        if residual.shape != shape:
            raise shape_error("residual", f"that of x, {list(shape)}", residual)
        check_same("residual", residual, "x", x)
    if bias is not None:
        if kind == "rms":
            raise ValueError("bias must be None with kind='rms': an RMSNorm has none")
        if bias.shape != weight.shape:
            raise shape_error("bias", f"that of weight, {list(weight.shape)}", bias)
        check_same("bias", bias, "weight", weight)
    grad = "an input requires grad" if needs_grad(x, residual, weight, bias) else None
    args = (x, residual, weight, bias, eps, kind)
    total, normed = _OPERATOR.choose(args, grad)(*args)
    return (x if residual is None else total), normed
