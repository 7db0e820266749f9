"""Builds the engine of a checkpoint from the settings of the command line or of a job over a corpus."""

from typing import Any

import torch

from clvp_fast.checkpoint import Checkpoint
from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.memory import default_batch


def build_engine(
    checkpoint: Checkpoint,
    settings: Any,
    memory_fraction: float,
    *,
    candidates: int | None = None,
    deterministic: bool | None = None,
) -> CandidateEngine:
    """Build an engine with these settings.

    Args:
        settings: an object with `batch_size`, `max_new_tokens`, `scoring`, `score_dtype`, `latents`, `int8_weights`,
            `activation_dtype`, `float8_pages` and `packed_weights`: a job's [`Settings`], or arguments of the command
            line. The first two, both dtypes and the last may be None, as for [`CandidateEngine`].
        candidates: how many there are to decode, which bounds the number of slots; None if it is not known.
        memory_fraction, deterministic: as for [`CandidateEngine`].

    Raises:
        ValueError, RuntimeError: as [`CandidateEngine`].
    """
    if settings.activation_dtype is not None and not settings.int8_weights:
        raise ValueError(
            f"activation_dtype {settings.activation_dtype!r} multiplies weights in 8 bits: add int8_weights "
            "(--int8-weights)"
        )
    places = settings.batch_size or default_batch(checkpoint.model.device)
    return CandidateEngine(
        checkpoint.model,
        checkpoint.processor,
        max_batch=places if candidates is None else min(places, candidates),
        max_new_tokens=settings.max_new_tokens,
        memory_fraction=memory_fraction,
        weight_dtype=torch.int8 if settings.int8_weights else None,
        activation_dtype=None if settings.activation_dtype is None else getattr(torch, settings.activation_dtype),
        packed_weights=settings.packed_weights,
        page_dtype=torch.float8_e4m3fn if settings.float8_pages else None,
        scoring=settings.scoring,
        score_dtype=None if settings.score_dtype is None else getattr(torch, settings.score_dtype),
        latents=settings.latents,
        deterministic=deterministic,
    )
