"""`accelerate`: puts live objects of other packages on this package's models and engine."""

from typing import Any

from clvp_fast.integrations import tortoise
from clvp_fast.models.clvp.accelerate import accelerate as accelerate_model


def accelerate(model: Any, **engine_options) -> Any:
    """Take over a live CLVP model of transformers, or put a live `TextToSpeech` of Tortoise on the engine.

    Args:
        model: a model of transformers (`clvp_fast.models.clvp.accelerate.accelerate` lists the classes and the
            results); or a `TextToSpeech`, which is changed and returned (see
            `clvp_fast.integrations.tortoise.accelerate`).
        engine_options: only with a `TextToSpeech`: options of its [`CandidateEngine`].

    Raises:
        TypeError: another kind of object, or options together with a model.
        ValueError: a model or a `TextToSpeech` that cannot be served, with the reason.
    """
    if hasattr(model, "autoregressive"):
        return tortoise.accelerate(model, **engine_options)
    if engine_options:
        name = next(iter(engine_options))
        raise TypeError(f"{name} is a setting of an engine, and a model of transformers gets none: leave it out")
    return accelerate_model(model)
