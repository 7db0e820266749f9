"""Attachments to modules, and replacements of them, as people make them.

Each is a function of a model and a module's name, and returns one that takes it off again.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn


def halved(found):
    """Return `found` with all floating tensors halved, in any container."""
    if isinstance(found, torch.Tensor):
        return found / 2 if found.is_floating_point() else found
    if isinstance(found, Mapping):
        return type(found)({name: halved(value) for name, value in found.items()})
    if isinstance(found, (tuple, list)):
        return type(found)(map(halved, found))
    return found


class Wrapped(nn.Module):
    """A module with a forward of its own around another."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return halved(self.inner(*args, **kwargs))


def replace(model: nn.Module, name: str, module: nn.Module) -> Callable[[], None]:
    parent, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent)
    replaced = parent._modules[leaf]
    setattr(parent, leaf, module)
    return lambda: setattr(parent, leaf, replaced)


def forward_hook(model, name):
    return model.get_submodule(name).register_forward_hook(lambda module, args, output: halved(output)).remove


def forward_pre_hook(model, name):
    return model.get_submodule(name).register_forward_pre_hook(lambda module, args: halved(args)).remove


def backward_hook(model, name):
    return model.get_submodule(name).register_full_backward_hook(lambda module, into, out_of: halved(into)).remove


def own_forward(model, name):
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: halved(forward(*args, **kwargs))
    return lambda: delattr(module, "forward")


def another_activation(model, name):
    return replace(model, name, nn.Hardtanh(-0.5, 0.7))


def identity(model, name):
    return replace(model, name, nn.Identity())


def wrapped(model, name):
    return replace(model, name, Wrapped(model.get_submodule(name)))


ATTACHED = (forward_hook, forward_pre_hook, backward_hook, own_forward, another_activation, identity, wrapped)
