"""`accelerate`: turns a live CLVP model of transformers into one of ours over the same parameters."""

import copy

import torch
import transformers
from torch import nn

from clvp_fast.models.clvp import modeling
from clvp_fast.models.clvp.layers import ClvpRotaryPositionalEmbedding
from clvp_fast.models.clvp.pretrained import ClvpPreTrainedModel
from clvp_fast.models.common.plain import is_plain

_CLASSES = ("ClvpModelForConditionalGeneration", "ClvpForCausalLM", "ClvpModel", "ClvpDecoder", "ClvpEncoder")


def accelerate(model: nn.Module) -> ClvpPreTrainedModel:
    """Make the clvp_fast model that shares the parameters of a live model of transformers.

    No weight is copied: training or loading one model changes the other. Dtype, device, frozen parameters, and training
    or evaluation mode are those of `model`. Its generation settings are copied; turn gradient checkpointing on again if
    you need it. `model` keeps working; move or cast it before this call, not after.

    Args:
        model: transformers' `ClvpModelForConditionalGeneration`, `ClvpForCausalLM`, `ClvpModel`, `ClvpDecoder` or
            `ClvpEncoder`. A model of this package is returned as it is.

    Returns:
        The class of the same name.

    Raises:
        TypeError: anything else, including subclasses and wrappers.
        ValueError: modules that do more than transformers' own, because they are replaced, hooked, compiled or
            quantised.
    """
    if isinstance(model, ClvpPreTrainedModel):
        return model
    name = type(model).__name__
    if name not in _CLASSES or type(model) is not getattr(transformers, name):
        raise TypeError(
            f"accelerate() takes a CLVP model of transformers ({', '.join(_CLASSES)}) or a TextToSpeech of "
            f"tortoise-tts, not {type(model).__module__}.{name}: "
            "of a wrapper or a compiled model, give the model inside"
        )
    assert isinstance(model, transformers.PreTrainedModel)  # each of those classes is one
    ours_class = getattr(modeling, name)
    with torch.device("meta"):
        ours = ours_class(ours_class.config_class.from_dict(model.config.to_dict()))
    _check_modules(model, ours)
    _share_state(model, ours)

    theirs = dict(model.named_modules())
    for where, module in ours.named_modules():
        module.training = theirs[where].training
        if isinstance(module, ClvpRotaryPositionalEmbedding):
            _restore_precision(module)
        settings = getattr(theirs[where], "generation_config", None)
        if settings is not None and isinstance(module, ClvpPreTrainedModel):
            module.generation_config = copy.deepcopy(settings)
    return ours


def _check_modules(model: nn.Module, ours: nn.Module) -> None:
    """Raise if a module of transformers differs from its class's own, because ours would ignore the difference."""
    expected = dict(ours.named_modules())
    for where, module in model.named_modules():
        kind = type(module)
        same = where in expected and (
            kind is type(expected[where])
            # torch's class; ours of the same name derives from it
            or (issubclass(type(expected[where]), kind) and kind.__name__ == type(expected[where]).__name__)
            or (kind.__module__ == type(model).__module__ and kind.__name__ == type(expected[where]).__name__)
        )
        named = f"module {where}" if where else "the model"
        if not same:
            raise ValueError(
                f"{named} is a {kind.__module__}.{kind.__name__}, which is no part of transformers' CLVP: "
                "merge or take off adapters and quantisation first"
            )
        if not is_plain(module, kind):
            raise ValueError(
                f"{named} has hooks, a forward of its own, or is compiled, which would be lost: take them off, and put "
                "them on what accelerate() returns"
            )


def _share_state(model: nn.Module, ours: nn.Module) -> None:
    """Put the parameters and buffers of `model` into `ours`."""
    parameters = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        # `load_state_dict` would change the parameters that it is given.
        parameter.requires_grad_(name not in parameters or parameters[name].requires_grad)
    try:
        ours.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    except RuntimeError as error:
        raise ValueError(f"the parameters are not those that the model's configuration describes: {error}") from error


def _restore_precision(rotary: ClvpRotaryPositionalEmbedding) -> None:
    """Restore the angles' frequencies in float32 if transformers cast them to a half type with the weights."""
    if rotary.inv_freq.dtype in (torch.bfloat16, torch.float16):
        rotary.inv_freq = rotary.initial_inv_freq().to(rotary.inv_freq.device)
