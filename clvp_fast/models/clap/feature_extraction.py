"""`ClapFeatureExtractor`: turns recordings into the log-mel spectrograms, in decibels, for CLAP's audio tower."""

import logging
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, window_function
from transformers.utils import TensorType

from clvp_fast.models.common import clips
from clvp_fast.ops.log_mel import log_mel, num_frames

logger = logging.getLogger(__name__)
TRUNCATIONS, PADDINGS = ("fusion", "rand_trunc"), ("repeatpad", "repeat", "pad")
# transformers' names for other extractors. All clips have one length here, so these pad with silence.
_SILENCE = ("max_length", "longest", "do_not_pad")
# As in transformers' `power_to_db`, power below this is -100 dB.
_FLOOR = 1e-10
# The number of clips that are transformed at a time.
_GROUP = 32
# Tensors by extractor, filters and device. They are not attributes, because those are saved with an extractor.
_TABLES: WeakKeyDictionary = WeakKeyDictionary()


@dataclass
class _Plan:
    """The crops of a clip: their random beginnings in samples or frames, and whether the clip `is_longer`."""

    start: int = 0
    crops: tuple[int, ...] | None = None
    longer: bool = False
    whole: bool = False


class ClapFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrograms (Hann window, power 2, decibels) of mono recordings, all of one length.

    The mel filters are of the HTK scale without norm for `truncation="fusion"`, else of the slaney scale with its area
    norm.

    Args:
        feature_size: mel channels.
        sampling_rate: of the samples, in Hz.
        hop_length: samples from one frame to the next.
        max_length_s: seconds that the model takes; shorter clips are filled up, longer ones cropped.
        fft_window_size: samples of a frame and of its Fourier transform.
        padding_value, return_attention_mask, top_db: kept for checkpoints; as in transformers, features do not depend
            on them.
        frequency_min, frequency_max: of the mel filters, in Hz.
        truncation: the default for longer clips: "fusion" (the whole, shrunk, and a random crop of each third) or
            "rand_trunc" (one random crop).
        padding: the default for shorter clips: "repeatpad" (repeated as often as it fits, then silence), "repeat"
            (repeated to the end) or "pad" (silence).
    """

    model_input_names = ["input_features", "is_longer"]  # noqa: RUF012 (the base class's declaration)

    def __init__(
        self,
        feature_size=64,
        sampling_rate=48_000,
        hop_length=480,
        max_length_s=10,
        fft_window_size=1024,
        padding_value=0.0,
        return_attention_mask=False,
        frequency_min: float = 0,
        frequency_max: float = 14_000,
        top_db: int | None = None,
        truncation: str = "fusion",
        padding: str = "repeatpad",
        **kwargs,
    ):
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        self.top_db = top_db
        self.truncation = truncation
        self.padding = padding
        self.fft_window_size = fft_window_size
        self.nb_frequency_bins = fft_window_size // 2 + 1
        self.hop_length = hop_length
        self.max_length_s = max_length_s
        self.nb_max_samples = max_length_s * sampling_rate
        self.frequency_min = frequency_min
        self.frequency_max = frequency_max
        filters = partial(
            mel_filter_bank,
            num_frequency_bins=self.nb_frequency_bins,
            num_mel_filters=feature_size,
            min_frequency=frequency_min,
            max_frequency=frequency_max,
            sampling_rate=sampling_rate,
        )
        self.mel_filters = filters(norm=None, mel_scale="htk")
        self.mel_filters_slaney = filters(norm="slaney", mel_scale="slaney")

    def to_dict(self) -> dict:
        """Return the fields of the JSON file, without the mel filters that they define."""
        return {name: value for name, value in super().to_dict().items() if not name.startswith("mel_filters")}

    def __call__(
        self,
        raw_speech,
        truncation: str | None = None,
        padding: bool | str | None = None,
        max_length: int | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | TensorType | None = None,
        seed: int | None = None,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Extract the features of one clip or a batch.

        Args:
            raw_speech: mono samples: one clip as a 1-D array, tensor or list of floats, or a batch as a 2-D
                `[batch, time]` array or tensor or a list of clips. Floats lie in [-1, 1]; int16 is scaled to that.
            truncation: "fusion" or "rand_trunc"; None: the extractor's own.
            padding: "repeatpad", "repeat" or "pad"; None or True: the extractor's own; False, "max_length", "longest"
                and "do_not_pad": "pad".
            max_length: the length in samples to which clips are filled up or cropped; None: `max_length_s` seconds.
            sampling_rate: of `raw_speech`, in Hz. Pass it, so that a wrong rate is an error and not a wrong result.
            return_tensors: "pt", "np", or None for lists of numpy arrays.
            seed: seed of each clip's random crops, so that its features do not depend on the other clips. None: numpy's
                global generator, clip after clip, as in transformers.
            device: the device to compute on, such as "cuda"; by default that of the clips, which for arrays and lists
                is the CPU. The arithmetic is float64 on a CPU, and float32 elsewhere.

        Returns:
            `input_features`, float32: with "fusion" `[4, frames, feature_size]` for each clip (the whole and three
            crops, or four times the same), else `[1, frames, feature_size]`; and `is_longer`, bool `[1]`: whether the
            clip had to be cropped. With "fusion", if no clip of the batch is longer, a random one is called longer;
            with a `seed`, each clip counts as a batch of its own. With "pt" both stay on the device.

        Raises:
            ValueError: another sampling rate than the extractor's; an unknown truncation or padding; no audio, an empty
                clip, NaN or infinite samples, more than one channel; tensors on several devices without `device`.
            TypeError: samples that are neither floats nor int16.
        """
        clips.check_sampling_rate(type(self).__name__, self.sampling_rate, sampling_rate)
        if kwargs:
            logger.warning("%s does not know and ignores: %s.", type(self).__name__, ", ".join(sorted(kwargs)))
        truncation = _one_of("truncation", self.truncation if truncation is None else truncation, TRUNCATIONS)
        padding = self.padding if padding is None or padding is True else padding or "pad"
        padding = "pad" if padding in _SILENCE else _one_of("padding", padding, PADDINGS)
        limit = max_length or self.nb_max_samples
        if limit < 1:
            raise ValueError(f"max_length must be at least 1 sample, not {limit}.")

        found, device = clips.read_clips(raw_speech, None if device is None else torch.device(device))
        plans = self._plan(clips.lengths_of(found), limit, truncation, seed)
        features = self._features(found, plans, limit, truncation, padding, device)
        outputs = {
            "input_features": features,
            "is_longer": torch.tensor([[plan.longer] for plan in plans], device="cpu"),
        }
        if return_tensors in (TensorType.PYTORCH, "pt"):
            outputs["is_longer"] = outputs["is_longer"].to(device)
            return BatchFeature(outputs, tensor_type=return_tensors)
        outputs = {name: value.cpu().numpy() for name, value in outputs.items()}
        if return_tensors is None:
            outputs = {"input_features": list(outputs["input_features"]), "is_longer": outputs["is_longer"].tolist()}
        return BatchFeature(outputs, tensor_type=return_tensors)

    def _plan(self, lengths: list[int], limit: int, truncation: str, seed: int | None) -> list[_Plan]:
        """Draw random numbers in the order in which transformers draws them."""
        if seed is not None and len(lengths) > 1:
            return [self._plan([length], limit, truncation, seed)[0] for length in lengths]
        draws = np.random if seed is None else np.random.RandomState(seed)
        plans = []
        for length in lengths:
            frames, kept = (num_frames(count, self.fft_window_size, self.hop_length) for count in (length, limit))
            if length <= limit:
                plans.append(_Plan())
            elif truncation == "rand_trunc":
                plans.append(_Plan(start=draws.randint(0, length - limit + 1), longer=True))
            elif frames == kept:
                plans.append(_Plan(whole=True))
            else:
                plans.append(_Plan(crops=_draw_thirds(draws, frames - kept + 1), longer=True))
        if truncation == "fusion" and not any(plan.longer for plan in plans):
            plans[draws.randint(0, len(plans))].longer = True
        return plans

    def _features(self, found, plans, limit, truncation, padding, device) -> torch.Tensor:
        """Return the features `[clips, 4 or 1, frames, feature_size]`."""
        frames = num_frames(limit, self.fft_window_size, self.hop_length)
        channels = 4 if truncation == "fusion" else 1
        features = torch.empty(len(plans), channels, frames, self.feature_size, dtype=torch.float32, device=device)
        tables = self._tables(truncation, device)
        equal = [place for place, plan in enumerate(plans) if plan.crops is None and not plan.whole]
        for first in range(0, len(equal), _GROUP):
            group = equal[first : first + _GROUP]
            rows = torch.empty(len(group), limit, dtype=torch.float32, device=device)
            for row, place in zip(rows, group, strict=True):
                start = plans[place].start
                _fill(row, _as_floats(found[place])[start : start + limit], padding)
            mels = self._mel(rows, tables, group, len(plans))
            for place, mel in zip(group, mels, strict=True):
                features[place] = mel
        for place, plan in enumerate(plans):
            if plan.crops is None and not plan.whole:
                continue
            mel = self._mel(_as_floats(found[place])[None].to(device), tables, [place], len(plans))[0]
            if plan.crops is None:
                features[place] = mel
                continue
            size = (frames, self.feature_size)
            features[place, 0] = F.interpolate(mel[None, None], size, mode="bilinear", align_corners=False)[0, 0]
            for channel, start in enumerate(plan.crops, 1):
                features[place, channel] = mel[start : start + frames]
        return features

    def _mel(self, rows: torch.Tensor, tables: dict, places: list[int], count: int) -> torch.Tensor:
        """Compute `[clips, frames, feature_size]` of `[clips, samples]`, the clips with indices `places` of `count`."""
        mels = log_mel(rows, hop_length=self.hop_length, log_floor=_FLOOR, decibels=True, **tables)
        if rows.device != clips.HOST:
            # Frames that reach a bad sample are NaN, so that the samples themselves need no check.
            spoilt = mels[:, 0].isnan().any(1).nonzero()
            if len(spoilt):
                raise ValueError(clips.NOT_FINITE.format(clips.clip_name(places[int(spoilt[0])], count)))
        return mels.transpose(1, 2)

    def _tables(self, truncation: str, device: torch.device) -> dict:
        """Return the arguments of `log_mel` on `device`; they are kept while the filters stay the same."""
        filters = self.mel_filters if truncation == "fusion" else self.mel_filters_slaney
        kept = _TABLES.setdefault(self, {})
        if (truncation, device) in kept and np.array_equal(kept[truncation, device][0], filters):
            return kept[truncation, device][1]
        # In float64 on the host, because a float32 transform keeps too few digits of a quiet channel beside a loud one.
        compute = torch.float64 if device == clips.HOST else torch.float32
        window = window_function(self.fft_window_size, "hann")
        with torch.inference_mode(False):  # the tensors outlive the mode
            tables = {
                name: torch.tensor(table, dtype=compute, device=device)
                for name, table in (("window", window), ("mel_filters", filters))
            }
        tables |= {"compute_dtype": compute, "dtype": torch.float32}
        kept[truncation, device] = np.array(filters), tables
        return tables


def _one_of(name: str, value, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}.")
    return value


def _draw_thirds(draws, count: int) -> tuple[int, ...]:
    """Draw an index from each third of the indices 0 to `count - 1`; an empty third gives 0."""
    starts, first = [], 0
    for third in range(3):
        places = count // 3 + (third < count % 3)
        start = draws.randint(0, max(places, 1))
        starts.append(first + start if places else 0)
        first += places
    return tuple(starts)


def _as_floats(clip) -> torch.Tensor:
    if isinstance(clip, np.ndarray):  # torch refuses a reversed array, and warns of a read-only one
        clip = torch.from_numpy(np.require(clip, requirements=["C", "W"]))
    return clips.as_floats(clip)


def _fill(row: torch.Tensor, clip: torch.Tensor, padding: str) -> None:
    """Write `clip` into the row `[samples]`, which is at least as long, and fill the rest."""
    times = 1 if padding == "pad" else len(row) // len(clip)
    whole = times * len(clip)
    row[:whole].view(times, -1)[:] = clip.to(row.device)
    if padding == "repeat":
        row[whole:] = clip[: len(row) - whole]
    else:
        row[whole:] = 0
