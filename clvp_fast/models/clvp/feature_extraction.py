"""`ClvpFeatureExtractor`: voice clips to the normalised log-mel spectrograms that condition CLVP."""

import logging
from functools import cache
from numbers import Real

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, window_function
from transformers.utils import PaddingStrategy

from clvp_fast.ops.log_mel import log_mel

logger = logging.getLogger(__name__)


class ClvpFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrograms (Hann window, HTK mel scale up to 8 kHz, slaney area norm, power 2) of mono speech.

    Args:
        feature_size: mel channels.
        sampling_rate: of the samples, in Hz.
        default_audio_length: seconds to which a clip is cut or padded where a call gives no `max_length`.
        hop_length: samples from one frame to the next.
        chunk_length: seconds; sets `n_samples` and `nb_max_frames`, and changes no feature.
        n_fft: samples of a frame and of its Fourier transform.
        padding_value: the sample value that fills short clips up.
        mel_norms: `feature_size` numbers that the log-mel channels are divided by.
        return_attention_mask: what a call does that passes `return_attention_mask=None`.
    """

    model_input_names = ["input_features", "attention_mask"]  # noqa: RUF012 (the base class's declaration)

    def __init__(
        self,
        feature_size=80,
        sampling_rate=22050,
        default_audio_length=6,
        hop_length=256,
        chunk_length=30,
        n_fft=1024,
        padding_value=0.0,
        mel_norms=None,
        return_attention_mask=False,
        **kwargs,
    ):
        if mel_norms is not None and len(mel_norms) != feature_size:
            raise ValueError(
                f"mel_norms has {len(mel_norms)} values, but feature_size is {feature_size}: they must agree."
            )
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.chunk_length = chunk_length
        self.n_samples = chunk_length * sampling_rate
        self.nb_max_frames = self.n_samples // hop_length
        self.default_audio_length = default_audio_length
        self.mel_norms = mel_norms
        self.mel_filters = mel_filter_bank(
            num_frequency_bins=n_fft // 2 + 1,
            num_mel_filters=feature_size,
            min_frequency=0.0,
            max_frequency=8000.0,
            sampling_rate=sampling_rate,
            norm="slaney",
            mel_scale="htk",
        )

    def __call__(
        self,
        raw_speech,
        sampling_rate: int | None = None,
        truncation: bool = True,
        pad_to_multiple_of: int | None = None,
        return_tensors=None,
        return_attention_mask: bool | None = True,
        padding="max_length",
        max_length: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Extract the features of one clip or a batch; by default each is cut or padded to `default_audio_length`.

        Args:
            raw_speech: mono samples: one clip as a 1-D array, tensor or list of floats, or a batch as a 2-D
                `[batch, time]` array or tensor or a list of clips. Floats lie in [-1, 1]; int16 is scaled to that.
            sampling_rate: of `raw_speech`, in Hz: pass it, so that a wrong one is an error and not a wrong result.
            truncation: cut clips longer than `max_length`.
            pad_to_multiple_of: round the lengths to which clips are cut and padded up to a multiple of this.
            return_tensors: "pt", "np", or None for a list of numpy arrays.
            return_attention_mask: return which samples (not frames) are speech and which padding, 1 and 0.
            padding: "max_length", "longest" or True (the longest clip given), "do_not_pad" or False.
            max_length: in samples; `default_audio_length` seconds if None.
            padding_value: in place of the extractor's own.

        Returns:
            `input_features`, float32, `[num_mels, 1 + samples // hop_length]` for each clip, and `attention_mask`,
            int32, `[samples]`.

        Raises:
            ValueError: another sampling rate than the extractor's; no audio, an empty clip, NaN or infinite samples,
                more than one channel; lengths that differ where `return_tensors` needs one.
            TypeError: samples that are neither floats nor int16.
        """
        self._check_sampling_rate(sampling_rate)
        padding_value = kwargs.pop("padding_value", self.padding_value)
        if kwargs:
            logger.warning("%s does not know and ignores: %s.", type(self).__name__, ", ".join(sorted(kwargs)))

        clips = _read_clips(raw_speech)
        limit = self.default_audio_length * self.sampling_rate if max_length is None else max_length
        if limit < 1:
            raise ValueError(f"max_length must be at least 1 sample, not {limit}.")
        limit = _round_up(limit, pad_to_multiple_of)
        if truncation:
            clips = [clip[:limit] for clip in clips]
        masks = [np.ones(len(clip), dtype=np.int32) for clip in clips]
        strategy = _padding_strategy(padding)
        if strategy is not PaddingStrategy.DO_NOT_PAD:
            if strategy is PaddingStrategy.LONGEST:
                limit = _round_up(max(map(len, clips)), pad_to_multiple_of)
            clips = [self._pad_to(clip, limit, padding_value) for clip in clips]
            masks = [self._pad_to(mask, limit, 0) for mask in masks]

        same_length = len({len(clip) for clip in clips}) == 1
        if return_tensors is not None and not same_length:
            raise ValueError(
                f"clips of {min(map(len, clips))} to {max(map(len, clips))} samples do not fit into one tensor: pass "
                "padding=True, or return_tensors=None for a list."
            )
        if same_length:
            outputs = {"input_features": list(self._extract(np.stack(clips))), "attention_mask": np.stack(masks)}
        else:
            outputs = {"input_features": [self._extract(clip[None])[0] for clip in clips], "attention_mask": masks}
        if not (self.return_attention_mask if return_attention_mask is None else return_attention_mask):
            del outputs["attention_mask"]
        return BatchFeature(outputs, tensor_type=return_tensors)

    def _extract(self, samples: np.ndarray) -> np.ndarray:
        """float32 samples `[batch, time]` to features `[batch, num_mels, frames]`."""
        # In float64, as a quiet channel beside a loud one has too few digits left in a float32 transform.
        features = log_mel(
            torch.from_numpy(samples).double(),
            window=_hann_window(self.n_fft),
            mel_filters=torch.as_tensor(self.mel_filters, dtype=torch.float64),
            hop_length=self.hop_length,
            mel_norms=None if self.mel_norms is None else torch.as_tensor(self.mel_norms, dtype=torch.float64),
        )
        return features.float().numpy()

    def _pad_to(self, values: np.ndarray, length: int, fill: float) -> np.ndarray:
        missing = max(length - len(values), 0)
        return np.pad(values, (missing, 0) if self.padding_side == "left" else (0, missing), constant_values=fill)

    def _check_sampling_rate(self, sampling_rate: int | None):
        if sampling_rate is None:
            logger.warning(
                "Pass `sampling_rate` to %s: without it, audio that is not at %d Hz gives wrong features silently.",
                type(self).__name__,
                self.sampling_rate,
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"{type(self).__name__} takes audio of {self.sampling_rate} Hz, but sampling_rate={sampling_rate} was "
                f"given: resample the audio to {self.sampling_rate} Hz."
            )


@cache
def _hann_window(n_fft: int) -> torch.Tensor:
    return torch.from_numpy(window_function(n_fft, "hann"))


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def _padding_strategy(padding) -> PaddingStrategy:
    if isinstance(padding, bool):
        return PaddingStrategy.LONGEST if padding else PaddingStrategy.DO_NOT_PAD
    return PaddingStrategy(padding)


def _read_clips(raw_speech) -> list[np.ndarray]:
    """The clips of `raw_speech`, each one float32 `[time]`."""
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
    if len(clips) == 0:
        raise ValueError("no audio was given: pass at least one clip.")
    return [_read_clip(clip, f"clip {index}" if len(clips) > 1 else "the audio") for index, clip in enumerate(clips)]


def _read_clip(clip, name: str) -> np.ndarray:
    """One clip as float32 `[time]`, checked; `name` is what messages call it."""
    if isinstance(clip, torch.Tensor):
        clip = clip.detach().cpu()
        clip = (clip.float() if clip.is_floating_point() else clip).numpy()
    try:
        samples = np.asarray(clip)
    except ValueError as error:
        raise ValueError(f"{name} is no plain sequence of samples: {error}.") from error
    if samples.ndim == 2:
        raise ValueError(f"{name} must be mono, but has shape {samples.shape}: mix the channels down to [time].")
    if samples.ndim != 1:
        raise ValueError(f"{name} must be a sequence of samples, but has {samples.ndim} dimensions.")
    if samples.size == 0:
        raise ValueError(f"{name} is empty: it needs at least one sample.")
    if samples.dtype == np.int16:
        return samples.astype(np.float32) / 32768
    if not np.issubdtype(samples.dtype, np.floating):
        raise TypeError(
            f"{name} has samples of type {samples.dtype}, whose scale is not known: pass floats in [-1, 1] or int16."
        )
    samples = samples.astype(np.float32)
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} has samples that are NaN or infinite: it was not decoded or scaled well.")
    return samples
