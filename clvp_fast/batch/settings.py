"""The settings that, with its rows, determine a job's results; they can be compared, hashed, pickled and written."""

import json
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from clvp_fast.engine.defaults import ACTIVATION_DTYPES, DTYPES, SCORING_MODES, TEXT_CLEANINGS
from clvp_fast.engine.sampling_params import SAMPLING, SamplingParams

#: Settings that a run determines if they are open, and that a resumed run takes over from the run before.
_FOUND = ("max_new_tokens", "device", "packed_weights", "batch_size", "threads")


@dataclass(frozen=True)
class Settings:
    """Settings of one job.

    Args:
        checkpoint: "demo", a folder, or a hub id.
        voice: the voice of rows that name none: a recording, a folder of recordings, or a saved voice.
        crop_seed: seed of the random 6 s that are used of a longer recording, as in [`CandidateRequest`]; None: the
            first 6 s.
        keep: how many of a row's best candidates are written; None: all.
        num_candidates, max_new_tokens, do_sample, temperature, top_p, top_k, typical_p, min_p, repetition_penalty: as
            in [`SamplingParams`]; a row may have its own. `max_new_tokens` None: 500, or fewer if the checkpoint has
            fewer positions.
        seed: the job's seed; a row's seed is derived from it and the row's id.
        scoring: "padded" or "trimmed", as for [`CandidateEngine`].
        score_dtype: dtype of the speech encoder that ranks: "float32", "bfloat16" or "float16"; None: the `dtype`.
        latents: write the decoder's latents of the kept candidates.
        embeddings: write the embeddings of the text and of the kept candidates' speech.
        device: "cpu" or "cuda"; None: the GPU if there is one.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        int8_weights, float8_pages: decode over 8-bit copies of weights, with 8-bit keys and values.
        activation_dtype: "int8" to round what is multiplied by `int8_weights` to 8 bits too, as for
            [`CandidateEngine`]; None: it is multiplied as it is.
        packed_weights: decode over packed copies of weights, as for [`CandidateEngine`]; None: if they help and fit.
        batch_size: the most candidates decoded at once; None: as many as memory allows.
        threads: CPU threads, on whose number the order of sums in torch's products may depend; None: torch's setting.
        text_cleaning: "tortoise" or "transformers".

    Raises:
        ValueError: an impossible value.
    """

    checkpoint: str = "demo"
    voice: str | None = None
    crop_seed: int | None = None
    keep: int | None = 1
    num_candidates: int | None = None
    max_new_tokens: int | None = None
    do_sample: bool = SamplingParams.do_sample
    temperature: float = SamplingParams.temperature
    top_p: float = SamplingParams.top_p
    top_k: int | None = SamplingParams.top_k
    typical_p: float = SamplingParams.typical_p
    min_p: float = SamplingParams.min_p
    repetition_penalty: float = SamplingParams.repetition_penalty
    seed: int = 0
    scoring: str = SCORING_MODES[0]
    score_dtype: str | None = None
    latents: bool = False
    embeddings: bool = False
    device: str | None = None
    dtype: str = DTYPES[0]
    int8_weights: bool = False
    activation_dtype: str | None = None
    float8_pages: bool = False
    packed_weights: bool | None = None
    batch_size: int | None = None
    threads: int | None = None
    text_cleaning: str = TEXT_CLEANINGS[0]

    def __post_init__(self):
        for name in ("checkpoint", "voice"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        # As Python's own numbers, so that equal settings have equal digests.
        for name, value in asdict(self.sampling()).items():
            if name in SAMPLING and (name, self.max_new_tokens) != ("max_new_tokens", None):
                object.__setattr__(self, name, value)
        for name in ("keep", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1 up, or None, not {value!r}")
        seed = self.crop_seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ValueError(f"crop_seed must be a whole number from 0 up, or None, not {seed!r}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                shown = ", ".join(map(repr, known))
                raise ValueError(f"{name} must be one of {shown}, not {getattr(self, name)!r}")

    def sampling(self, **of_row: Any) -> SamplingParams:
        """Return the sampling parameters, with a row's own in place of the job's.

        Raises:
            ValueError: an impossible value.
        """
        own: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING}
        own = {name: value for name, value in own.items() if value is not None or name == "top_k"}  # None: keep all
        return SamplingParams(**own | of_row)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary of plain values."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits that differ if any setting differs."""
        return blake2b(json.dumps(self.as_dict(), sort_keys=True).encode(), digest_size=8).hexdigest()

    def going_on_from(self, before: dict[str, Any]) -> "Settings":
        """Return these settings, with open ones filled in as the run before determined them.

        Raises:
            ValueError: a setting differs from `before`; it is named, with both values.
        """
        adopted = {name: before.get(name) for name in _FOUND if getattr(self, name) is None}
        settings = replace(self, **adopted)
        changed = [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in settings.as_dict().items()
            if before.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"the job was begun with other settings: {'; '.join(changed)}. Give those it was begun with to go on, "
                "or another folder to begin anew"
            )
        return settings


_CHOICES = {
    "scoring": SCORING_MODES,
    "score_dtype": (None, *DTYPES),
    "activation_dtype": (None, *ACTIVATION_DTYPES),
    "device": (None, "cpu", "cuda"),
    "dtype": DTYPES,
    "text_cleaning": TEXT_CLEANINGS,
}
