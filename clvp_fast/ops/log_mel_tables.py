"""Tables of a window, filters and norms for the kernel of `log_mel`: made once, without waiting for a device."""

import math

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Tables of a tensor by kind, dtype and stream.
_TABLES = WeakTensorKeyDictionary()
_TWIDDLES: dict[tuple, torch.Tensor] = {}


def table(tensor, dtype, make):
    """Return `make(tensor, dtype)`, kept as long as `tensor` lives and is not written to.

    It is not kept while a CUDA graph is captured, because the graph's replays must see new values, nor for an inference
    tensor, which does not show writes. Each stream has its own tables, so that no stream waits.
    """
    if make is converted and tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    if tensor.is_inference() or _capturing(tensor.device):
        return make(tensor, dtype)
    stream = torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None
    state = tensor._version, tensor.data_ptr()
    tables: dict = _TABLES.setdefault(tensor, {})  # pyright: ignore[reportAssignmentType] - torch's own has no types
    key = make, dtype, stream
    found, made = tables.get(key, (None, None))
    if found != state:
        made = make(tensor, dtype)
        tables[key] = state, made
    return made


def converted(tensor, dtype):
    """Make a contiguous copy in `dtype`."""
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def filters_and_bands(mel_filters, dtype):
    """Make weights `[num_mels, bins]`, and `[num_mels, 2]` int32: a channel's first bin and the one after its last."""
    weights = converted(mel_filters.T, dtype)
    num_bins = weights.shape[1]
    after = torch.arange(1, num_bins + 1, dtype=torch.int32, device=weights.device)
    used = weights != 0
    last = torch.where(used, after, 0).amax(1)
    first = torch.where(used, after - 1, num_bins).amin(1)
    return weights, torch.stack((torch.minimum(first, last), last), 1)


def twiddles(n_fft, dtype, device):
    """Make `[n_fft, 2]`: cosines and negative sines of n_fft angles around the circle, kept for all streams."""
    key = n_fft, dtype, device
    made = _TWIDDLES.get(key)
    if made is None:
        angles = torch.arange(n_fft, dtype=torch.float64, device=device) * (2 * math.pi / n_fft)
        made = torch.stack((angles.cos(), -angles.sin()), 1).to(dtype)
        if not _capturing(device):
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            _TWIDDLES[key] = made
    return made


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
