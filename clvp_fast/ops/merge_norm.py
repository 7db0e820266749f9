"""Patch merging's layer norm (Swin, arXiv:2103.14030): four neighbours of an image become one position, normalised.

    merged = [x(2i, 2j), x(2i + 1, 2j), x(2i, 2j + 1), x(2i + 1, 2j + 1)]      one behind the other; zeros off the image
    out    = (merged - mean) * rsqrt(var + eps) * weight + bias                float32 at least

The norm writes new rows anyway, so the kernel gathers while it reads, and the merged image is never written.
"""

import torch
import torch.nn.functional as F

from clvp_fast.ops import norm
from clvp_fast.ops.checks import check_same, shape_error
from clvp_fast.ops.dispatch import Implementation, Operator, gradient


def merge(x):
    """Merge `[batch, height, width, C]` into `[batch, ceil(height / 2), ceil(width / 2), 4 * C]`."""
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    # [batch, rows, 2, columns, 2, C]: the neighbours of the first column come first.
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)


def reference(x, weight, bias, eps):
    """Compute the formula, step by step."""
    corners = [F.pad(x, (0, 0, 0, 1, 0, 1))[:, row:, column:][:, ::2, ::2] for column in (0, 1) for row in (0, 1)]
    rows, columns = corners[-1].shape[1:3]
    merged = torch.cat([corner[:, :rows, :columns] for corner in corners], -1)
    return norm.reference(merged, None, weight, bias, eps, "layer")[1]


def _torch(x, weight, bias, eps):
    return norm.layer_norm(merge(x), weight, bias, eps, x.dtype)


def _fake(x, weight, bias, eps):
    batch, height, width, channels = x.shape
    return x.new_empty(batch, (height + 1) // 2, (width + 1) // 2, 4 * channels)


def _triton(x, weight, bias, eps):
    from clvp_fast.kernels import norm as kernels

    out = _fake(x, weight, bias, eps)
    if out.numel():
        x = x if x.stride(-1) == 1 else x.contiguous()
        kernels.merge_norm(x, weight.contiguous(), None if bias is None else bias.contiguous(), eps, out=out)
    return out


def _why_not(x, weight, bias, eps):
    return norm.unserved(4 * x.shape[-1], x.dtype, weight.dtype, None if bias is None else bias.dtype)


_OPERATOR = Operator(
    "merge_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations=(Implementation("triton", _triton, _why_not, norm.unserved_type), Implementation("torch", _torch)),
)


def merge_norm(x: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float) -> torch.Tensor:
    """Merge each two by two neighbours of an image, and normalise the result.

    Args:
        x: `[B, height, width, C]`, any strides; an odd last row or column is filled up with zeros.
        weight: `[4 * C]`: for the neighbour itself, the one below, the one to the right, and the one below that.
        bias: as `weight`, or None.
        eps: added to the variance.

    Returns:
        `[B, ceil(height / 2), ceil(width / 2), 4 * C]`, contiguous, the dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not match.
        RuntimeError: a forced backend cannot serve.
    """
    if x.ndim != 4:
        raise shape_error("x", "[batch, height, width, channels]", x)
    if weight.shape != (4 * x.shape[-1],):
        raise shape_error("weight", f"[{4 * x.shape[-1]}], four times the channels of x", weight)
    check_same("weight", weight, "x", x, dtype=False)
    if bias is not None:
        if bias.shape != weight.shape:
            raise shape_error("bias", f"that of weight, {list(weight.shape)}", bias)
        check_same("bias", bias, "weight", weight)
    args = (x, weight, bias, eps)
    return _OPERATOR.choose(args, gradient(x, weight, bias))(*args)
