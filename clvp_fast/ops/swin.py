"""The two halves of a Swin layer (arXiv:2103.14030), each with the layer norm before it and the residual around it.

window_block: out = x + project(window_attention(qkv(layer_norm(x))))
mlp_block:    out = x + gelu_mlp(layer_norm(x))

On a CPU each is one kernel, whose intermediate values stay in a core's cache. Elsewhere they run as the operators that
they consist of.
"""

import ctypes
from functools import partial

import torch

from clvp_fast.ops import many_rows, norm
from clvp_fast.ops.activations import ACTIVATIONS
from clvp_fast.ops.checks import check_same, shape_error
from clvp_fast.ops.dispatch import Implementation, Operator, missing_natively
from clvp_fast.ops.linear import linear, reference as linear_reference
from clvp_fast.ops.mlp import gelu_mlp, gelu_reference, training
from clvp_fast.ops.norm import add_norm
from clvp_fast.ops.window_attention import (
    check_windows,
    reference as attention_reference,
    unserved_on_cpu,
    window_attention,
)


def _window_reference(x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, window, shift, eps):
    """Compute the formula, step by step, from the references of its parts."""
    normed = norm.reference(x, None, norm_weight, norm_bias, eps, "layer")[1]
    packed = linear_reference(normed, w_qkv, b_qkv, None, None)
    q, k, v = packed.unflatten(-1, (3, len(bias), -1)).unbind(-3)
    attended = attention_reference(q, k, v, bias, window, shift, q.shape[-1] ** -0.5)
    return linear_reference(attended.flatten(-2), w_out, b_out, None, None, x)


def _window_parts(x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, window, shift, eps):
    normed = add_norm(x, weight=norm_weight, bias=norm_bias, eps=eps, kind="layer")[1]
    q, k, v = linear(normed, w_qkv, b_qkv).unflatten(-1, (3, len(bias), -1)).unbind(-3)
    attended = window_attention(q, k, v, bias, window=window, shift=shift)
    return linear(attended.flatten(-2), w_out, b_out, residual=x)


def _window_native(x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, window, shift, eps):
    """Run csrc/cpu/window_block.cpp."""
    from clvp_fast import native

    out, heads = x.new_empty(x.shape), len(bias)
    x = x.contiguous()
    norm_weight, norm_bias, b_qkv, b_out = (
        None if t is None else t.contiguous() for t in (norm_weight, norm_bias, b_qkv, b_out)
    )
    call = native.WindowBlockCall(
        *(
            None if t is None else t.data_ptr()
            for t in (x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, out)
        ),
        w_qkv.stride(0),
        w_out.stride(0),
        bias.stride(),
        *x.shape[:3],
        heads,
        x.shape[3] // heads,
        window,
        shift,
        native.number_of(x.dtype),
        eps,
    )
    native.check(native.library().clvp_fast_window_block_cpu(ctypes.byref(call), torch.get_num_threads(), None))
    return out


def _window_why_not(x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, window, shift, eps):
    heads = len(bias)
    return (
        _unequal_types(x, norm_weight, norm_bias, b_qkv, b_out, bias)
        or many_rows.unserved(x, None, w_qkv, w_out)
        or unserved_on_cpu(x.unflatten(-1, (heads, -1)), bias, window)
    )


def _mlp_reference(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, activation, eps):
    """Compute the formula, step by step, from the references of its parts."""
    normed = norm.reference(x, None, norm_weight, norm_bias, eps, "layer")[1]
    return gelu_reference(normed, w_in, b_in, w_out, b_out, x, activation)


def _mlp_parts(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, activation, eps):
    normed = add_norm(x, weight=norm_weight, bias=norm_bias, eps=eps, kind="layer")[1]
    return gelu_mlp(normed, w_in, b_in, w_out, b_out, residual=x, activation=activation)


def _mlp_native(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, activation, eps):
    return many_rows.layers(x, w_in, b_in, w_out, b_out, x, activation, layer_norm=(norm_weight, norm_bias, eps))


def _mlp_why_not(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, activation, eps):
    return _unequal_types(x, norm_weight, norm_bias, b_in, b_out) or many_rows.unserved(x, activation, w_in, w_out)


def _unequal_types(x, *vectors):
    for vector in vectors:
        if vector is not None and vector.dtype != x.dtype:
            return f"all tensors must have the dtype of x, {x.dtype}, not {vector.dtype}"
    return None


def _missing(device):
    return missing_natively(device) if device.type == "cpu" else "it serves a CPU; elsewhere its parts have kernels"


def _window_pays(x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, window, shift, eps):
    """Tell whether there are enough windows for all threads; the separate operators distribute few windows better."""
    batch, height, width = x.shape[:3]
    return batch * (height // window) * (width // window) >= 2 * torch.get_num_threads()


def _mlp_pays(x, *others):
    """Tell whether packing the weights pays (benchmarks/swin.py): half types pack faster than float32."""
    fewest = 32 * torch.get_num_threads() if x.dtype == torch.bfloat16 else many_rows.FEW_ROWS + 1
    return x.numel() >= fewest * x.shape[-1]


def _fake(x, *others):
    return x.new_empty(x.shape)


_implementation = partial(Implementation, "cpu", why_not_type=many_rows.unserved_type, warns=False, missing=_missing)
_WINDOW = Operator(
    "window_block",
    "(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor w_qkv, Tensor? b_qkv, Tensor bias, Tensor w_out,"
    " Tensor? b_out, int window, int shift, float eps) -> Tensor",
    reference=_window_reference,
    fake=_fake,
    implementations=(
        _implementation(
            _window_native,
            _window_why_not,
            pays=_window_pays,
            calls="two windows a thread or more; fewer go through its parts",
        ),
        Implementation("torch", _window_parts),
    ),
    yields=lambda *args: True,
    parts=("add_norm", "linear", "window_attention"),
)
_MLP = Operator(
    "mlp_block",
    "(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out,"
    " str activation, float eps) -> Tensor",
    reference=_mlp_reference,
    fake=_fake,
    implementations=(
        _implementation(
            _mlp_native,
            _mlp_why_not,
            pays=_mlp_pays,
            calls=f"more than {many_rows.FEW_ROWS} rows, in bfloat16 32 a thread or more; fewer go through its parts",
        ),
        Implementation("torch", _mlp_parts),
    ),
    yields=lambda *args: True,
    parts=("add_norm", "gelu_mlp"),
)


def _training(args):
    """Return why a call is computed by its parts, or None; the parts raise errors, and a compiler can fuse them."""
    if torch.compiler.is_compiling():
        return "a compiler takes its parts"
    return training(*(arg for arg in args if isinstance(arg, torch.Tensor)))


def _check(x, **expected):
    """Raise unless each tensor that is not None has its shape and is on the device of `x`."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None:
            if tensor.shape != shape:
                raise shape_error(name, f"{list(shape)}", tensor)
            check_same(name, tensor, "x", x, dtype=False)


def window_block(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    bias: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor | None,
    *,
    window: int,
    shift: int = 0,
    eps: float,
) -> torch.Tensor:
    """Compute the first half of a Swin layer: window attention of the normed image, projected and added to the image.

    Args:
        x: `[B, height, width, C]`, floating.
        norm_weight, norm_bias: `[C]`, the layer norm's; the bias may be None.
        w_qkv, b_qkv: `[3 * C, C]`, `[3 * C]` or None: queries, keys and values.
        bias: `[H, window ** 2, window ** 2]`, as for `window_attention`; H divides C.
        w_out, b_out: `[C, C]`, `[C]` or None: the output projection.
        window: rows and columns of a window; it divides height and width.
        shift: by how many rows and columns the windows are shifted, from 0 to `window - 1`.
        eps: added to the variance.

    Returns:
        The shape and dtype of `x`, contiguous.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not match; a window that does not divide the image.
        RuntimeError: a forced backend cannot serve.
    """
    if x.ndim != 4:
        raise shape_error("x", "[batch, height, width, channels]", x)
    _, height, width, channels = x.shape
    heads, places = bias.shape[0], window**2
    if not heads or channels % heads:
        raise ValueError(f"the heads of bias must divide the channels of x, and {heads} does not divide {channels}")
    check_windows(height, width, window, shift)
    wide = (channels,)
    _check(
        x,
        norm_weight=(norm_weight, wide),
        norm_bias=(norm_bias, wide),
        w_qkv=(w_qkv, (3 * channels, channels)),
        b_qkv=(b_qkv, (3 * channels,)),
        bias=(bias, (heads, places, places)),
        w_out=(w_out, (channels, channels)),
        b_out=(b_out, wide),
    )
    args = (x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, window, shift, eps)
    return _WINDOW.choose(args, _training(args))(*args)


def mlp_block(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    w_in: torch.Tensor,
    b_in: torch.Tensor,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
    *,
    activation: str,
    eps: float,
) -> torch.Tensor:
    """Compute the second half of a Swin layer: a feed-forward block of the normed rows, added to the rows.

    Args:
        x: `[..., C]`, floating.
        norm_weight, norm_bias: `[C]`, the layer norm's; the bias may be None.
        w_in, b_in: `[I, C]`, `[I]`.
        w_out, b_out: `[C, I]`, `[C]`.
        activation: a name that `gelu_mlp` takes.
        eps: added to the variance.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError, TypeError: an unknown activation, or shapes, dtypes or devices that do not match.
        RuntimeError: a forced backend cannot serve.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    wide, inner = (x.shape[-1],), len(w_in)
    _check(
        x,
        norm_weight=(norm_weight, wide),
        norm_bias=(norm_bias, wide),
        w_in=(w_in, (inner, *wide)),
        b_in=(b_in, (inner,)),
        w_out=(w_out, (*wide, inner)),
        b_out=(b_out, wide),
    )
    args = (x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, activation, eps)
    return _MLP.choose(args, _training(args))(*args)
