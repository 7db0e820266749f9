"""Versions of parameters: they show whether copies and voices made from weights are still up to date."""

import torch
from torch import nn


class WeightVersions:
    """The addresses and version counters of a module's parameters at the time of construction.

    A write through `.data` (`weight.data.copy_(...)`) or numpy changes neither and is not noticed, nor is a step of an
    optimizer with `fused=True`, which torch does not count. Inference tensors have no version counter, so only their
    address is compared. The storages are kept alive, so that no other tensor can take the address of a parameter that
    moved.

    Args:
        module: the module with the parameters.
        prefix: begins the names that `changed` returns; with its dot.
    """

    def __init__(self, module: nn.Module, prefix: str = ""):
        self._versions = [
            (f"{prefix}{where}{'.' if where else ''}{name}", part, name, parameter.detach(), _count(parameter))
            for where, part in module.named_modules()
            for name, parameter in part.named_parameters(recurse=False)
        ]

    def changed(self) -> str | None:
        """Return the name of the first parameter that was moved, replaced or written to since then, or None."""
        for full_name, part, name, kept, count in self._versions:
            parameter = part._parameters.get(name)
            if parameter is None or parameter.data_ptr() != kept.data_ptr() or _count(parameter) != count:
                return full_name
        return None


def _count(parameter: torch.Tensor) -> int | None:
    return None if parameter.is_inference() else parameter._version
