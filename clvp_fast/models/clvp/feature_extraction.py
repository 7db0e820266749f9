"""`ClvpFeatureExtractor`: turns voice clips into the normalised log-mel spectrograms that condition CLVP."""

import logging
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, window_function
from transformers.utils import PaddingStrategy, TensorType

from clvp_fast.models.common import clips
from clvp_fast.ops.log_mel import log_mel, num_frames

logger = logging.getLogger(__name__)
# Tensors by extractor and device. They are not attributes, because those are saved with an extractor.
_PARAMETERS: WeakKeyDictionary = WeakKeyDictionary()


class ClvpFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrograms (Hann window, HTK mel scale up to 8 kHz, slaney area norm, power 2) of mono speech.

    Args:
        feature_size: mel channels.
        sampling_rate: of the samples, in Hz.
        default_audio_length: seconds to which a clip is cut or padded if a call gives no `max_length`.
        hop_length: samples from one frame to the next.
        chunk_length: seconds; sets `n_samples` and `nb_max_frames`, and changes no feature.
        n_fft: samples of a frame and of its Fourier transform.
        padding_value: the sample value that short clips are padded with.
        mel_norms: `feature_size` numbers that the log-mel channels are divided by.
        return_attention_mask: the default of that argument in a call.
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
        device: str | torch.device | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Extract the features of one clip or a batch; by default each is cut or padded to `default_audio_length`.

        Args:
            raw_speech: mono samples: one clip as a 1-D array, tensor or list of floats, or a batch as a 2-D
                `[batch, time]` array or tensor or a list of clips. Floats lie in [-1, 1]; int16 is scaled to that.
            sampling_rate: of `raw_speech`, in Hz. Pass it, so that a wrong rate is an error and not a wrong result.
            truncation: cut clips longer than `max_length`.
            pad_to_multiple_of: round up the lengths to which clips are cut and padded to a multiple of this.
            return_tensors: "pt", "np", or None for a list of numpy arrays.
            return_attention_mask: return which samples (not frames) are speech and which padding, 1 and 0.
            padding: "max_length", "longest" or True (the longest clip given), "do_not_pad" or False.
            max_length: in samples; None: `default_audio_length` seconds.
            device: the device to compute on, such as "cuda"; by default that of the clips, which for arrays and lists
                is the CPU. The arithmetic is float64 on a CPU, and float32 elsewhere.
            padding_value: replaces the extractor's own.

        Returns:
            `input_features`, float32, `[num_mels, 1 + samples // hop_length]` for each clip, and `attention_mask`,
            int32, `[samples]`. With `return_tensors="pt"` both stay on the device; otherwise they are copied to the
            host.

        Raises:
            ValueError: another sampling rate than the extractor's; no audio, an empty clip, more than one channel, NaN
                or infinite samples (in tensors on a GPU, only samples that features use are checked); different lengths
                if `return_tensors` needs one; tensors on several devices without `device`.
            TypeError: samples that are neither floats nor int16.
        """
        clips.check_sampling_rate(type(self).__name__, self.sampling_rate, sampling_rate)
        padding_value = kwargs.pop("padding_value", self.padding_value)
        if kwargs:
            logger.warning("%s does not know and ignores: %s.", type(self).__name__, ", ".join(sorted(kwargs)))

        found, device = clips.read_clips(raw_speech, None if device is None else torch.device(device))
        limit = self.default_audio_length * self.sampling_rate if max_length is None else max_length
        if limit < 1:
            raise ValueError(f"max_length must be at least 1 sample, not {limit}.")
        limit = _round_up(limit, pad_to_multiple_of)
        held = clips.lengths_of(found)
        if truncation:
            held = [min(count, limit) for count in held]
        strategy, lengths = _padding_strategy(padding), held
        if strategy is not PaddingStrategy.DO_NOT_PAD:
            if strategy is PaddingStrategy.LONGEST:
                limit = _round_up(max(held), pad_to_multiple_of)
            lengths = [max(count, limit) for count in held]
        if return_tensors is not None and min(lengths) < max(lengths):
            raise ValueError(
                f"clips of {min(lengths)} to {max(lengths)} samples do not fit into one tensor: pass "
                "padding=True, or return_tensors=None for a list."
            )

        tensors = return_tensors in (TensorType.PYTORCH, "pt")
        target = device if tensors else clips.HOST
        features = self._features(found, held, lengths, padding_value, device, target)
        outputs: dict[str, torch.Tensor | list[torch.Tensor]] = {"input_features": features}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            outputs["attention_mask"] = self._masks(held, lengths, target)
        if tensors:
            return BatchFeature(outputs, tensor_type=return_tensors)
        arrays = {name: _to_numpy(value) for name, value in outputs.items()}
        if return_tensors is None:
            arrays["input_features"] = list(arrays["input_features"])
        return BatchFeature(arrays, tensor_type=return_tensors)

    def _features(self, found, held, lengths, fill, device, target) -> torch.Tensor | list[torch.Tensor]:
        """Return features of the clips on `target`: `[clips, num_mels, frames]`, or a list if lengths differ."""
        if min(lengths) == max(lengths):
            return self._extract(found, range(len(held)), held, lengths, fill, device).to(target)
        features: dict[int, torch.Tensor] = {}
        for group in clips.similar_lengths(lengths):
            part = self._extract(found, group, held, lengths, fill, device).to(target)
            for place, mel in zip(group, part, strict=True):
                features[place] = mel[:, : num_frames(lengths[place], self.n_fft, self.hop_length)].contiguous()
        return [features[place] for place in range(len(held))]

    def _extract(self, found, group, held, lengths, fill, device) -> torch.Tensor:
        """Return features `[clips, num_mels, frames]` of the clips `group`; 0 after a clip's own frames."""
        count = len(held)
        if len(group) < count:
            found, held, lengths = ([values[place] for place in group] for values in (found, held, lengths))
        samples = clips.lay_out(found, held, lengths, fill, self.padding_side == "left", device)
        unequal = torch.tensor(lengths, device=samples.device) if min(lengths) < max(lengths) else None
        features = log_mel(samples, lengths=unequal, hop_length=self.hop_length, **self._parameters(samples.device))
        if device != clips.HOST:
            # Frames that reach a bad sample are NaN, so that the samples themselves need no check.
            spoilt = features[:, 0].isnan().any(1).nonzero()
            if len(spoilt):
                raise ValueError(clips.NOT_FINITE.format(clips.clip_name(group[int(spoilt[0])], count)))
        return features

    def _parameters(self, device: torch.device) -> dict:
        """Return the arguments of `log_mel` on `device`; they are kept while the attributes stay the same."""
        norms = None if self.mel_norms is None else np.array(self.mel_norms, dtype=np.float64)
        made_of: tuple = self.n_fft, np.array(self.mel_filters), norms
        kept = _PARAMETERS.setdefault(self, {})
        if device in kept and all(map(np.array_equal, kept[device][0], made_of)):
            return kept[device][1]
        # In float64 on the host, because a float32 transform keeps too few digits of a quiet channel beside a loud one.
        compute = torch.float64 if device == clips.HOST else torch.float32
        tables = {"window": window_function(self.n_fft, "hann"), "mel_filters": self.mel_filters, "mel_norms": norms}
        with torch.inference_mode(False):  # the tensors outlive the mode
            parameters = {
                name: None if table is None else torch.tensor(table, dtype=compute, device=device)
                for name, table in tables.items()
            }
        parameters |= {"compute_dtype": compute, "dtype": torch.float32}
        kept[device] = made_of, parameters
        return parameters

    def _masks(self, held, lengths, device) -> torch.Tensor | list[torch.Tensor]:
        """Mark each clip's own samples: int32 `[clips, samples]`, 1 and 0, or a list if lengths differ."""
        if min(lengths) < max(lengths):
            return [self._masks([count], [length], device)[0] for count, length in zip(held, lengths, strict=True)]
        place = torch.arange(lengths[0], dtype=torch.int32, device=device)
        count = torch.tensor(held, dtype=torch.int32, device=device)[:, None]
        masks = torch.empty(len(held), lengths[0], dtype=torch.int32, device=device)
        if self.padding_side == "left":
            return torch.ge(place, lengths[0] - count, out=masks)
        return torch.lt(place, count, out=masks)


def _to_numpy(value: torch.Tensor | list[torch.Tensor]) -> np.ndarray | list[np.ndarray]:
    return value.numpy() if isinstance(value, torch.Tensor) else [part.numpy() for part in value]


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def _padding_strategy(padding) -> PaddingStrategy:
    if isinstance(padding, bool):
        return PaddingStrategy.LONGEST if padding else PaddingStrategy.DO_NOT_PAD
    return PaddingStrategy(padding)
