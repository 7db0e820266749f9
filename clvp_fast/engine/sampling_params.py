"""Parameters of drawing candidates, with transformers' meanings and Tortoise's defaults."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from clvp_fast.io.errors import shown

# Tortoise's presets, with their numbers of candidates (`num_autoregressive_samples`).
PRESETS = {"ultra_fast": 16, "fast": 96, "standard": 256, "high_quality": 256}

#: The default number of candidates of a request, and the most that a request may have.
NUM_CANDIDATES, MAX_CANDIDATES = 16, 65_536


@dataclass(frozen=True)
class Range:
    """The values that a field of [`SamplingParams`] may have.

    Args:
        kind: `int` or `float`, to which a value is converted.
        holds: tells whether a number is in the range.
        wanted: the range in words, for error sentences; `remark`: words that errors in Python add.
    """

    kind: type
    holds: Callable[[Any], bool]
    wanted: str
    remark: str = ""


# Seeds are the 64-bit key of a counter-based generator, signed or unsigned.
RANGES = {
    "num_candidates": Range(int, lambda x: 1 <= x <= MAX_CANDIDATES, f"a whole number from 1 to {MAX_CANDIDATES}"),
    "top_k": Range(int, lambda x: 0 <= x < 2**31, "a whole number from 0 (keep all) to 2147483647"),
    "max_new_tokens": Range(int, lambda x: 1 <= x < 2**31, "a whole number from 1 to 2147483647"),
    "seed": Range(int, lambda x: -(2**63) <= x < 2**64, "a whole number of 64 bits", ", or None to draw one"),
    "stop_token": Range(int, lambda x: 0 <= x < 2**31, "a token id", ", or None for the decoder's own eos_token_id"),
    "temperature": Range(float, lambda x: 0 < x < math.inf, "above 0", " (for the likeliest token, do_sample=False)"),
    "top_p": Range(float, lambda x: 0 < x <= 1, "above 0 and at most 1 (1 keeps all)"),
    "typical_p": Range(float, lambda x: 0 < x <= 1, "above 0 and at most 1 (1 keeps all)"),
    "typical_mass": Range(float, lambda x: 0 < x <= 1, "above 0 and at most 1 (1 keeps all)"),
    "min_p": Range(float, lambda x: 0 <= x <= 1, "from 0 (keep all) to 1"),
    "repetition_penalty": Range(float, lambda x: 0 < x < math.inf, "above 0 (1 punishes nothing)"),
}


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request's candidates, checked and turned into Python's own numbers.

    The defaults are those of Tortoise, including the `top_k` of 50 that it inherits from transformers. The command line
    and jobs over a corpus use them too.

    Args:
        num_candidates: how many are drawn; None: 16, or 1 if decoding is greedy.
        temperature, top_k, top_p, typical_p, min_p, repetition_penalty: as in transformers; the operator `sample`
            applies them. All tokens are kept by a `top_k` of 0 or None, a `top_p` or `typical_p` of 1, and a `min_p` of
            0.
        max_new_tokens: the most tokens that a candidate draws, the stop token included.
        do_sample: False for greedy decoding: the likeliest token after the repetition penalty.
        seed: candidate i's tokens depend on checkpoint, request, seed and i alone. None: the engine draws one.
        stop_token: ends a candidate; None: the decoder's `eos_token_id`.
        penalize_prompt: from the first step, apply the repetition penalty to code 1 as well as to the start token. The
            original's prompt is a row of 1s; transformers' is the start token alone.
        typical_mass: as `typical_p`, but applied after the repetition penalty and before temperature and `top_k`, as
            the original's `typical_sampling`. 1 keeps all tokens. While any candidate in the batch uses it, each step
            sorts the vocabulary in torch, and steps on a GPU are launched instead of replayed.

    Raises:
        ValueError: an impossible value, or several candidates of greedy decoding, which would all be equal.
    """

    num_candidates: int | None = None
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 0.8
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 2.0
    max_new_tokens: int = 500
    do_sample: bool = True
    seed: int | None = None
    stop_token: int | None = None
    penalize_prompt: bool = True
    typical_mass: float = 1.0

    def __post_init__(self):
        for name in ("do_sample", "penalize_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.num_candidates is None:
            self._set("num_candidates", NUM_CANDIDATES if self.do_sample else 1)
        if self.top_k is None:
            self._set("top_k", 0)
        for name, allowed in RANGES.items():
            if getattr(self, name) is not None or name not in ("seed", "stop_token"):
                self._check(name, allowed)
        if not self.do_sample and (self.num_candidates or 0) > 1:
            raise ValueError(
                f"{self.num_candidates} candidates of greedy decoding (do_sample=False) would all be equal: "
                "ask for num_candidates=1, or sample"
            )

    def _check(self, name: str, allowed: Range):
        value = getattr(self, name)
        refusal = f"{name} must be {allowed.wanted}{allowed.remark}, not {shown(value)}"
        # Python takes True for a number; a comparison with NaN is always false.
        kind = Integral if allowed.kind is int else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not allowed.holds(value):
            raise ValueError(refusal)
        try:
            converted = allowed.kind(getattr(self, name))
        except OverflowError:  # an integer beyond the range of a float
            converted = math.inf
        if not allowed.holds(converted):  # a fraction that a float rounds to 0
            raise ValueError(refusal)
        self._set(name, converted)

    def _set(self, name, value):
        object.__setattr__(self, name, value)  # the class is frozen

    @classmethod
    def preset(cls, name: str, **overrides) -> "SamplingParams":
        """Make Tortoise's preset `name`, one of `PRESETS`: its number of candidates, and defaults or `overrides`.

        Raises `ValueError` for an unknown name and for impossible values.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{"num_candidates": PRESETS[name], **overrides})


#: The fields that the command line, a job's settings and its rows may set; the others follow from checkpoints and
#: Tortoise's objects.
SAMPLING = tuple(
    field.name
    for field in fields(SamplingParams)
    if field.name not in ("stop_token", "penalize_prompt", "typical_mass")
)
