"""Paged keys and values: pages dealt at random, unused slots poisoned."""

from dataclasses import dataclass

import torch

from tests.kit.inputs import generator, random


@dataclass
class Stored:
    """Sequences laid into pages: `table` `[rows, width]` int32, and what row i holds, `k[i]`, `v[i]`
    `[length, num_heads, head_dim]`."""

    table: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]


class PagePool:
    """Pages `k`, `v` `[num_pages, page_size, num_heads, head_dim]` full of large random numbers, without an owner.

    A read of a slot that no sequence fills shows in the result.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_heads: int,
        head_dim: int,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.types.Device = "cpu",
    ):
        shape = (num_pages, page_size, num_heads, head_dim)
        self.k = random(*shape, seed=seed, dtype=dtype, scale=100.0, device=device)
        self.v = random(*shape, seed=seed + 1, dtype=dtype, scale=100.0, device=device)
        self._free = torch.randperm(num_pages, generator=generator(seed + 2)).tolist()
        self._seed = seed + 3

    def store(self, lengths: list[int], room: int = 0) -> Stored:
        """Store random sequences; each row owns pages for its length and `room` slots more.

        Table entries past a row's pages point at a page of nobody.
        """
        page_size, num_heads, head_dim = self.k.shape[1:]
        device = self.k.device
        counts = [-(-(length + room) // page_size) for length in lengths]
        nobody = self._free.pop()
        table = torch.full((len(lengths), max(counts) + 1), nobody, dtype=torch.int32, device=device)
        stored = Stored(table, [], [])
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            owned = [self._free.pop() for _ in range(count)]
            table[row, :count] = torch.tensor(owned, dtype=torch.int32, device=device)
            for pages, kept in ((self.k, stored.k), (self.v, stored.v)):
                kept.append(random(length, num_heads, head_dim, seed=self._seed, dtype=pages.dtype, device=device))
                self._seed += 1
                for place, entry in enumerate(kept[-1]):
                    pages[owned[place // page_size], place % page_size] = entry
        return stored
