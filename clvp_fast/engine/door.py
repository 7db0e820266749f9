"""The door of the engine: it checks a request once, before the request takes part in a step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from clvp_fast.audio import load_audio
from clvp_fast.checkpoint import sayable_ids, text_limit
from clvp_fast.engine.decode_loop import Job
from clvp_fast.engine.requests import CandidateRequest, check_rate
from clvp_fast.engine.sampling_params import SamplingParams
from clvp_fast.engine.voice_files import is_latents, latent_voice
from clvp_fast.engine.voices import Voice, VoiceCache
from clvp_fast.models.clvp.modeling import ClvpModelForConditionalGeneration
from clvp_fast.models.clvp.tokens import most_codes, stop_token
from clvp_fast.models.common.plain import PlainModel


def token_limit(model: ClvpModelForConditionalGeneration) -> int:
    """Return the default `max_new_tokens`: Tortoise's, or less if the checkpoint has fewer positions."""
    return min(SamplingParams.max_new_tokens, most_codes(model.config.decoder_config))


class Door:
    """Check requests against a checkpoint, and turn them into the decoder's jobs. For one thread at a time.

    Args:
        model, processor: the checkpoint's.
        text_ends: how many end tokens a prompt has after its text.

    Raises:
        ValueError: a model with hooks, adapters or replaced modules, which the engine would not call.
    """

    def __init__(self, model, processor, text_ends: int = 2):
        self.model, self.processor, self._text_ends = model, processor, text_ends
        self._plain = PlainModel(model)
        self.voices = VoiceCache(model, processor.feature_extractor)

    def refresh(self) -> None:
        """Read the model as it is now, and forget the voices made before. Raises as the constructor."""
        self._plain = PlainModel(self.model)
        self.voices.clear()

    @torch.inference_mode()
    def admit(self, request: CandidateRequest, sampling: SamplingParams, place: int) -> tuple[torch.Tensor, Job]:
        """Return a request's text ids int64 `[length]` on the host, and the job of decoding it.

        Args:
            sampling: parameters for a request that has none of its own.
            place: how many requests of its call came before it.

        Raises:
            Exception: any exception belongs to this request. `ValueError` and `TypeError` say in a sentence what to do.
        """
        if not isinstance(request, CandidateRequest):
            found = type(request).__name__
            raise TypeError(f"a request must be a CandidateRequest, and number {place} (from 0) is {found}")
        self._plain.check()
        text_ids = ids_of_text(request, self.model, self.processor)
        return text_ids, Job(self.prompt(request, text_ids), self._settings(request.sampling or sampling))

    def prompt(self, request: CandidateRequest, text_ids: torch.Tensor) -> torch.Tensor:
        """Return the prompt `[1 + text, hidden_size]` that the candidates continue, without the start token."""
        encoder = self.model.conditioning_encoder
        text, _ = encoder.prompt_text(text_ids[None].to(self.model.device), num_ends=self._text_ends)
        return encoder.join(self.voices.conditioning(self.voice(request)), text)[0]

    def voice(self, request: CandidateRequest) -> Voice:
        """Return the voice of a request, from the cache where it is known."""
        if (conditioning := request.conditioning) is not None:
            if isinstance(conditioning, (str, Path)):
                if is_latents(conditioning):
                    return latent_voice(self.voices, conditioning)
                return Voice.load(conditioning)
            return conditioning if isinstance(conditioning, Voice) else self.voices.from_vector(conditioning)
        if request.input_features is not None:
            return self.voices.from_features(request.input_features)
        clips, rate = clips_of(request, self.processor.feature_extractor.sampling_rate)
        return self.voices.from_clips(clips, rate, request.crop_seed)

    def _settings(self, sampling: SamplingParams) -> SamplingParams:
        """Return `sampling` with a seed and a stop token filled in."""
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if sampling.seed is None else sampling.seed
        decoder = self.model.config.decoder_config
        # The decoder's stop token, even if a generation config names the text's.
        stop = stop_token(decoder) if sampling.stop_token is None else sampling.stop_token
        if stop < 0:
            raise ValueError(
                "the decoder's eos_token_id, which ends a candidate, is None: set it, or give a stop_token"
            )
        if stop >= decoder.vocab_size:
            raise ValueError(f"stop_token={stop} is not a token of the checkpoint, which has {decoder.vocab_size}")
        return replace(sampling, seed=seed, stop_token=stop)


def ids_of_text(request: CandidateRequest, model, processor) -> torch.Tensor:
    """Return the ids int64 `[length]` of a request's text, or its own; raise ValueError for ids that `model` lacks."""
    if request.text is not None:
        return torch.tensor(sayable_ids(model, processor.tokenizer, request.text), device="cpu")
    ids = _whole_numbers(request.input_ids)
    limit, vocab_size = text_limit(model), model.config.text_config.vocab_size
    if not 0 < len(ids) <= limit:
        raise ValueError(f"input_ids are {len(ids)}, and this checkpoint takes 1 to {limit}; split the text up")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"input_ids must lie from 0 to {vocab_size - 1}, not {ids.min()} to {ids.max()}")
    return ids


def clips_of(request: CandidateRequest, own_rate: int) -> tuple[list, int]:
    """Return clips and their sampling rate, from paths, datasets' `{"array", "sampling_rate"}` or samples."""
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
            check_rate(rate)
            if request.sampling_rate not in (None, rate):
                raise ValueError(f"sampling_rate={request.sampling_rate} is not the {rate} Hz that the clip says")
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
    """Return `ids` of any integer dtype as int64 `[length]` on the host; raise ValueError for anything else."""
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
    """Tell whether a member of a list is a whole clip, and not one sample."""
    return isinstance(value, (str, Path, dict, bytes)) or np.ndim(value) > 0
