"""Voices: the conditioning encoder's vectors of a speaker's clips, computed once, kept, saved and loaded."""

import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clvp_fast.audio import require_sound
from clvp_fast.engine.weight_versions import WeightVersions
from clvp_fast.io.files import staged_folder, user_path
from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor
from clvp_fast.models.clvp.modeling import ClvpModelForConditionalGeneration
from clvp_fast.ops.dispatch import uncast

# The floating types that numpy also has.
_OF_NUMPY = (torch.float16, torch.float32, torch.float64)
_FORMAT = "clvp_fast.voice.1"

#: Two encoders count as the same if their answers to one input differ by less than this, relative to their length: ten
#: times the difference that bfloat16 weights make, a tenth of that between unrelated weights.
_SAME_ENCODER = 0.1


@dataclass(frozen=True, eq=False)
class Voice:
    """The conditioning vector of a voice, and the fingerprint of the checkpoint that it belongs to.

    Args:
        vector: `[hidden_size]`, on the host, float32 (float64 from a float64 model).
        fingerprint: `[hidden_size]` float32, the output of the checkpoint's encoder for a fixed input.
    """

    vector: torch.Tensor
    fingerprint: torch.Tensor
    _copies: dict = field(default_factory=dict, repr=False)

    def on(self, device: str | torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return the vector as `[1, hidden_size]` on `device`, as `join_prompt` takes it; it is copied there once."""
        key = (torch.device(device), dtype)
        if key not in self._copies:
            self._copies[key] = self.vector.to(device=device, dtype=dtype)[None]
        return self._copies[key]

    def save(self, path: str | Path) -> None:
        """Write the voice to a safetensors file atomically.

        Raises:
            UnwritableError: the folder cannot be made or written.
            ValueError: `path` is a folder.
        """
        path = user_path(path)
        if path.is_dir():
            raise ValueError(f"a voice is saved to a file, and {path} is a folder")
        with staged_folder(path.parent) as folder:
            tensors = {"vector": self.vector.contiguous(), "fingerprint": self.fingerprint.contiguous()}
            save_file(tensors, folder / path.name, metadata={"format": _FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> "Voice":
        """Read a voice that `save` wrote. Its use checks whether it fits a checkpoint.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds no voice.
        """
        path = user_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no voice at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise ValueError(f"{path} is no voice: its metadata do not say {_FORMAT}")
                vector, fingerprint = file.get_tensor("vector"), file.get_tensor("fingerprint")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no voice ({error}): save the voice again") from error
        for name, tensor in (("vector", vector), ("fingerprint", fingerprint)):
            if tensor.shape != vector.shape or tensor.ndim != 1 or not tensor.is_floating_point():
                raise ValueError(f"{path} is damaged: {name} is {tensor.dtype} {list(tensor.shape)}, not [hidden_size]")
            if not tensor.isfinite().all():
                raise ValueError(f"{path} is damaged: {name} holds NaN or infinite values")
        return cls(vector, fingerprint)


class VoiceCache:
    """A cache of voices by the content of their clips, or by their place. For one thread at a time.

    A voice of several clips is the mean of the clips' vectors, as in original Tortoise. The first
    `default_audio_length` seconds of each clip are used, or with a seed a random piece, as in the original; shorter
    clips are padded.

    Args:
        model: in eval mode, on the device where it will run. When its weights were changed or moved, the kept voices
            are forgotten. Writes through `.data` (`weight.data.copy_(...)`) and steps of an optimizer with `fused=True`
            are not noticed: call `clear` after one.
        feature_extractor: the checkpoint's.
        capacity: how many voices are kept, the most recently used ones; a voice takes some kilobytes.
    """

    def __init__(
        self,
        model: ClvpModelForConditionalGeneration,
        feature_extractor: ClvpFeatureExtractor,
        capacity: int = 2048,
    ):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 voice, not {capacity}")
        self.model = model
        self.feature_extractor = feature_extractor
        self.capacity = capacity
        self.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all voices, and the fingerprint of the checkpoint."""
        self._kept: OrderedDict[bytes | str, Any] = OrderedDict()
        self._fingerprint: torch.Tensor | None = None
        self._versions: WeightVersions | None = None  # of the weights that made the first voice

    def _follow(self) -> None:
        if self._versions is not None and self._versions.changed() is not None:
            self.clear()
        if self._versions is None:
            self._versions = WeightVersions(self.model.conditioning_encoder)

    def from_clips(self, clips, sampling_rate: int | None = None, crop_seed: int | None = None) -> Voice:
        """Make the voice of recordings.

        Args:
            clips: mono samples of one recording, or a list of such: 1-D arrays or tensors, floats in [-1, 1] or int16.
            sampling_rate: of the samples, in Hz; it must be the extractor's, which warns if none is given.
            crop_seed: seed of the random pieces that are used of longer clips; None: their beginnings.

        Raises:
            ValueError, TypeError: no clip; a clip that is empty, silent or not mono, or has NaN or infinite samples;
                another sampling rate. Nothing is kept then, and other voices stay as they were.
        """
        clips = [_host_array(clip) for clip in (clips if isinstance(clips, (list, tuple)) else [clips])]
        if not clips:
            raise ValueError("a voice needs at least one clip")
        seconds = self.feature_extractor.default_audio_length
        used = seconds * self.feature_extractor.sampling_rate
        cut = [seconds if clip.ndim == 1 and len(clip) > used else None for clip in clips]
        places = None if crop_seed is None else random.Random(crop_seed)
        clips = [piece(clip, used, places) if clip.ndim == 1 else clip for clip in clips]
        settings = json.dumps([self.feature_extractor.to_dict(), sampling_rate], sort_keys=True, default=str)
        key = _digest("clips", settings, *clips)

        def voice() -> Voice:
            extracted = self.feature_extractor(clips, sampling_rate=sampling_rate, return_tensors="pt")
            for index, clip in enumerate(clips):
                scale = 1 / 32768 if clip.dtype == np.int16 else 1
                name = f"clip {index}" if len(clips) > 1 else "the audio"
                require_sound(clip * np.float32(scale), name, cut[index])
            return self._voice(extracted["input_features"])

        return self.at(key, voice)

    def from_features(self, input_features) -> Voice:
        """Make the voice of log-mel features `[bins, frames]`, `[clips, bins, frames]`, or a list of the former.

        Raises:
            ValueError: no clip, another number of bins than the checkpoint's, no frame, NaN or infinite values.
            TypeError: no numbers.
        """
        if isinstance(input_features, (list, tuple)):
            clips = [_host_array(clip) for clip in input_features]
        else:
            features = _host_array(input_features)
            clips = list(features) if features.ndim == 3 else [features]
        if not clips:
            raise ValueError("a voice needs at least one clip")
        for index, clip in enumerate(clips):
            if clip.dtype.kind not in "fiu":
                raise TypeError(f"input_features must be floats [bins, frames], not {clip.dtype} {list(clip.shape)}")
            if not np.isfinite(clip).all():
                raise ValueError(
                    f"input_features of clip {index} hold NaN or infinite values: is the recording damaged?"
                )
        tensors = (torch.tensor(clip, device="cpu") for clip in clips)
        return self.at(_digest("features", "", *clips), lambda: self._voice(tensors))

    def from_vector(self, vector) -> Voice:
        """Make the voice of a bare latent `[hidden_size]` or `[1, hidden_size]`, which counts as this checkpoint's.

        Tortoise's pair is taken too: such a latent, and the diffusion's of twice the width, which is ignored.

        Raises:
            TypeError: not a floating point array or tensor. ValueError: another shape; values that are NaN or infinite
                in the model's dtype; a sparse, nested or quantized tensor, or one without data (on device meta).
        """
        width = len(self.fingerprint)
        for part in vector if isinstance(vector, (tuple, list)) else [vector]:
            if isinstance(part, torch.Tensor) and (kind := _unusual(part)):
                raise ValueError(
                    f"conditioning must be plain floats [{width}], and a {kind} tensor came: save it dense"
                )
        if isinstance(vector, (tuple, list)):
            if len(vector) != 2 or any(not isinstance(part, (torch.Tensor, np.ndarray)) for part in vector):
                raise TypeError(
                    f"conditioning must be a pair of latents, [1, {width}] and [1, {2 * width}], or one, and "
                    f"{len(vector)} parts came"
                )
            if vector[1].shape not in ((2 * width,), (1, 2 * width)):
                raise ValueError(
                    f"conditioning: the diffusion's latent must be [1, {2 * width}] beside one of [1, {width}], not "
                    f"{list(vector[1].shape)}: is the pair another model's?"
                )
            vector = vector[0]
        if not isinstance(vector, (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"conditioning must be a Voice, its path or a latent [{width}], not {type(vector).__name__}"
            )
        is_float = vector.is_floating_point() if isinstance(vector, torch.Tensor) else vector.dtype.kind == "f"
        if vector.shape not in ((width,), (1, width)) or not is_float:
            raise ValueError(f"conditioning must be floats [{width}], not {vector.dtype} {list(vector.shape)}")
        vector = torch.as_tensor(_host_array(vector), device="cpu")
        if not vector.to(self.model.dtype).isfinite().all():
            dtype = str(self.model.dtype).removeprefix("torch.")
            where = f", as {dtype} cannot hold them" if vector.isfinite().all() else ""
            raise ValueError(f"conditioning holds NaN or infinite values{where}")
        wide = vector.to(torch.promote_types(vector.dtype, torch.float32), copy=True)
        return Voice(wide.flatten(), self.fingerprint)

    def conditioning(self, voice: Voice) -> torch.Tensor:
        """Return a voice as `[1, hidden_size]` in the model's dtype and on its device, as `join_prompt` takes it.

        Raises:
            ValueError: the voice was made by another checkpoint.
        """
        expected = self.fingerprint
        if voice.vector.shape != expected.shape:
            width, found = len(expected), len(voice.vector)
            raise ValueError(
                f"the voice has {found} numbers, and this checkpoint's have {width}: make it anew from its recordings"
            )
        if voice.fingerprint is not expected and not _same(voice.fingerprint, expected):
            raise ValueError("the voice was made by another checkpoint: make it anew from its recordings")
        return voice.on(self.model.device, self.model.dtype)

    @property
    def fingerprint(self) -> torch.Tensor:
        """Return the voice encoder's answer to a fixed input, `[hidden_size]` float32 on the host.

        Unlike a hash of the weights, it is nearly the same in every dtype that the checkpoint is loaded in.
        """
        self._follow()
        if self._fingerprint is None:
            bins = self.model.config.decoder_config.feature_size
            probe = torch.arange(bins * 8, dtype=torch.float64, device="cpu").view(1, bins, 8).sin()
            self._fingerprint = self._encode(probe[0]).float().cpu()
        return self._fingerprint

    def at(self, key: bytes | str, make: Callable[[], Any]) -> Any:
        """Return the result of `make()` for a digest or a place, kept while there is room; errors are not kept."""
        self._follow()
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self.capacity:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _voice(self, features: Iterable[torch.Tensor]) -> Voice:
        """Return the mean of the vectors of clips `[bins, frames]`."""
        # One clip at a time, so that the bits of a clip's vector do not depend on the other clips.
        vectors = torch.stack([self._encode(clip) for clip in features])
        mean = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).mean(0)
        voice = Voice(mean.cpu(), self.fingerprint)
        if not voice.vector.isfinite().all():
            raise ValueError("the voice came out as NaN or infinite: try a wider dtype than that of the model")
        return voice

    @torch.no_grad()
    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encode features `[bins, frames]` to `[hidden_size]`, in the model's dtype and on its device."""
        features = features.to(device=self.model.device, dtype=self.model.dtype)
        with uncast(features.device):  # a kept voice must not depend on the autocast of the first caller
            return self.model.conditioning_encoder.encode_voice(features[None])[0]


def piece(clip: np.ndarray, length: int, places: random.Random | None) -> np.ndarray:
    """Return at most `length` samples of a clip `[num_samples]`: the first ones, or those from a random start.

    Each longer clip takes one draw of `places`, as in original Tortoise after `random.seed`.
    """
    start = places.randint(0, len(clip) - length) if places is not None and len(clip) > length else 0
    return clip[start : start + length]


def _host_array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().resolve_conj().resolve_neg()
        return (values if values.dtype in _OF_NUMPY or not values.is_floating_point() else values.float()).numpy()
    return np.asarray(values)


def _unusual(tensor: torch.Tensor) -> str | None:
    """Name the layout of a tensor that is not a plain strided one, or return None."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    return None if tensor.layout == torch.strided else "sparse"


def _digest(kind: str, settings: str, *arrays: np.ndarray) -> bytes:
    digest = blake2b(f"{kind} {settings}".encode(), digest_size=16)
    for array in arrays:
        digest.update(f" {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.double(), other.double()
    return bool((one - other).norm() <= _SAME_ENCODER * other.norm())
