"""Asynchronous copies from global to shared memory (PTX ISA, "cp.async" and its "commit_group" and "wait_group").

Nothing arrives before its group is waited for; until then no thread may touch the destination. After the wait only
the thread that copied sees the bytes; others need a barrier.
"""

from dataclasses import dataclass

import numpy as np

from tests.ptx.groups import Groups
from tests.ptx.kinds import i8, u1


@dataclass
class _Copy:
    """mask: whose it is. data: `[n, size]` bytes for the places in shared memory."""

    mask: np.ndarray
    place: np.ndarray
    data: np.ndarray
    size: int


class Copies:
    def __init__(self, threads, shared_memory, global_memory):
        self.t, self.shared, self.wide = threads, shared_memory, global_memory
        self.groups = Groups(threads.n)
        self.commit = self.groups.commit

    def copy(self, to, to_offset, source, source_offset, size, taken, mask, line):
        """Begin a copy; `taken`: bytes that are read; zeros are written for the others."""
        place = self.shared.places(to.astype(i8) + i8(to_offset), size, mask, line)
        here = self.groups.mask(mask)
        reads = here if taken is None else here & (taken > 0)
        if taken is not None and (reads & (taken != size)).any():
            raise NotImplementedError(f"line {line}: part of a copy")
        data = np.where(reads[:, None], self.wide.read(source, source_offset, size, reads, line), u1(0))
        self.shared.note_write(place, size, mask, line)
        cells, _ = self.shared.cells(place, size, mask)
        self.shared.in_flight[cells] = True
        self.shared.any_in_flight = True
        self.groups.begin(_Copy(here, place, data, size))

    def wait(self, left, mask):
        """Wait for all groups except the `left` newest of each thread."""
        shared = self.shared
        for copy, now in self.groups.wait(left, mask):
            shared.bytes.reshape(-1, copy.size)[copy.place[now] // copy.size] = copy.data[now]
            cells, lanes = shared.cells(copy.place, copy.size, now)
            shared.in_flight[cells] = False
            shared.written_by(cells, lanes)
