"""One or two linear layers of many rows on a CPU (csrc/cpu/mlp.cpp), with a norm before them; few rows work too."""

import ctypes
from functools import cache
from pathlib import Path

import torch

from clvp_fast.ops.checks import as_rows, unserved_natively

# Packing the weights pays beyond this number of rows (benchmarks/linear.py).
FEW_ROWS = 512
# Weights are read in steps of this number of columns.
COLUMNS = 32
ACTIVATIONS = {None: 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2}
# The number of rows that a thread computes at a time: many enough to reuse the weights that it reads, and few enough to
# keep the values between two layers in its cache.
_ITEM_ROWS = 128
# The most rows of a tile of sums.
_TILE_ROWS = 8


def are_many(x: torch.Tensor) -> bool:
    """Tell whether `x`, `[..., columns]`, has more than FEW_ROWS rows."""
    return x.numel() > FEW_ROWS * x.shape[-1]


@cache
def has_matrix_unit() -> bool:
    """Tell whether this CPU multiplies matrices of bfloat16 in hardware (AMX), which torch's products use."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def unserved_type(device, dtype, int8=False):
    """Return why the kernels of linear layers do not take x of `dtype` on this CPU (with `int8` weights), or None."""
    from clvp_fast import native

    if native.isa() == "portable":
        return "torch's own products serve a CPU that has neither AVX2 nor AVX-512"
    if reason := unserved_natively(device, dtype):
        return reason
    if dtype == torch.bfloat16 and not int8 and has_matrix_unit():
        return "this CPU has a matrix unit for bfloat16, which torch's own products use"
    return None


def unserved_layout(weight: torch.Tensor) -> str | None:
    """Return why the products of csrc/cpu do not read `weight` `[out, in]`, for any number of rows of x, or None."""
    shape, strides = list(weight.shape), weight.stride()
    if shape[1] % COLUMNS or shape[1] == 0 or strides[1] != 1:
        return f"it serves rows of {COLUMNS} n columns, side by side in memory, not {shape}, {strides}"
    return None


def unserved(x, activation, *weights):
    """Return why `layers` does not serve, or None. `weights` are those of one layer or of two, in its order."""
    if reason := unserved_type(x.device, x.dtype):
        return reason
    for weight in weights:
        if weight.dtype != x.dtype:
            return f"it serves many rows with weights of the dtype of x, {x.dtype}, not {weight.dtype}"
        if reason := unserved_layout(weight):
            return reason
    return None if activation in ACTIVATIONS else f"activation must be one of {tuple(ACTIVATIONS)}, not {activation!r}"


def layers(x, w_in, b_in, w_out, b_out, residual, activation, gated=False, layer_norm=(None, None, 0.0)):
    """Compute two layers, `activation(x w_in^T + b_in) w_out^T + b_out + residual`; without w_out the first + residual.

    gated: the second layer's input is the first half of `x w_in^T + b_in` times the activation of the second half.
    layer_norm: weight, bias and eps of a norm that is applied to x first; without a weight there is none.

    `unserved` has checked the arguments. The result has the dtype of the residual, or of `x` without one.
    """
    from clvp_fast import native

    outs = len(w_in if w_out is None else w_out)
    out = x.new_empty((*x.shape[:-1], outs), dtype=x.dtype if residual is None else residual.dtype)
    rows, threads = as_rows(x), torch.get_num_threads()
    *norm, eps = layer_norm
    b_in, b_out, residual, *norm = (None if t is None else t.contiguous() for t in (b_in, b_out, residual, *norm))
    # Four items per thread, so that no thread waits long for the others.
    item_rows = -(-len(rows) // (4 * threads * _TILE_ROWS)) * _TILE_ROWS
    call = native.MlpCall(
        *(None if t is None else t.data_ptr() for t in (rows, w_in, b_in, w_out, b_out, residual, out)),
        rows.stride(0),
        w_in.stride(0),
        0 if w_out is None else w_out.stride(0),
        len(rows),
        w_in.shape[1],
        len(w_in) if w_out is None else w_out.shape[1],
        outs,
        native.number_of(x.dtype),
        native.number_of(out.dtype),
        ACTIVATIONS[activation],
        min(item_rows, _ITEM_ROWS),
        gated,
        *(None if t is None else t.data_ptr() for t in norm),
        eps,
    )
    native.check(native.library().clvp_fast_mlp_cpu(ctypes.byref(call), threads, None))
    return out
