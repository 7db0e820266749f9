"""Copies of tensors to the host, which goes on while they are on their way."""

from typing import Any

import torch

from clvp_fast.ops.dispatch import device_guard


class HostCopy:
    """Tensors on their way to the host, as arrays; None stays None.

    On a CUDA device the copies are queued in torch's current stream, behind what computes the tensors, so that the host
    need not wait for it and the device goes on with what is queued next. On a CPU they are made at once.
    """

    def __init__(self, *tensors: torch.Tensor | None):
        # Torch copies into pinned memory then.
        self._copies = [x if x is None else x.detach().to("cpu", non_blocking=True, copy=True) for x in tensors]
        self._events = [_event(device) for device in {x.device for x in tensors if x is not None and x.is_cuda}]

    @property
    def arrived(self) -> bool:
        """Tell whether `wait` would return at once."""
        return all(event.query() for event in self._events)

    def wait(self) -> list[Any]:
        """Return the arrays, once they have arrived, and None for each None."""
        for event in self._events:
            event.synchronize()
        return [copy if copy is None else copy.numpy() for copy in self._copies]


def _event(device: torch.device) -> torch.cuda.Event:
    with device_guard(device):
        event = torch.cuda.Event()
        event.record()
    return event
