"""Attention within the windows of an image, shifted cyclically or not (Swin, arXiv:2103.14030).

The image is cut into windows of `window` x `window` positions. With a shift, every window begins `shift` rows and
columns later, and wraps around the edges: a window at the seam then has positions from opposite edges, which are not
neighbours, and SEAM is added to the scores between them.

    scores = q k^T * scale + bias[head] (+ SEAM across the seam)        within a window
    out    = softmax(scores) v

The operator itself gathers positions into windows, scatters them back, and makes the mask. So queries, keys and values
are read where a projection left them, and the result is written where the next layer reads it.
"""

import ctypes

import torch
import torch.nn.functional as F

from clvp_fast.ops.checks import check_same, shape_error, unserved_by_triton
from clvp_fast.ops.dispatch import Implementation, Operator, gradient, needs_grad

# The term that Swin adds to scores between positions that only the shift has brought together.
SEAM = -100.0


def _window_order(height, width, window, shift, device):
    """Return the positions of the image `[height * width]`, as row * width + column, window by window, row by row."""
    places = torch.arange(height * width, device=device).view(height, width).roll((-shift, -shift), (0, 1))
    windows = places.view(height // window, window, width // window, window).transpose(1, 2)
    return windows.reshape(-1)


def _regions(size, window, shift, device):
    """Return the band, 0 to 2, of each row (or column) of the shifted image; different bands are not neighbours."""
    place = torch.arange(size, device=device)
    return (place >= size - window).long() + (place >= size - shift).long()


def seam(height, width, window, shift, device):
    """Tell which positions of a window are from different regions: bool `[windows, window ** 2, window ** 2]`."""
    rows, columns = (_regions(size, window, shift, device) for size in (height, width))
    region = rows[:, None] * 3 + columns
    region = region.view(height // window, window, width // window, window).transpose(1, 2).reshape(-1, window**2)
    return region[:, :, None] != region[:, None, :]


def _gather(x, order):
    """Gather `[batch, height, width, num_heads, head_dim]` in window order: `[batch * places, channels]`."""
    batch, places = x.shape[0], len(order)
    rows = (torch.arange(batch, device=x.device)[:, None] * places + order).view(-1)
    return x.flatten(0, 2).flatten(1).index_select(0, rows)


def _in_windows(x, order, window):
    """Gather `[batch, height, width, num_heads, head_dim]` as `[batch, windows, num_heads, window ** 2, head_dim]`."""
    batch, _, _, num_heads, head_dim = x.shape
    windows = len(order) // window**2
    return _gather(x, order).view(batch, windows, window**2, num_heads, head_dim).transpose(2, 3)


def _in_image(out, order, shape):
    """Invert `_in_windows` for a tensor of `shape`; the result is contiguous."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return _gather(out.transpose(2, 3).reshape(shape), back).view(shape)


def _scored_bias(bias, height, width, window, shift, dtype):
    """Return the term that is added to the scores: `[windows or 1, num_heads, window ** 2, window ** 2]`."""
    bias = bias.to(dtype).contiguous()[None]  # gathered from a table it may be transposed
    if not shift:
        return bias
    return bias + seam(height, width, window, shift, bias.device)[:, None].to(dtype) * SEAM


def _weights(q, k, bias):
    """Compute weights `[batch, windows, num_heads, window ** 2, window ** 2]` in the dtype of the scaled q."""
    scores = q @ k.transpose(-1, -2)
    scores = scores + bias if needs_grad(scores, bias) else scores.add_(bias)
    return scores.softmax(-1)


def _mix(weights, v, dropout_p):
    return (F.dropout(weights, dropout_p) if dropout_p > 0 else weights) @ v


def reference(q, k, v, bias, window, shift, scale, dropout_p=0.0):
    """Compute the formula, step by step, in float32 at least."""
    compute, (batch, height, width, num_heads, head_dim) = torch.promote_types(q.dtype, torch.float32), q.shape

    def windows(x):
        x = x.to(compute).roll((-shift, -shift), (1, 2))
        x = x.reshape(batch, height // window, window, width // window, window, num_heads, head_dim)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 2).flatten(3, 4)

    weights = _weights(windows(q) * scale, windows(k), _scored_bias(bias, height, width, window, shift, compute))
    out = _mix(weights, windows(v), dropout_p)
    out = out.unflatten(1, (height // window, width // window)).unflatten(4, (window, window))
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(q.shape)
    return out.roll((shift, shift), (1, 2)).to(v.dtype)


def _matmul(q, k, v, bias, order, window, scale, dropout_p):
    """Multiply copies in window order, with a softmax between; this is for half types on a CPU.

    SDPA's fused kernel is slower there, and torch copies operands that are not contiguous in any case.
    """
    shape = q.shape
    q, k, v = (_in_windows(x, order, window).contiguous() for x in (q * scale, k, v))
    return _in_image(_mix(_weights(q, k, bias), v, dropout_p), order, shape)


def _sdpa(q, k, v, bias, order, window, scale, dropout_p):
    """Run torch's fused attention, which is fastest on a GPU."""
    shape = q.shape
    q, k, v = (_in_windows(x, order, window) for x in (q, k, v))
    in_windows = q.shape
    if len(bias) > 1:  # With a bias for each window, windows stand beside the heads, so that the batch shares it.
        q, k, v, bias = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias.flatten(0, 1)
    else:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    return _in_image(out.view(in_windows), order, shape)


def _torch(q, k, v, bias, window, shift, scale, dropout_p=0.0):
    on_cpu, half = q.device.type == "cpu", q.dtype in (torch.bfloat16, torch.float16)
    if on_cpu and not half:
        # All threads make rolled and transposed copies, one thread makes gathered ones: that took 1.1 to 1.8 times as
        # long.
        return reference(q, k, v, bias, window, shift, scale, dropout_p)
    height, width = q.shape[1:3]
    order = _window_order(height, width, window, shift, q.device)
    bias = _scored_bias(bias, height, width, window, shift, q.dtype)
    return (_matmul if on_cpu else _sdpa)(q, k, v, bias, order, window, scale, dropout_p)


def _fake(q, k, v, bias, window, shift, scale):
    return v.new_empty(q.shape)


def _native(q, k, v, bias, window, shift, scale):
    """Run csrc/cpu/window_attention.cpp."""
    from clvp_fast import native

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = v.new_empty(q.shape)
    call = native.WindowAttentionCall(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        q.stride()[:4],
        k.stride()[:4],
        v.stride()[:4],
        bias.stride(),
        *q.shape,
        window,
        shift,
        native.number_of(q.dtype),
        native.number_of(bias.dtype),
        scale,
    )
    native.check(native.library().clvp_fast_window_attention_cpu(ctypes.byref(call), torch.get_num_threads(), None))
    return out


def _triton(q, k, v, bias, window, shift, scale):
    """Run kernels/window_attention.py."""
    from clvp_fast.kernels import window_attention as kernels

    out = v.new_empty(q.shape)
    if out.numel():
        kernels.window_attention(q, k, v, bias.contiguous(), window, shift, scale, SEAM, out=out)
    return out


def _why_not_triton(q, k, v, bias, window, shift, scale):
    from clvp_fast.kernels.window_attention import MAX_HEAD_DIM, MAX_WINDOW

    for name, x in (("q", q), ("bias", bias)):
        if reason := unserved_by_triton(name, x.dtype):
            return reason
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, not {q.shape[-1]}"
    if window > MAX_WINDOW:
        return f"window must be at most {MAX_WINDOW}, not {window}"
    return None


def _unserved_type_natively(name, dtype):
    return None if dtype in (torch.bfloat16, torch.float32) else f"{name} must be bfloat16 or float32, not {dtype}"


def unserved_on_cpu(q, bias, window):
    for name, x in (("q", q), ("bias", bias)):
        if reason := _unserved_type_natively(name, x.dtype):
            return reason
    if not 1 <= q.shape[-1] <= 128:
        return f"head_dim must be from 1 to 128, not {q.shape[-1]}"
    return None if window <= 32 else f"window must be at most 32, not {window}"


_OPERATOR = Operator(
    "window_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor bias, int window, int shift, float scale) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations=(
        Implementation("triton", _triton, _why_not_triton, lambda device, dtype: unserved_by_triton("q", dtype)),
        Implementation(
            "cpu",
            _native,
            lambda q, k, v, bias, window, shift, scale: unserved_on_cpu(q, bias, window),
            lambda device, dtype: _unserved_type_natively("q", dtype),
            warns=False,  # a CPU is not expected to have a kernel for every dtype
        ),
        Implementation("torch", _torch),
    ),
)


def check_windows(height: int, width: int, window: int, shift: int) -> None:
    """Raise unless an image can be cut into such windows."""
    if window < 1 or height % window or width % window:
        raise ValueError(f"window must divide the image, {height} x {width}, and {window} does not: pad the image")
    if not 0 <= shift < window:
        raise ValueError(f"shift must be from 0 to window - 1 = {window - 1}, not {shift}")


def _prepare(q, k, v, bias, window, shift, scale) -> float:
    """Check the arguments, and fill in the scale."""
    if q.ndim != 5:
        raise shape_error("q", "[batch, height, width, num_heads, head_dim]", q)
    _, height, width, num_heads, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise shape_error(name, f"that of q, {list(q.shape)}", x)
        check_same(name, x, "q", q)
    check_windows(height, width, window, shift)
    if bias.shape != (num_heads, window**2, window**2):
        raise shape_error("bias", f"[{num_heads}, {window**2}, {window**2}]", bias)
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating, not {bias.dtype}")
    check_same("bias", bias, "q", q, dtype=False)
    return head_dim**-0.5 if scale is None else scale


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *,
    window: int,
    shift: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attend from each position of an image to the positions of its window.

    Args:
        q: `[B, height, width, H, D]`, any strides (a view of a packed projection); float16, bfloat16, float32, float64.
        k, v: the same, of the dtype of `q`.
        bias: `[H, window ** 2, window ** 2]`, floating, added to the scores of each window; positions are counted row
            by row. It is a relative position bias, gathered from its table.
        window: rows and columns of a window; it divides height and width.
        shift: by how many rows and columns the windows are shifted, from 0 to `window - 1`; windows at the seam are
            masked.
        scale: of the scores; default `D ** -0.5`.
        dropout_p: probability of dropping an attention weight (training).

    Returns:
        A contiguous tensor of the shape of `q` and the dtype of `v`; each position is where it was.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not match; a window that does not divide the image.
        RuntimeError: a forced backend cannot serve.
    """
    args = (q, k, v, bias, window, shift, _prepare(q, k, v, bias, window, shift, scale))
    if dropout_p > 0:
        return _OPERATOR.choose(args, "dropout is for training")(*args, dropout_p)
    return _OPERATOR.choose(args, gradient(q, k, v, bias))(*args)


def window_attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *,
    window: int,
    shift: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `window_attention` and also return the attention weights; in plain torch for every backend.

    Returns:
        The output, and the weights before dropout `[B * windows, H, window ** 2, window ** 2]`, in the dtype of `q`:
        window by window in the order of their first positions, row by row.
    """
    scale, shape = _prepare(q, k, v, bias, window, shift, scale), q.shape
    height, width = shape[1:3]
    order = _window_order(height, width, window, shift, q.device)
    q, k, v = (_in_windows(x, order, window) for x in (q, k, v))
    weights = _weights(q * scale, k, _scored_bias(bias, height, width, window, shift, q.dtype))
    return _in_image(_mix(weights, v, dropout_p), order, shape), weights.flatten(0, 1)
