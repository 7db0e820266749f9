"""Global memory: every access within its tensor, and every read and write ordered behind the last write of another.

A write that overtakes an earlier read of another thread is not found (docs/ptx.md).
"""

import numpy as np

from tests.ptx.atomics import perform
from tests.ptx.kinds import BITS, i8
from tests.ptx.transfers import space_of


def grain_of(kernel) -> int:
    """Return the bytes that notes on writers distinguish: the least that the kernel writes at once."""
    writes = (i for i in kernel.instructions() if i.op[0] in ("st", "atom", "red") and space_of(i.op) != "shared")
    return min((BITS.get(i.op[-1], 8) // 8 for i in writes), default=16)


def is_shared_with_others(i) -> bool:
    """Tell whether an instruction reads or writes memory that other CTAs may write or read."""
    return i.op[0] in ("ld", "st", "atom", "red") and space_of(i.op) in ("global", "generic") and "nc" not in i.op


class GlobalMemory:
    """A batch's view of global memory; notes on writers are the whole grid's."""

    def __init__(self, run, threads, dependent):
        self.memory, self.notes, self.t, self.dependent = run.memory, run.notes, threads, dependent
        self.checked = run.options.global_races
        self.fence = threads.fence

    def _places(self, base, offset, size, mask, line, what):
        address = base.view(i8) + i8(offset)

        def fail(kind, text, lanes):
            self.t.fail(f"global {what} {kind}", text, lanes, line)

        self.dependent.touches(mask, line)
        return address, *self.memory.places(address, size, mask, fail)

    def load(self, base, offset, mask, size, count, line, acquire=False, constant=False):
        """constant: ld.global.nc, of what nobody writes during the launch."""
        address, place, region = self._places(base, offset, size * count, mask, line, "read")
        if constant and self.checked:
            self._note_constant(address, region, size * count, mask, line)
        elif acquire:
            for lane in self.t.lanes_of(mask):
                self.t.acquire(int(place[lane]), lane)
        elif self.checked:
            self._check(address, region, size * count, mask, line, "read")
        found = self.memory.views[size, count][place >> i8((size * count).bit_length() - 1)]
        return (found,) if count == 1 else np.ascontiguousarray(found.T)

    def _note_constant(self, address, region, size, mask, line):
        cells, lanes = self._cells(address, region, size, mask)
        written = self.notes.writer[cells] >= 0
        if written.any():
            what = "a non-coherent read of what was written during the launch"
            self.t.fail("global race", what, self.t.mask_of(lanes[written]), line)
        self.notes.constant[cells] = True

    def _cells(self, address, region, size, mask):
        """Return the cells of the notes that the threads touch, and the thread of each."""
        lanes, grain = self.t.lanes_of(mask), self.notes.grain
        cells = (address[lanes] - self.memory.shadow_delta[region[lanes]]) // grain
        if (several := size // grain) <= 1:
            return cells, lanes
        return (cells[:, None] + np.arange(several)).ravel(), np.repeat(lanes, several)

    def read(self, source, offset, size, mask, line):
        """Read bytes `[n, size]`, for asynchronous copies."""
        address, place, region = self._places(source, offset, size, mask, line, "read")
        if self.checked:
            self._check(address, region, size, mask, line, "read")
        return self.memory.flat.reshape(-1, size)[place // size]

    def store(self, base, offset, mask, values, line, release=False):
        size, count = values[0].dtype.itemsize, len(values)
        address, place, region = self._places(base, offset, size * count, mask, line, "write")
        at = place >> i8((size * count).bit_length() - 1)
        data = values[0] if count == 1 else np.stack(values, 1)
        if mask is not None:
            at, data = at[mask], data[mask]
        view = self.memory.views[size, count]
        if self.checked:
            changes = np.ones(self.t.n, np.bool_)
            differ = view[at] != data
            changes[slice(None) if mask is None else mask] = differ if count == 1 else differ.any(1)
            self._check(address, region, size * count, mask, line, "write", changes)
        view[at] = data
        if self.checked and (view[at] != data).any():
            self.t.fail("global race", "threads write different values to one place at once", None, line)
        if release:
            for lane in self.t.lanes_of(mask):
                self.t.release(int(place[lane]), lane)

    def _check(self, address, region, size, mask, line, what, changes=None):
        """Check against the last writer: the thread itself, one ordered by a barrier, or one released and acquired."""
        t, notes = self.t, self.notes
        cells, lanes = self._cells(address, region, size, mask)
        if not len(lanes):
            return
        thread = t.cta[lanes] * t.threads + t.thread[lanes]
        foreign = (notes.writer[cells] >= 0) & (notes.writer[cells] != thread)
        if changes is not None:  # writing the same value again changes nothing for other threads
            foreign &= changes[lanes]
        if foreign.any():
            writer, lane, stamp = notes.writer[cells[foreign]], lanes[foreign], notes.stamp[cells[foreign]]
            fine = self._ordered(writer, lane, stamp)
            if not fine.all():
                first = writer[(~fine).nonzero()[0][0]]
                who = f"thread {int(first % t.threads)} of CTA {int(first // t.threads)}"
                bad = t.mask_of(lane[~fine])
                t.fail("global race", f"{what} of what {who} wrote, and nothing orders the two", bad, line)
        if what == "write":
            if (constant := notes.constant[cells]).any():
                text = "write to what was read non-coherently during the launch"
                t.fail("global race", text, t.mask_of(lanes[constant]), line)
            notes.writer[cells] = thread
            notes.stamp[cells] = t.stamp[lanes]

    def _ordered(self, writer, lane, stamp):
        t = self.t
        cta, warp = writer // t.threads, writer % t.threads // 32
        same = cta == t.cta[lane]
        fine = same & (~t.recent(stamp, lane) | ((warp == t.own_warp[lane]) & (stamp < t.stamp[lane])))
        for reader in np.unique(t.cta[lane[~same]]):
            if (known := t.known(reader)) is not None:
                mine = ~same & (t.cta[lane] == reader)
                fine[mine] = stamp[mine] < known[cta[mine], warp[mine]]
        return fine

    def atomic(self, base, offset, mask, name, kind, values, order, line):
        """Run one thread after another, in a random order (PTX ISA, "atom", "fence")."""
        size = np.dtype(kind).itemsize
        _, place, _ = self._places(base, offset, size, mask, line, "atomic")
        lanes = self.t.lanes_of(mask)
        self.t.rng.shuffle(lanes)

        def ordering(lane):
            self.t.acquire(int(place[lane]), lane, at_fence=order not in ("acquire", "acq_rel"))
            self.t.release(int(place[lane]), lane, of_fence=order not in ("release", "acq_rel"))

        return perform(self.memory.views[size, 1].view(kind), place // size, lanes, name, kind, values, ordering)
