"""Marks of parameters, which tell whether copies of weights or voices still belong to them."""

import torch
from torch import nn


class Marks:
    """Where a module's parameters lie and how often they were written to, at the moment when this is made.

    A write through `.data` (`weight.data.copy_(...)`) or numpy leaves both as they were, and is not seen, nor is the
    step of an optimizer with `fused=True`, which torch does not count; of inference tensors, which count no writes, the
    address alone is known. The storage of a parameter that is moved is kept for as
    long as this is, so that no other can come to lie at its address.

    Args:
        module: the module whose parameters are marked.
        prefix: of the names that `changed` gives, with its dot.
    """

    def __init__(self, module: nn.Module, prefix: str = ""):
        self._marks = [
            (f"{prefix}{where}{'.' if where else ''}{name}", part, name, parameter.detach(), _count(parameter))
            for where, part in module.named_modules()
            for name, parameter in part.named_parameters(recurse=False)
        ]

    def changed(self) -> str | None:
        """Return the name of the first parameter that was moved, replaced or written to since; None if none was."""
        for full_name, part, name, kept, count in self._marks:
            parameter = part._parameters.get(name)
            if parameter is None or parameter.data_ptr() != kept.data_ptr() or _count(parameter) != count:
                return full_name
        return None


def _count(parameter: torch.Tensor) -> int | None:
    return None if parameter.is_inference() else parameter._version
