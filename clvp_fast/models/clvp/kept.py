"""Values that `generate()` keeps for a decoder from one call to the next.

They lie outside of the model, so that copies, pickles and checkpoints lack them, and refer to the model weakly, so that
both are freed together.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from clvp_fast.io.errors import shown

_KEPT: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def keep(model: nn.Module, value: Any) -> None:
    """Keep one value for a decoder, in place of an earlier one. It must not refer to the model, except weakly."""
    _KEPT[model] = value


def take(model: nn.Module) -> Any:
    """Return what is kept for a decoder and keep it no longer; None if nothing is. So each caller has its own."""
    return _KEPT.pop(model, None)


def release_all() -> None:
    """Free what is kept for all models, because memory ran out."""
    _KEPT.clear()


def release(model: nn.Module) -> None:
    """Free what `generate()` has kept of a model on a GPU: captured steps, and pages of keys and values.

    The next call makes them again. Torch keeps the freed memory for its next tensors; `torch.cuda.empty_cache()` gives
    it to other programs. A model that keeps nothing, as on a CPU, stays as it is.

    Args:
        model: a [`ClvpModelForConditionalGeneration`] or [`ClvpForCausalLM`], or a module that contains one.

    Raises:
        TypeError: something else than a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"release() expects a model, such as ClvpModelForConditionalGeneration, and {shown(model)} came: give the "
            "model whose generate() was called"
        )
    for module in model.modules():
        take(module)
