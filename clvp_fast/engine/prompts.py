"""Prompts on their way into pages: copied into tensors that stay, so that the launches of a prefill can be captured."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from clvp_fast.engine.decoder import KVPages, PagedDecoder
from clvp_fast.engine.scheduler import Prefill
from clvp_fast.engine.slots import to_device
from clvp_fast.engine.step import Prompt

# The rows of a prefill on a GPU: for all numbers above 1024, `kernels/linear.py` and `mlp.py` have one tile and one
# order of sums. It is room for several texts, and a device is busy with it for about as long as the host would be with
# the launches.
PREFILL_ROWS = 1152
# The most prompts of a prefill on a GPU.
PREFILL_PROMPTS = 32


class Prompts:
    """Prefill prompts into the pages that a table names.

    With a number of `rows`, prompts are entered in groups of so many tokens at most; the rows behind them belong to no
    prompt. So each `run` makes the same launches on the same tensors. Without one, as on a CPU, each prompt is computed
    by itself, in as many rows as it has.

    Args:
        prefix_table: `[requests, prefix_pages]` int32, the pages of each prompt.
        rows: room for the longest prompt at least, or None.
        always: as for `PagedDecoder.prefill`.
    """

    def __init__(
        self, decoder: PagedDecoder, pages: KVPages, prefix_table: torch.Tensor, rows: int | None, always: bool
    ):
        self._decoder, self._pages, self._prefix_table, self._always = decoder, pages, prefix_table, always
        self._rows, self._most = rows, 1 if rows is None else min(PREFILL_PROMPTS, len(prefix_table))
        self._entered: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if rows is not None:
            embeds = prefix_table.new_zeros(rows, decoder.hidden_size, dtype=decoder.residual_dtype)
            bounds = prefix_table.new_zeros(self._most + 1)
            self._entered = embeds, bounds, torch.zeros_like(prefix_table[: self._most])

    def groups(self, prefills: list[Prefill]) -> Iterator[list[Prefill]]:
        """Yield the prefills in groups for `enter`."""
        group, tokens = [], 0
        for prefill in prefills:
            if group and (len(group) == self._most or tokens + prefill.prefix_len > (self._rows or 0)):
                yield group
                group, tokens = [], 0
            group.append(prefill)
            tokens += prefill.prefix_len
        if group:
            yield group

    def enter(self, group: list[Prefill], prompts: Mapping[Any, torch.Tensor]) -> None:
        """Copy a group for the next `run`; `prompts` has the embeddings `[prefix_len, hidden_size]` by key."""
        ends = np.cumsum([prefill.prefix_len for prefill in group])
        # Prompts that are missing have no rows.
        bounds = np.array([0, *ends, *[ends[-1]] * (self._most - len(group))])
        places = np.array([prefill.prefix_row for prefill in group] + [0] * (self._most - len(group)))
        bounds, places = to_device(self._prefix_table.device, bounds, places)
        if self._rows is None:
            embeds = prompts[group[0].key].to(self._prefix_table.device, self._decoder.residual_dtype)
            self._entered = embeds, bounds.int(), self._prefix_table[places]
            return
        assert self._entered is not None  # made with the object
        embeds, entered_bounds, tables = self._entered
        for prefill, end in zip(group, ends.tolist(), strict=True):
            embeds[end - prefill.prefix_len : end].copy_(prompts[prefill.key])
        entered_bounds.copy_(bounds)
        torch.index_select(self._prefix_table, 0, places, out=tables)

    @property
    def entered(self) -> Prompt:
        """Return the group that was entered last, of one prompt as on a CPU, for a step that enters it."""
        assert self._rows is None and self._entered is not None
        return Prompt(*self._entered)

    def run(self) -> None:
        """Prefill the group that was entered last, if there is one."""
        if self._entered is not None:
            embeds, bounds, tables = self._entered
            self._decoder.prefill(embeds, bounds, self._pages, tables, self._always)

    def clear(self) -> None:
        """Forget that group, so that `run` writes no page."""
        if self._rows is None:
            self._entered = None
        elif self._entered is not None:
            self._entered[1].zero_()
