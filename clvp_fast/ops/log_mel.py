"""Samples to log-mel spectrograms, divided by the channels' norms.

frame[f, i] = samples[reflect(f * hop_length + i - n_fft // 2)] * window[i]          i = 0 .. n_fft - 1
mel[m, f]   = log(max(sum_k mel_filters[k, m] * |DFT(frame[f])[k]|^2, log_floor)) / mel_norms[m]

`reflect` mirrors the signal at its first and last sample, repeatedly if the signal is shorter than the frame. A
signal of n samples has 1 + (n + 2 * (n_fft // 2) - n_fft) // hop_length frames. With `decibels` the logarithm is
10 log10, and values more than `top_db` below the loudest value of a row are raised to that bound, before the division.

A frame that reaches a NaN or infinite sample is NaN in every channel, and does not count for the loudest value; other
frames are not affected. csrc/fourier.h has the kernel for both a CPU (csrc/cpu/log_mel.cpp) and a GPU
(csrc/cuda/log_mel.cu).
"""

import ctypes
import math
import os
from functools import cache

import torch

from clvp_fast.ops.checks import check_same, shape_error
from clvp_fast.ops.dispatch import Implementation, Operator, device_guard, gradient, missing_for_cuda, uncast
from clvp_fast.ops.log_mel_tables import converted, filters_and_bands, table, twiddles

N_FFTS, MAX_MELS = (256, 512, 1024, 2048, 4096), 256
HALVES = (torch.float16, torch.bfloat16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_debug = os.environ.get("CLVP_FAST_DEBUG") == "1"


def reference(
    samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor, decibels, top_db, compute_dtype, dtype
):
    """Compute the formula, each frame gathered and transformed on its own."""
    compute, result = _dtypes(samples, compute_dtype, dtype)
    samples = _scaled(samples, compute)
    (batch, time), n_fft = samples.shape, window.numel()
    lengths = torch.full((batch,), time, device=samples.device) if lengths is None else lengths.long()
    frame = torch.arange(num_frames(time, n_fft, hop_length), device=samples.device)
    place = frame[:, None] * hop_length + torch.arange(n_fft, device=samples.device) - n_fft // 2
    place = _reflect(place, lengths[:, None, None])  # [batch, frames, n_fft]
    framed = samples[torch.arange(batch, device=samples.device)[:, None, None], place]
    power = torch.fft.fft(framed * window.to(compute))[..., : n_fft // 2 + 1].abs().square()
    power = power.masked_fill(~framed.isfinite().all(-1, keepdim=True), torch.nan)
    mel = torch.clamp(power @ mel_filters.to(compute), min=log_floor)
    mel = 10 * torch.log10(mel) if decibels else torch.log(mel)
    past = frame >= num_frames(lengths, n_fft, hop_length)[:, None]
    if top_db is not None:
        for row, skipped in zip(mel, past, strict=True):
            heard = row.masked_fill(skipped[:, None] | row.isnan(), -torch.inf)
            row.clamp_(min=heard.max() - top_db)
    if mel_norms is not None:
        mel = mel / mel_norms.to(compute)
    mel[past] = 0
    return mel.transpose(1, 2).to(result).contiguous()


def _torch(
    samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor, decibels, top_db, compute_dtype, dtype
):
    compute, result = _dtypes(samples, compute_dtype, dtype)
    samples = _scaled(samples, compute)
    time, n_fft = samples.shape[1], window.numel()
    place = torch.arange(time + 2 * (n_fft // 2), device=samples.device) - n_fft // 2
    if lengths is None:
        padded = samples[:, _reflect(place, time)]
    else:
        lengths = lengths.long()
        padded = samples.gather(1, _reflect(place, lengths[:, None]))
    spectrum = torch.stft(padded, n_fft, hop_length, window=window.to(compute), center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # [batch, n_fft // 2 + 1, frames]
    mel = (mel_filters.to(compute).T @ power).clamp(min=log_floor)
    mel = 10 * mel.log10() if decibels else mel.log()
    # Bin 0 is the plain sum of the frame's samples, so it shows every NaN and infinity.
    mel = mel.masked_fill(~spectrum.real[:, :1].isfinite(), torch.nan)
    past = None
    if lengths is not None:
        frame = torch.arange(mel.shape[-1], device=samples.device)
        past = (frame >= num_frames(lengths, n_fft, hop_length)[:, None])[:, None]
    if top_db is not None:
        heard = mel.masked_fill(mel.isnan() if past is None else mel.isnan() | past, -torch.inf)
        mel = torch.maximum(mel, heard.amax((1, 2), keepdim=True) - top_db)
    if mel_norms is not None:
        mel = mel / mel_norms.to(compute)[:, None]
    if past is not None:
        mel = mel.masked_fill(past, 0)
    return mel.to(result)


def _fake(
    samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor, decibels, top_db, compute_dtype, dtype
):
    frames = num_frames(samples.shape[1], window.numel(), hop_length)
    result = _dtypes(samples, compute_dtype, dtype)[1]
    return samples.new_empty((samples.shape[0], mel_filters.shape[1], frames), dtype=result)


def _kernel(
    samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor, decibels, top_db, compute_dtype, dtype
):
    from clvp_fast import native

    compute, result = _dtypes(samples, compute_dtype, dtype)
    (batch, time), n_fft, num_mels = samples.shape, window.numel(), mel_filters.shape[1]
    device, on_cpu = samples.device, samples.device.type == "cpu"
    frames = num_frames(time, n_fft, hop_length)
    # The CPU function does not write half types.
    stored = compute if on_cpu and result in HALVES else result
    features = torch.empty((batch, num_mels, frames), dtype=stored, device=device)

    if samples.dtype not in (torch.int16, torch.float32, compute):
        samples = samples.to(torch.float32)
    if samples.stride(1) != 1 and time > 1:
        samples = samples.contiguous()
    lengths = None if lengths is None else lengths.long().contiguous()
    window = table(window, compute, converted)
    circle = twiddles(n_fft, compute, device)
    filters, bands = table(mel_filters, compute, filters_and_bands)
    norms = None if mel_norms is None else table(mel_norms, compute, converted)
    maxima = None if on_cpu or top_db is None else torch.zeros(batch, 2, dtype=torch.int32, device=device)

    call = native.LogMelCall(
        samples=samples.data_ptr(),
        lengths=None if lengths is None else lengths.data_ptr(),
        window=window.data_ptr(),
        twiddles=circle.data_ptr(),
        mel_filters=filters.data_ptr(),
        bands=bands.data_ptr(),
        mel_norms=None if norms is None else norms.data_ptr(),
        features=features.data_ptr(),
        clip_maxima=None if maxima is None else maxima.data_ptr(),
        batch=batch,
        time=time,
        samples_stride=samples.stride(0),
        hop_length=hop_length,
        frames=frames,
        n_fft=n_fft,
        num_mels=num_mels,
        samples_dtype=native.number_of(samples.dtype),
        compute_dtype=native.number_of(compute),
        features_dtype=native.number_of(stored),
        decibels=decibels,
        log_floor=log_floor,
        top_db=-1.0 if top_db is None else top_db,
    )
    if on_cpu:
        native.check(native.library().clvp_fast_log_mel_cpu(call, torch.get_num_threads(), None))
    else:
        stream = torch.cuda.current_stream().cuda_stream
        native.check(native.library("cuda").clvp_fast_log_mel_cuda(call, stream))
    return features.to(result)


def _why_not(
    samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor, decibels, top_db, compute_dtype, dtype
):
    if window.numel() not in N_FFTS:
        return f"it serves n_fft {', '.join(map(str, N_FFTS))}, not {window.numel()}"
    if mel_filters.shape[1] > MAX_MELS:
        return f"it serves num_mels up to {MAX_MELS}, not {mel_filters.shape[1]}"
    return None


def _why_not_on_gpu(samples, window, *others):
    if reason := _why_not(samples, window, *others):
        return reason
    if reason := _why_not_type_on_gpu(samples.device, _dtypes(samples, *others[-2:])[0]):
        return reason
    return _short_of_memory(window.numel(), samples.device)


def _why_not_type_on_gpu(device, dtype):
    """Return why the kernel does not compute in `dtype`, or None; samples are converted from any dtype."""
    return "on a GPU it computes in float32, not in float64" if dtype == torch.float64 else None


@cache
def _short_of_memory(n_fft, device):
    """Return why a block of a CUDA device has too little shared memory for the kernel, or None."""
    from clvp_fast import native

    told = ctypes.create_string_buffer(256)
    with device_guard(device):
        lacks = native.library("cuda").clvp_fast_log_mel_cuda_missing(n_fft, told, len(told))
    return f"n_fft {n_fft} is too long for this device: {told.value.decode()}" if lacks else None


def _missing_on_gpu(device):
    if device.type not in ("cpu", "cuda"):
        return f"the kernel needs a CPU or an NVIDIA GPU, not a {device.type} device"
    return missing_for_cuda(device)


def num_frames(time, n_fft, hop_length):
    """Return the number of frames of `time` samples, an integer or a tensor of integers."""
    return (time + 2 * (n_fft // 2) - n_fft) // hop_length + 1


def _reflect(place, length):
    """Fold `place` into 0 .. length - 1 by mirroring at both ends; `length` is an integer or broadcasts."""
    period = 2 * (length - 1)
    period = period.clamp(min=1) if isinstance(length, torch.Tensor) else max(period, 1)
    place = place.remainder(period)
    return torch.minimum(place, period - place)


def _dtypes(samples, compute_dtype, dtype):
    """Return the dtypes of arithmetic and result."""
    compute = compute_dtype or (torch.float64 if samples.dtype == torch.float64 else torch.float32)
    return compute, dtype or compute


def _scaled(samples, compute):
    return samples.to(compute) / 32768 if samples.dtype == torch.int16 else samples.to(compute)


_OPERATOR = Operator(
    "log_mel",
    "(Tensor samples, Tensor window, Tensor mel_filters, int hop_length, Tensor? lengths, Tensor? mel_norms, "
    "float log_floor, bool decibels, float? top_db, ScalarType? compute_dtype, ScalarType? dtype) -> Tensor",
    reference=reference,
    fake=_fake,
    implementations=(
        Implementation("cuda", _kernel, _why_not_on_gpu, _why_not_type_on_gpu, missing=_missing_on_gpu),
        Implementation("cpu", _kernel, _why_not),
        Implementation("torch", _torch),
    ),
)


def log_mel(
    samples: torch.Tensor,
    *,
    window: torch.Tensor,
    mel_filters: torch.Tensor,
    hop_length: int,
    lengths: torch.Tensor | None = None,
    mel_norms: torch.Tensor | None = None,
    log_floor: float = 1e-5,
    decibels: bool = False,
    top_db: float | None = None,
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute log-mel spectrograms of a batch of signals.

    Args:
        samples: `[batch, time]`; floating, or int16, which is divided by 32768. All tensors lie on one device.
        window: `[n_fft]`, floating; n_fft is the length of a frame and of its transform.
        mel_filters: `[n_fft // 2 + 1, num_mels]`, floating: the weights of the power spectrum. A channel without
            weights is `log(log_floor)` in every frame.
        hop_length: samples from one frame to the next.
        lengths: `[batch]`, integer: the number of valid samples of each row, 1 to time. Later samples are not read, and
            frames after a row's last one are 0. None: all samples are valid.
        mel_norms: `[num_mels]`, floating: the divisors of the channels. None: no division.
        log_floor: the least mel power; smaller values are raised to it.
        decibels: use 10 times the decimal logarithm instead of the natural one.
        top_db: with `decibels`: values more than this below the loudest value of a row's valid frames are raised to
            that bound, before the division by `mel_norms`. None: no bound.
        compute_dtype: dtype of the arithmetic, float32 or float64; by default float64 for float64 samples, else
            float32.
        dtype: dtype of the result: float32, float16, bfloat16, or float64 with `compute_dtype` float64; by default
            `compute_dtype`.

    The kernel keeps tables derived from window, filters and norms for as long as these live. It notices when torch
    writes to them, but not a write through an array that shares their memory.

    Returns:
        `[batch, num_mels, frames]`, contiguous. A frame that reaches a NaN or infinite sample is NaN in every channel.

    Raises:
        ValueError: shapes that do not fit together, more than one channel, no sample, no mel channel, tensors on
            several devices, a hop below 1, a floor that is not positive, `top_db` that is negative or without
            `decibels`; on a CPU, or in debug mode (`CLVP_FAST_DEBUG=1`; it waits for the device), a length that is not
            in 1 to time. On a GPU the kernel takes the nearest length that is.
        TypeError: dtypes other than those above.
    """
    if samples.dtype != torch.int16 and not samples.is_floating_point():
        raise TypeError(f"samples must be floating or int16, not {samples.dtype}")
    if samples.ndim != 2 or samples.shape[1] == 0:
        raise shape_error("samples", "[batch, time] (mono) with time > 0", samples)
    if window.ndim != 1 or window.numel() < 2:
        raise shape_error("window", "[n_fft] with n_fft > 1", window)
    bins = window.numel() // 2 + 1
    if mel_filters.ndim != 2 or mel_filters.shape[0] != bins or mel_filters.shape[1] == 0:
        raise shape_error("mel_filters", f"[n_fft // 2 + 1 = {bins}, num_mels] with num_mels > 0", mel_filters)
    if mel_norms is not None and mel_norms.shape != mel_filters.shape[1:]:
        raise shape_error("mel_norms", f"[num_mels = {mel_filters.shape[1]}]", mel_norms)
    if lengths is not None and lengths.shape != samples.shape[:1]:
        raise shape_error("lengths", f"[batch = {samples.shape[0]}]", lengths)
    for name, tensor in (("window", window), ("mel_filters", mel_filters), ("mel_norms", mel_norms)):
        if tensor is not None:
            check_same(name, tensor, "samples", samples, dtype=False)
            if not tensor.is_floating_point():
                raise TypeError(f"{name} must be floating, not {tensor.dtype}")
    compute, result = _dtypes(samples, compute_dtype, dtype)
    _check_settings(hop_length, log_floor, decibels, top_db, compute, result)
    if lengths is not None:
        _check_lengths(lengths, samples)
    grad = gradient(samples, window, mel_filters, mel_norms)
    args = (samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor, decibels, top_db, compute, result)
    if samples.shape[0] == 0:
        return _fake(*args)
    with uncast(samples.device):  # the power of a spectrum exceeds the range of half types
        return _OPERATOR.choose(args, grad)(*args)


def _check_settings(hop_length, log_floor, decibels, top_db, compute, result):
    if hop_length < 1:
        raise ValueError(f"hop_length must be at least 1, not {hop_length}")
    if compute not in (torch.float32, torch.float64):
        raise TypeError(f"compute_dtype must be float32 or float64, not {compute}")
    if result not in (torch.float32, *HALVES, compute):
        raise TypeError(f"dtype must be float32, float16, bfloat16 or compute_dtype, {compute}, not {result}")
    if not torch.finfo(compute).tiny <= log_floor < math.inf:
        raise ValueError(f"log_floor must be positive and a normal number of {compute}, not {log_floor}")
    if top_db is not None and not decibels:
        raise ValueError("top_db belongs to decibels=True: give both, or neither")
    if top_db is not None and not top_db >= 0:
        raise ValueError(f"top_db must be 0 or more, not {top_db}")


def _check_lengths(lengths, samples):
    check_same("lengths", lengths, "samples", samples, dtype=False)
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"lengths must be integers, not {lengths.dtype}")
    if (lengths.device.type == "cpu" or _debug) and not torch.compiler.is_compiling():
        time = samples.shape[1]
        for row, length in enumerate(lengths.tolist()):
            if not 1 <= length <= time:
                raise ValueError(f"lengths[{row}] must be from 1 to {time}, not {length}")
