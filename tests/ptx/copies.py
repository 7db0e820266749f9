"""Asynchronous copies from global to shared memory (PTX ISA, "cp.async" and its "commit_group" and "wait_group").

Nothing arrives before its group is waited for; until then the destination is nobody's to touch. Behind the wait only
the thread that copied sees the bytes; others need a barrier.
"""

from dataclasses import dataclass

import numpy as np

from tests.ptx.kinds import i8, u1


@dataclass
class _Copy:
    """mask: whose it is. data: `[n, size]` bytes for the places in shared memory."""

    mask: np.ndarray
    place: np.ndarray
    data: np.ndarray
    size: int


@dataclass
class _Group:
    """mask: the threads whose group this still is."""

    mask: np.ndarray
    copies: list[_Copy]


class Copies:
    """Each thread has its own groups; those of threads that commit together are kept together."""

    def __init__(self, threads, shared_memory, global_memory):
        self.t, self.shared, self.wide = threads, shared_memory, global_memory
        self.open: list[_Copy] = []
        self.groups: list[_Group] = []

    def _mask(self, mask):
        return np.ones(self.t.n, np.bool_) if mask is None else mask.copy()

    def copy(self, to, to_offset, source, source_offset, size, taken, mask, line):
        """taken: bytes that are read; zeros are written for the others."""
        place = self.shared.places(to.astype(i8) + i8(to_offset), size, mask, line)
        here = self._mask(mask)
        reads = here if taken is None else here & (taken > 0)
        if taken is not None and (reads & (taken != size)).any():
            raise NotImplementedError(f"line {line}: part of a copy")
        data = np.where(reads[:, None], self.wide.read(source, source_offset, size, reads, line), u1(0))
        self.shared.note_write(place, size, mask, line)
        cells, _ = self.shared.cells(place, size, mask)
        self.shared.in_flight[cells] = True
        self.shared.any_in_flight = True
        self.open.append(_Copy(here, place, data, size))

    def commit(self, mask):
        everyone = self._mask(mask)
        mine = [_Copy(copy.mask & everyone, copy.place, copy.data, copy.size) for copy in self.open]
        rest = [_Copy(copy.mask & ~everyone, copy.place, copy.data, copy.size) for copy in self.open]
        self.open = [copy for copy in rest if copy.mask.any()]
        self.groups.append(_Group(everyone, mine))

    def wait(self, left, mask):
        """For all groups but the `left` newest of each thread."""
        everyone, newer = self._mask(mask), np.zeros(self.t.n, i8)
        for group in reversed(self.groups):
            done = everyone & group.mask & (newer >= left)
            newer += group.mask
            if done.any():
                for copy in group.copies:
                    self._arrive(copy, done & copy.mask)
                group.mask = group.mask & ~done
        self.groups = [group for group in self.groups if group.mask.any()]

    def _arrive(self, copy, now):
        shared = self.shared
        shared.bytes.reshape(-1, copy.size)[copy.place[now] // copy.size] = copy.data[now]
        cells, lanes = shared.cells(copy.place, copy.size, now)
        shared.in_flight[cells] = False
        shared.writer[cells], shared.written[cells] = self.t.thread[lanes], self.t.stamp[lanes]
