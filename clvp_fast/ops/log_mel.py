"""Samples to log-mel spectrograms, divided by the channels' norms.

frame[f, i] = samples[reflect(f * hop_length + i - n_fft // 2)] * window[i]          i = 0 .. n_fft - 1
mel[m, f]   = log(max(sum_k mel_filters[k, m] * |DFT(frame[f])[k]|^2, log_floor)) / mel_norms[m]

`reflect` mirrors the signal at its first and last sample, again and again where the signal is shorter than the frame.
A signal of n samples has 1 + (n + 2 * (n_fft // 2) - n_fft) // hop_length frames.
"""

import torch

from clvp_fast.ops.dispatch import Operator, check_same, needs_grad, shape_error


def reference(samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor):
    """The formula, each frame gathered and transformed on its own."""
    samples = _scaled(samples)
    (batch, time), n_fft = samples.shape, window.numel()
    if lengths is None:
        lengths = torch.full((batch,), time, device=samples.device)
    frame = torch.arange(_num_frames(time, n_fft, hop_length), device=samples.device)
    place = frame[:, None] * hop_length + torch.arange(n_fft, device=samples.device) - n_fft // 2
    place = _reflect(place, lengths[:, None, None])  # [batch, frames, n_fft]
    framed = samples[torch.arange(batch, device=samples.device)[:, None, None], place] * window.to(samples.dtype)
    power = torch.fft.fft(framed)[..., : n_fft // 2 + 1].abs().square()
    mel = torch.log(torch.clamp(power @ mel_filters.to(power.dtype), min=log_floor))
    if mel_norms is not None:
        mel = mel / mel_norms.to(mel.dtype)
    mel[frame >= _num_frames(lengths, n_fft, hop_length)[:, None]] = 0
    return mel.transpose(1, 2).contiguous()


def _torch(samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor):
    samples = _scaled(samples)
    time, n_fft = samples.shape[1], window.numel()
    place = torch.arange(time + 2 * (n_fft // 2), device=samples.device) - n_fft // 2
    if lengths is None:
        padded = samples[:, _reflect(place, time)]
    else:
        padded = samples.gather(1, _reflect(place, lengths[:, None]))
    window = window.to(samples.dtype)
    spectrum = torch.stft(padded, n_fft, hop_length, window=window, center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # [batch, n_fft // 2 + 1, frames]
    mel = (mel_filters.to(power.dtype).T @ power).clamp(min=log_floor).log()
    if mel_norms is not None:
        mel = mel / mel_norms.to(mel.dtype)[:, None]
    if lengths is not None:
        frame = torch.arange(mel.shape[-1], device=samples.device)
        mel = mel.masked_fill((frame >= _num_frames(lengths, n_fft, hop_length)[:, None])[:, None], 0)
    return mel


def _fake(samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor):
    frames = _num_frames(samples.shape[1], window.numel(), hop_length)
    return samples.new_empty((samples.shape[0], mel_filters.shape[1], frames), dtype=_result_dtype(samples))


def _num_frames(time, n_fft, hop_length):
    """Frames of `time` samples, an integer or a tensor of them."""
    return (time + 2 * (n_fft // 2) - n_fft) // hop_length + 1


def _reflect(place, length):
    """`place` folded into 0 .. length - 1 by mirroring at both ends; `length` is an integer or broadcasts."""
    period = 2 * (length - 1)
    period = period.clamp(min=1) if isinstance(length, torch.Tensor) else max(period, 1)
    place = place.remainder(period)
    return torch.minimum(place, period - place)


def _result_dtype(samples):
    return torch.float64 if samples.dtype == torch.float64 else torch.float32


def _scaled(samples):
    return samples.float() / 32768 if samples.dtype == torch.int16 else samples.to(_result_dtype(samples))


_OPERATOR = Operator(
    "log_mel",
    "(Tensor samples, Tensor window, Tensor mel_filters, int hop_length, Tensor? lengths, Tensor? mel_norms, "
    "float log_floor) -> Tensor",
    reference=reference,
    torch_path=_torch,
    fake=_fake,
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
) -> torch.Tensor:
    """Log-mel spectrograms of a batch of signals.

    Args:
        samples: `[batch, time]`; floating, or int16, which is divided by 32768. All tensors lie on one device.
        window: `[n_fft]`, floating; n_fft is the length of a frame and of its transform.
        mel_filters: `[n_fft // 2 + 1, num_mels]`, floating: the weights of the power spectrum.
        hop_length: samples from one frame to the next.
        lengths: `[batch]`, integer: the true samples of each row, 1 to time. What follows them is not read, and frames
            past a row's own last one are 0. None: all rows are full.
        mel_norms: `[num_mels]`, floating: what the channels are divided by. None: nothing.
        log_floor: mel power below this is raised to it.

    Returns:
        `[batch, num_mels, frames]`, contiguous; float64 for float64 samples, else float32.

    Raises:
        ValueError: shapes that do not fit together, no sample, a hop below 1, tensors on several devices.
        TypeError: samples that are neither floating nor int16.
    """
    if samples.dtype != torch.int16 and not samples.is_floating_point():
        raise TypeError(f"samples must be floating or int16, not {samples.dtype}")
    if samples.ndim != 2 or samples.shape[1] == 0:
        raise shape_error("samples", "[batch, time] with time > 0", samples)
    if window.ndim != 1 or window.numel() < 2:
        raise shape_error("window", "[n_fft] with n_fft > 1", window)
    bins = window.numel() // 2 + 1
    if mel_filters.ndim != 2 or mel_filters.shape[0] != bins:
        raise shape_error("mel_filters", f"[n_fft // 2 + 1 = {bins}, num_mels]", mel_filters)
    if mel_norms is not None and mel_norms.shape != mel_filters.shape[1:]:
        raise shape_error("mel_norms", f"[num_mels = {mel_filters.shape[1]}]", mel_norms)
    if lengths is not None and lengths.shape != samples.shape[:1]:
        raise shape_error("lengths", f"[batch = {samples.shape[0]}]", lengths)
    if hop_length < 1:
        raise ValueError(f"hop_length must be at least 1, not {hop_length}")
    for name, tensor in (
        ("window", window),
        ("mel_filters", mel_filters),
        ("lengths", lengths),
        ("mel_norms", mel_norms),
    ):
        if tensor is not None:
            check_same(name, tensor, "samples", samples, dtype=False)
    grad = "an input requires grad" if needs_grad(samples, window, mel_filters, mel_norms) else None
    args = (samples, window, mel_filters, hop_length, lengths, mel_norms, log_floor)
    return _OPERATOR.choose(args, grad)(*args)
