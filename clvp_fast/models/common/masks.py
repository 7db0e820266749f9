"""Attention masks, which CLVP and CLAP read in the same way."""

import torch

#: The remark on the length of CLVP's masks in error messages.
ALL_KEYS = " (all keys, those in the cache included)"


def boolean_mask(attention_mask: torch.Tensor | None, length: int, remark: str = "") -> torch.Tensor | None:
    """Return a padding mask `[batch, length]` as booleans; None and masks of four axes stay as they are.

    Args:
        remark: a message's remark on the length.

    Raises:
        ValueError: any other shape.
    """
    if attention_mask is None or attention_mask.ndim == 4:
        return attention_mask
    if attention_mask.ndim != 2 or attention_mask.shape[1] != length:
        raise ValueError(f"attention_mask must be [batch, {length}]{remark}, got {list(attention_mask.shape)}")
    return attention_mask.bool()
