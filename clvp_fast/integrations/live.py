"""`accelerate`: live objects of other packages on this package's models and engine."""

from typing import Any

from clvp_fast.integrations import tortoise
from clvp_fast.models.clvp.accelerate import accelerate as accelerate_model


def accelerate(model: Any, **engine_options) -> Any:
    """Take over a live CLVP model of transformers, or put a live `TextToSpeech` of Tortoise on the engine.

    Args:
        model: a model of transformers: `clvp_fast.models.clvp.accelerate.accelerate` tells which, and what is returned.
            Or a `TextToSpeech`, which is changed and returned: see `clvp_fast.integrations.tortoise.accelerate`.
        engine_options: for a `TextToSpeech`, of [`CandidateEngine`].

    Raises:
        TypeError: anything else, or options beside a model.
        ValueError: a model or an object that cannot be served, with the reason.
    """
    if hasattr(model, "autoregressive"):
        return tortoise.accelerate(model, **engine_options)
    if engine_options:
        name = next(iter(engine_options))
        raise TypeError(f"{name} is a setting of an engine, and a model of transformers gets none: leave it out")
    return accelerate_model(model)
