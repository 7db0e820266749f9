"""A key-value cache for `GenerationMixin` that grows in place."""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` with spare capacity: a step writes one position, instead of copying all earlier ones.

    `keys` and `values`, `[batch, heads, length, head_dim]`, are views of larger buffers. If the base class replaces
    them (reordered beams, cropped candidates), the next update copies the new tensors.
    """

    growth = 32

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        new_length = length + key_states.shape[-2]
        buffers = self._buffers
        if buffers is None or not self._holds(buffers, length, new_length):
            buffers = self._buffers = (
                self._grown(self.keys, key_states, length, new_length),
                self._grown(self.values, value_states, length, new_length),
            )
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[..., length:new_length, :] = new
        self.keys, self.values = (buffer[..., :new_length, :] for buffer in buffers)
        return self.keys, self.values

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the contiguous buffers `[batch, heads, capacity, head_dim]` that begin with `keys` and `values`."""
        assert self._buffers is not None  # an update made them
        return self._buffers

    def _holds(self, buffers: tuple[torch.Tensor, torch.Tensor], length: int, new_length: int) -> bool:
        """Tell whether `keys` and `values` are still this layer's views, with spare capacity after them."""
        return all(
            current is not None
            and new_length <= buffer.shape[-2]
            and current.data_ptr() == buffer.data_ptr()
            and current.stride() == buffer.stride()
            and current.shape[:-2] == buffer.shape[:-2]
            for buffer, current in zip(buffers, (self.keys, self.values), strict=True)
        )

    def _grown(self, old: torch.Tensor | None, new: torch.Tensor, length: int, new_length: int) -> torch.Tensor:
        batch, heads, _, head_dim = new.shape
        # Zeros, because `whole` returns the spare positions too, and a weight of 0 times NaN is NaN.
        buffer = new.new_zeros((batch, heads, new_length + self.growth, head_dim))
        if old is not None and length:
            buffer[..., :length, :] = old
        return buffer

    def reset(self) -> None:
        # The base class of transformers 5.17 would keep the length and zero the contents.
        self.keys = self.values = self._buffers = None
        self.is_initialized = False


class GrowingCache(DynamicCache):
    """`DynamicCache` made of [`GrowingLayer`]s."""

    def __init__(self):
        Cache.__init__(self, layer_class_to_replicate=GrowingLayer)
