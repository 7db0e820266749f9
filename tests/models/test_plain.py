"""Modules that have to be called: those that do more than their class's forward on their own parameters."""

import pytest
import torch
from torch import nn

from clvp_fast.models.common.plain import is_plain


class Own(nn.Linear):
    pass


def ignore(*args, **kwargs):
    """Return nothing, as a hook without effect."""


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
)


@pytest.mark.parametrize("register", HOOKS)
def test_a_hook_of_any_kind_until_it_is_taken_off(register):
    linear = nn.Linear(3, 3)
    assert is_plain(linear, nn.Linear)
    handle = getattr(linear, register)(ignore)
    assert not is_plain(linear, nn.Linear)
    handle.remove()
    assert is_plain(linear, nn.Linear)


def test_hooks_on_all_modules():
    for of_all in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(nn.modules.module, f"register_module_{of_all}")(ignore)
        try:
            assert not is_plain(nn.Linear(3, 3), nn.Linear)
        finally:
            handle.remove()


def test_another_class_call_or_forward():
    compiled, patched = nn.Linear(3, 3), nn.Linear(3, 3)
    compiled.compile(backend="eager")
    patched.forward = ignore
    for module in (compiled, patched, Own(3, 3), nn.Identity(), None):
        assert not is_plain(module, nn.Linear)


def test_parameters_of_another_kind():
    class Quantized(torch.Tensor):
        pass

    other = nn.Linear(3, 3)
    other._parameters["weight"] = torch.zeros(3, 3).as_subclass(Quantized)
    for module in (nn.Linear(3, 3, device="meta"), other):
        assert not is_plain(module, nn.Linear)
    of_functional_call = nn.Linear(3, 3, bias=False)
    of_functional_call._parameters["weight"] = torch.zeros(3, 3)
    assert is_plain(of_functional_call, nn.Linear)
