"""The differences between the supported releases of transformers, each with the release that brought it.

No other module asks for the installed release, and this one imports nothing that an old release may lack. Inside this
package, names are those of the newest release; callers and `GenerationMixin` see those of the installed one.

5.20: a configuration names the classes of its parts in `sub_configs_defaults`; before, it was `sub_configs`. Our
    configurations set both.
5.24: the cache of keys and values is called `cache`, as an argument and as a field of outputs. The old name
    `past_key_values` is deprecated.
5.24: a layer with gradient checkpointing keeps the cache if no gradients are computed. Before, it dropped the cache
    in training mode, and `generate` of a model in that mode continued from the last token alone.
"""

import functools
import inspect
import warnings
from collections.abc import Callable

import torch
import transformers

#: The oldest supported release, and the newest tested one; pyproject.toml has the same bounds.
OLDEST, NEWEST = (5, 17), (5, 24)

INSTALLED = tuple(int(number) for number in transformers.__version__.split(".")[:2])

#: The installed release's name for the cache of keys and values.
CACHE = "cache" if INSTALLED >= (5, 24) else "past_key_values"
#: Every name under which a call of `generate` may pass a cache.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def check_release() -> None:
    """Refuse a release of transformers that is too old, and warn of one that is newer than the tested ones.

    Raises:
        ImportError: the installed release is older than `OLDEST`.
    """
    from clvp_fast import __version__

    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    if INSTALLED < OLDEST:
        raise ImportError(
            f"clvp_fast {__version__} needs transformers {oldest} or newer, and {transformers.__version__} is "
            f"installed: install a newer one, as with pip install 'transformers=={newest}.*'"
        )
    if INSTALLED > NEWEST:
        warnings.warn(
            f"clvp_fast {__version__} is tested with transformers up to {newest}, and {transformers.__version__} is "
            "installed: results and arguments may differ",
            stacklevel=2,
        )


def takes_cache(method: Callable) -> Callable:
    """Let callers of a method name its parameter `cache` as the installed release does.

    From 5.24 on, the old name is also accepted, with transformers' own FutureWarning. Before, the signature has only
    the old name.
    """
    if CACHE == "cache":
        from transformers.utils.deprecation import deprecate_kwarg

        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(method)

    @functools.wraps(method)
    def renamed(*args, **kwargs):
        if CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return method(*args, **kwargs)

    signature = inspect.signature(method)
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    renamed.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return renamed


class CheckpointsUnderGradients:
    """Make the `GradientCheckpointingLayer` after this class checkpoint only under gradients, as 5.24 does."""

    _checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Tell whether a call checkpoints: it was asked for, and gradients are computed."""
        return self._checkpointing and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._checkpointing = value
