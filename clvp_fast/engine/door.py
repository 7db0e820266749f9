"""What a request brings, looked at once: its text as ids, and its recordings as clips of samples and their rate."""

from pathlib import Path

import numpy as np
import torch

from clvp_fast.audio import load_audio
from clvp_fast.checkpoint import sayable_ids, text_limit
from clvp_fast.engine.requests import CandidateRequest


def ids_of_text(request: CandidateRequest, model, processor) -> torch.Tensor:
    """The ids int64 `[length]` of a request's text, or those that it brings; ValueError for what `model` cannot say."""
    if request.input_ids is None:
        return torch.tensor(sayable_ids(model, processor.tokenizer, request.text))
    ids = _whole_numbers(request.input_ids)
    limit, vocab_size = text_limit(model), model.config.text_config.vocab_size
    if not 0 < len(ids) <= limit:
        raise ValueError(f"input_ids are {len(ids)}, and this checkpoint takes 1 to {limit}; split the text up")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"input_ids must lie from 0 to {vocab_size - 1}, not {ids.min()} to {ids.max()}")
    return ids


def clips_of(request: CandidateRequest, own_rate: int) -> tuple[list, int]:
    """Clips of samples and their rate: of paths, of datasets' `{"array", "sampling_rate"}`, or as they are."""
    audio, clips = request.audio, []
    if isinstance(audio, (list, tuple)) and not audio:
        raise ValueError("a voice needs at least one clip")
    for clip in audio if isinstance(audio, (list, tuple)) and any(map(_is_clip, audio)) else [audio]:
        rate = request.sampling_rate
        if isinstance(clip, (str, Path)):
            rate = own_rate
            clip, _ = load_audio(clip, rate)
        elif isinstance(clip, dict):
            if not {"array", "sampling_rate"} <= clip.keys():
                raise TypeError(f"audio as a dict needs 'array' and 'sampling_rate', and has {[*clip][:5]}")
            clip, rate = clip["array"], clip["sampling_rate"]
            if request.sampling_rate not in (None, rate):
                raise ValueError(f"sampling_rate={request.sampling_rate} is not the {rate!r} Hz that the clip says")
        elif isinstance(clip, (bytes, bytearray, memoryview)):
            raise TypeError(
                f"audio must be samples, a path, or a dict of 'array' and 'sampling_rate', not {type(clip).__name__}"
            )
        if rate is None:
            raise ValueError("audio needs its sampling_rate, in Hz")
        clips.append((clip, rate))
    if len(rates := {rate for _, rate in clips}) > 1:
        raise ValueError(f"the clips of one voice need one sampling_rate, not {sorted(rates)}")
    return [clip for clip, _ in clips], rates.pop()


def _whole_numbers(ids) -> torch.Tensor:
    """`ids` of any integer dtype as int64 `[length]` on the host; ValueError for whatever else."""
    try:
        array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    except (TypeError, ValueError, RuntimeError):
        array = None
    if array is None or array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        found = type(ids).__name__ if array is None or array.dtype == object else f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"input_ids must be whole numbers [length], not {found}")
    if array.size and array.max() >= 2**63:
        raise ValueError(f"input_ids must be token ids, not {array.max()}")
    return torch.from_numpy(array.astype(np.int64))


def _is_clip(value) -> bool:
    """Whether a member of a list is a clip of its own, and no sample."""
    return isinstance(value, (str, Path, dict, bytes)) or np.ndim(value) > 0
