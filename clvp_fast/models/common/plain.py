"""The rule for fused paths: such a path reads modules' parameters only while each of those modules is plain.

A plain module only runs its class's computation on its own parameters: it is of exactly that class, with that class's
forward, without hooks or a compiled call, and its parameters are ordinary ones on a device that has storage. Adapters
replace modules; parametrizations change their classes; pruning, weight norms and users hook them; offloading replaces
forwards and leaves parameters on "meta"; quantisation replaces tensors. All such modules have to be called one after
another, with the arguments and results of transformers' modules.
"""

from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN

from clvp_fast import ops

# Documented ("selu") or usual activations that transformers' own table lacks.
_MORE_ACTIVATIONS = {"selu": nn.SELU, "elu": nn.ELU}
# A user's subclass has this package's modules, and may compute anything.
_PACKAGES = ("clvp_fast", "torch", "transformers")
# `functional_call` and `torch.func` replace parameters by tensors.
_PARAMETERS = (nn.Parameter, torch.Tensor)

Kind = TypeVar("Kind", bound=nn.Module)


def activation_module(name: str) -> nn.Module:
    """Make the activation that a configuration names."""
    if name in ACT2FN:
        return ACT2FN[name]
    if name not in _MORE_ACTIVATIONS:
        known = ", ".join(sorted({*ACT2FN, *_MORE_ACTIVATIONS}))
        raise ValueError(f"unknown activation {name!r}: choose one of {known}")
    return _MORE_ACTIVATIONS[name]()


# By class: the operators' name of an activation, and its settings.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, float | None, float | None]] = {}


def _settings(activation: nn.Module) -> tuple[float | None, float | None]:
    return activation.__dict__.get("negative_slope"), activation.__dict__.get("alpha")


for _name in ops.ACTIVATIONS:
    if _name in ACT2FN or _name in _MORE_ACTIVATIONS:
        _module = activation_module(_name)
        _ACTIVATIONS.setdefault(type(_module), (_name, *_settings(_module)))


def is_plain(module: Any, kind: type[Kind]) -> TypeGuard[Kind]:
    """Tell whether calling `module` only runs the computation of the class `kind` on the module's parameters.

    The modules inside are not checked.
    """
    if type(module) is not kind:
        return False
    state = module.__dict__  # dictionaries are faster than attributes, and this runs for every module of every layer
    if (
        "forward" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or module._compiled_call_impl is not None
        or _has_any_global_hook()
    ):
        return False
    for parameter in state["_parameters"].values():
        if parameter is not None and (type(parameter) not in _PARAMETERS or parameter.is_meta):
            return False
    return True


def is_plain_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Tell whether `module` is a plain linear layer with a bias, as feed-forward operators need it."""
    return is_plain(module, nn.Linear) and module.bias is not None


def drop_probability(dropout: nn.Dropout) -> float:
    """Return the share that `dropout` drops now, by its own mode, which may differ from that of its parent."""
    return dropout.p if dropout.training else 0.0


def activation_name(module: Any) -> str | None:
    """Return the name in `ops.ACTIVATIONS` of a plain `module`'s computation; None if operators lack it."""
    name, *settings = _ACTIVATIONS.get(type(module), (None, None, None))
    known = name is not None and is_plain(module, type(module)) and tuple(settings) == _settings(module)
    return name if known else None


def kinds_of(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Return the class of each module of `model`, by its name."""
    return {name: type(module) for name, module in model.named_modules()}


def changed_module(model: nn.Module, kinds: dict[str, type[nn.Module]]) -> str | None:
    """Name the first module of `model` that is not a plain one of its class in `kinds`, or return None.

    Returns the beginning of a sentence, such as "module layers.0.mlp has hooks".
    """
    for name, module in model.named_modules():
        where = f"module {name}" if name else "the model"
        kind = type(module)
        if kind is not kinds.get(name) or kind.__module__.partition(".")[0] not in _PACKAGES:
            return f"{where} is a {kind.__name__} of another package or subclass"
        if getattr(module, "_compiled_call_impl", None) is not None:
            return f"{where} is compiled"
        if any(p is not None and p.is_meta for p in module._parameters.values()):
            return f"{where} has parameters without storage, as offloading leaves them"
        if any(p is not None and type(p) not in _PARAMETERS for p in module._parameters.values()):
            return f"{where} has parameters of another kind, as quantisation makes them"
        if not is_plain(module, kind):
            return f"{where} has hooks or a forward of its own"
    return None


class PlainModel:
    """A check that a model is plain and stays plain, for code that reads its parameters over many calls.

    Args:
        model: a model of this package.

    Raises:
        ValueError: one of its modules is not plain; the message has its name and what to do.
    """

    def __init__(self, model: Any):
        self._model = model
        if (found := changed_module(model, model.kinds)) is not None:
            raise ValueError(f"{found}, and the engine reads its parameters: {_ADVICE}")
        self._modules = [(module, type(module), tuple(module._modules.values())) for module in model.modules()]

    def check(self) -> None:
        """Raise `ValueError` if a module was replaced, or something attached to one, since construction."""
        for module, kind, children in self._modules:
            if tuple(module._modules.values()) != children or not is_plain(module, kind):
                found = changed_module(self._model, self._model.kinds) or "a module of the model was replaced"
                raise ValueError(f"{found} since the engine was made, which reads its parameters: {_ADVICE}")


_ADVICE = (
    "take it off (merge adapters) and make the engine anew, or use generate(use_engine=False) of the model, which "
    "calls its modules"
)
