"""Turns callers' clips into rows of one batch: numpy arrays on the host, or tensors on their device.

A clip that was read is float32 or int16 `[time]`: an array on the host, or a tensor on another device. Clips given as
one 2-D tensor on a device stay one.
"""

import logging
import math
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F

from clvp_fast.io.levels import SILENCE_PEAK, wrong_scale

logger = logging.getLogger(__name__)
HOST = torch.device("cpu")
NOT_FINITE = "{} has samples that are NaN or infinite: it was not decoded or scaled well."


def refuse_other_inputs(processor: str, options: dict) -> None:
    """Raise `ValueError` for keywords that are not inputs of a processor, because it would ignore them."""
    for name in ("audios", "raw_speech", "images", "videos"):
        if options.get(name) is not None:
            what = "pass the audio as audio=" if name in ("audios", "raw_speech") else "leave it out"
            raise ValueError(f"{processor} takes text and audio, and nothing called {name}: {what}.")


def check_sampling_rate(extractor: str, expected: int, given: int | None) -> None:
    """Raise `ValueError` for samples of another rate than an extractor's; warn if none is given."""
    if given is None:
        logger.warning(
            "Pass `sampling_rate` to %s: without it, audio that is not at %d Hz gives wrong features silently.",
            extractor,
            expected,
        )
    elif given != expected:
        raise ValueError(
            f"{extractor} takes audio of {expected} Hz, but sampling_rate={given} was given: resample the audio to "
            f"{expected} Hz."
        )


def clip_name(index: int, count: int) -> str:
    """Return the name of a clip in messages."""
    return f"clip {index}" if count > 1 else "the audio"


def read_clips(raw_speech, device: torch.device | None = None):
    """Return the clips of `raw_speech`, and the device to compute on: `device` if given, else the clips' own.

    Raises `ValueError` and `TypeError` for input that is not audio; tensors on several devices need `device`.
    """
    if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
        if raw_speech.ndim > 2:
            raise ValueError(
                f"audio must be mono, [time] or [batch, time], but an array of shape {tuple(raw_speech.shape)} was "
                "given: mix the channels down."
            )
        clips = raw_speech if raw_speech.ndim == 2 else [raw_speech]
    elif not isinstance(raw_speech, (list, tuple)):
        raise TypeError(
            f"audio must be an array, a tensor or a list of samples, not {type(raw_speech).__name__}: load it first."
        )
    else:
        clips = [raw_speech] if raw_speech and all(isinstance(sample, Real) for sample in raw_speech) else raw_speech
    count = len(clips)
    if count == 0:
        raise ValueError("no audio was given: pass at least one clip.")
    device = _one_device(clips, device)
    if device != HOST and isinstance(clips, torch.Tensor):
        _read_tensor(clips[0], clip_name(0, count))
        return _plain(clips.to(device)), device
    clips = [_read_clip(clip, clip_name(index, count), device) for index, clip in enumerate(clips)]
    if any(isinstance(clip, torch.Tensor) for clip in clips):
        clips = [torch.as_tensor(clip, device=device) for clip in clips]
    return clips, device


def _one_device(clips, device: torch.device | None) -> torch.device:
    if device is not None:
        return HOST if device.type == HOST.type else device
    if isinstance(clips, torch.Tensor):
        return clips.device
    devices = {clip.device if isinstance(clip, torch.Tensor) else HOST for clip in clips}
    if len(devices) > 1:
        raise ValueError(
            f"clips lie on several devices, {', '.join(sorted(map(str, devices)))}: pass `device`, where to compute."
        )
    return devices.pop()


def _read_clip(clip, name: str, device: torch.device):
    """Return one clip, checked, and moved to `device` unless it is on the host."""
    if isinstance(clip, torch.Tensor):
        clip = clip.detach()
        if clip.device != HOST and device != HOST:
            return _plain(_read_tensor(clip, name).to(device))
        clip = clip.cpu()
        clip = (clip.float() if clip.is_floating_point() else clip).numpy()
    try:
        samples = np.asarray(clip)
    except ValueError as error:
        raise ValueError(f"{name} is no plain sequence of samples: {error}.") from error
    _check_form(samples, name)
    if samples.dtype == np.int16:
        _tell_level(max(-int(samples.min()), int(samples.max())) / 32768, name)
        return samples
    if not np.issubdtype(samples.dtype, np.floating):
        raise _wrong_type(samples.dtype, name)
    with np.errstate(over="ignore"):
        samples = samples.astype(np.float32, copy=False)
    peak = float(np.maximum(-samples.min(), samples.max()))  # NaN where a sample is NaN
    if not math.isfinite(peak):
        raise ValueError(NOT_FINITE.format(name))
    _tell_level(peak, name)
    return samples


def _tell_level(peak: float, name: str) -> None:
    """Warn of samples with a level that must be a mistake."""
    if reason := wrong_scale(peak):
        logger.warning("%s %s.", name, reason)
    elif peak < SILENCE_PEAK:
        logger.warning("%s is silent: its peak is %.1e of full scale.", name, peak)


def _read_tensor(clip: torch.Tensor, name: str) -> torch.Tensor:
    """Return a clip on a device, without checking its values."""
    _check_form(clip, name)
    if not clip.is_floating_point() and clip.dtype != torch.int16:
        raise _wrong_type(str(clip.dtype).removeprefix("torch."), name)
    return clip


def _plain(clips: torch.Tensor) -> torch.Tensor:
    clips = clips.detach()
    return clips if clips.dtype == torch.int16 else clips.float()


def _check_form(samples, name: str):
    if samples.ndim == 2:
        raise ValueError(f"{name} must be mono, but has shape {tuple(samples.shape)}: mix the channels down to [time].")
    if samples.ndim != 1:
        raise ValueError(f"{name} must be a sequence of samples, but has {samples.ndim} dimensions.")
    if len(samples) == 0:
        raise ValueError(f"{name} is empty: it needs at least one sample.")


def _wrong_type(dtype, name: str) -> TypeError:
    return TypeError(f"{name} has samples of type {dtype}, whose scale is not known: pass floats in [-1, 1] or int16.")


def lengths_of(clips) -> list[int]:
    return [clips.shape[1]] * len(clips) if isinstance(clips, torch.Tensor) else [len(clip) for clip in clips]


def lay_out(clips, held: list[int], lengths: list[int], fill: float, left: bool, device: torch.device) -> torch.Tensor:
    """Lay out rows `[clips, max(lengths)]` on `device`: `held[i]` samples of clip i, filled up to `lengths[i]`.

    The rows are int16 if all clips are and only 0 is filled in, else float32. Samples past `lengths[i]` are `fill` too.
    """
    whole, width = isinstance(clips, torch.Tensor), max(lengths)
    integers = all(map(_is_int16, clips[:1] if whole else clips)) and (fill == 0 or held == lengths)
    fill = 0 if integers else fill
    if whole:
        rows = clips[:, : held[0]] if integers else as_floats(clips[:, : held[0]])
        missing = width - held[0]
        return F.pad(rows, (missing, 0) if left else (0, missing), value=fill) if missing else rows
    if isinstance(clips[0], np.ndarray):
        rows = np.empty((len(clips), width), dtype=np.int16 if integers else np.float32)
    else:
        rows = torch.empty(len(clips), width, dtype=torch.int16 if integers else torch.float32, device=device)
    for row, clip, count, length in zip(rows, clips, held, lengths, strict=True):
        start = length - count if left else 0
        row[:start] = fill
        row[start : start + count] = clip[:count] if integers else as_floats(clip[:count])
        row[start + count :] = fill
    return torch.from_numpy(rows).to(device) if isinstance(rows, np.ndarray) else rows


def _is_int16(samples) -> bool:
    return samples.dtype == (torch.int16 if isinstance(samples, torch.Tensor) else np.int16)


def as_floats(samples):
    """Return samples in [-1, 1], an array or a tensor as before."""
    if not _is_int16(samples):
        return samples
    return (samples.float() if isinstance(samples, torch.Tensor) else samples.astype(np.float32)) / 32768


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Group the indices of clips to compute together: one group, unless padding would take most of the memory."""
    if len(lengths) * max(lengths) <= 4 * sum(lengths):
        return [list(range(len(lengths)))]
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(place)
    return list(groups.values())
