"""transformers' processors of logits, the oracle of drawing."""

from collections.abc import Mapping
from typing import Any

from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


def processors(settings: Mapping[str, Any]) -> LogitsProcessorList:
    """Return the processors of `settings`, in `GenerationMixin`'s order (see tests/engine/test_distribution.py).

    `typical_mass` stands where transformers 4.31 puts a processor that its caller brings.
    """
    made = LogitsProcessorList()
    for name, kind in (
        ("repetition_penalty", RepetitionPenaltyLogitsProcessor),
        ("typical_mass", TypicalLogitsWarper),
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
        ("typical_p", TypicalLogitsWarper),
    ):
        if name in settings:
            made.append(kind(settings[name]))
    return made
