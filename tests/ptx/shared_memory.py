"""Shared memory: every access stays within the CTA's own, reads only written cells, and is ordered by barriers.

Notes are kept of the last writer of each cell, and of the last reader of each warp. Generic addresses are resolved here
too (PTX ISA, "Generic Addressing").
"""

import numpy as np

from tests.ptx.atomics import perform
from tests.ptx.kinds import BITS, f4, i8, u1, u2, u4, u8
from tests.ptx.regions import SHARED_WINDOW
from tests.ptx.transfers import space_of

_WINDOW_BITS = 40
NOBODY, SEVERAL = -1, -2
# The largest difference of copies of one float32, as a part of the largest that is written.
_NEAR = 1e-5


def grain_of(kernel) -> int:
    """Return the bytes that notes distinguish: the least that the kernel reads or writes at once."""
    sizes = [16]
    for i in kernel.instructions():
        if i.op[0] in ("ld", "st", "atom", "red") and space_of(i.op) in ("shared", "generic"):
            sizes.append(BITS.get(i.op[-1], 8) // 8)
        if i.op[:2] == ["cp", "async"] and len(i.args) > 2:
            sizes.append(int(i.args[2], 0))
    return min(sizes)


class SharedMemory:
    """The shared memory of the CTAs of a batch, one behind the other."""

    def __init__(self, run, threads):
        self.t, self.options, self.size = threads, run.options, run.shared
        self.stride = -(-run.shared // 64) * 64 + 64
        self.base = threads.slot.astype(i8) * self.stride
        self.bytes = np.zeros(len(threads.ctas) * self.stride, u1)
        self.views = {}
        for size, kind in ((1, u1), (2, u2), (4, u4), (8, u8)):
            for count in (1, 2, 4, 8, 16):
                if size * count <= 16:
                    typed = self.bytes.view(kind)
                    self.views[size, count] = typed if count == 1 else typed.reshape(-1, count)
        self.grain = grain_of(run.program.kernel)
        cells = len(self.bytes) // self.grain
        self.writer, self.written = np.full(cells, NOBODY, i8), np.full(cells, -1, i8)
        self.last_read = np.full(cells, -1, i8)  # by any thread
        self.read, self.reader = (np.full((threads.warps, cells), -1, i8) for _ in range(2))
        self.copies_differ = run.report.copies_differ
        self.in_flight = np.zeros(cells, np.bool_)  # an asynchronous copy has yet to write it
        self.products = np.zeros(cells, i8)  # asynchronous products that may yet read it
        self.any_in_flight = self.any_products = False
        self.proxy = Proxy(threads, cells)

    def places(self, address, size, mask, line):
        """Return places in `bytes` of `size` bytes at addresses (int64) in the CTA's shared memory."""
        bad = (address < 0) | (address + size > self.size) | ((address & (size - 1)) != 0)
        if mask is not None:
            bad &= mask
        if bad.any():
            at = int(address[bad][0])
            kind = "misaligned" if at & (size - 1) else "out of bounds"
            self.t.fail(f"shared memory {kind}", f"{size} bytes at {at} of {self.size}", bad, line)
        place = address + self.base
        return place if mask is None else np.where(mask, place, 0)

    def cells(self, place, size, mask):
        """Return the cells that the threads touch, and the thread of each."""
        lanes = self.t.lanes_of(mask)
        start = place[lanes] // self.grain
        if (several := size // self.grain) <= 1:
            return start, lanes
        return (start[:, None] + np.arange(several)).ravel(), np.repeat(lanes, several)

    def load(self, base, offset, mask, size, count, line, acquire=False):
        place = self.places(base.astype(i8) + i8(offset), size * count, mask, line)
        self.note_read(place, size * count, mask, line)
        found = self.views[size, count][place >> i8((size * count).bit_length() - 1)]
        return (found,) if count == 1 else np.ascontiguousarray(found.T)

    def store(self, base, offset, mask, values, line, release=False):
        size, count = values[0].dtype.itemsize, len(values)
        place = self.places(base.astype(i8) + i8(offset), size * count, mask, line)
        at = place >> i8((size * count).bit_length() - 1)
        data = values[0] if count == 1 else np.stack(values, 1)
        if mask is not None:
            at, data = at[mask], data[mask]
        view = self.views[size, count]
        differ = view[at] != data
        self.note_write(place, size * count, mask, line, differ if count == 1 else differ.any(1))
        view[at] = data
        if (view[at] != data).any():
            self._disagree(view, at, data, line)

    def _disagree(self, view, at, data, line):
        """Raise for threads that write different values to one place at once, except for copies of one float32.

        Where several lanes hold the same element of a tensor, Triton lets each compute and write it. Their last bits
        differ where a product was fused into the sum of one lane and not of another. Which stays is undefined: that of
        the last lane here or, by option, one that is drawn; the run's summary names the place.
        """
        near = data.dtype == u4
        if near:
            mine, kept = data.view(f4), view[at].view(f4)
            near = (np.abs(mine - kept) <= _NEAR * np.abs(mine).max()).all()
        if near:
            self.copies_differ.add(line)
            if self.options.random_copies:
                order = self.t.rng.permutation(len(at))
                view[at[order]] = data[order]
        elif self.options.races:
            self.t.fail("shared memory race", "threads write different values to one place at once", None, line)

    def atomic(self, base, offset, mask, name, kind, values, order, line):
        """Run threads in a random order; races with it are not judged."""
        size = np.dtype(kind).itemsize
        place = self.places(base.astype(i8) + i8(offset), size, mask, line)
        cells, lanes = self.cells(place, size, mask)
        if (self.writer[cells] == NOBODY).any():
            self.t.fail("shared memory", "atomic on what nobody has written", None, line)
        self.written_by(cells, lanes)
        self.written[cells] = -1
        order_of = self.t.lanes_of(mask)
        self.t.rng.shuffle(order_of)
        view = self.views[size, 1].view(kind)
        return perform(view, place // size, order_of, name, kind, values, lambda lane: None)

    # --- notes --------------------------------------------------------------------------------------------------------

    def note_read(self, place, size, mask, line):
        t = self.t
        cells, lanes = self.cells(place, size, mask)
        if not len(cells):
            return
        writer, stamp = self.writer[cells], self.written[cells]
        if (writer == NOBODY).any():
            t.fail("shared memory", "read of what nobody has written", t.mask_of(lanes[writer == NOBODY]), line)
        if self.any_in_flight and (early := self.in_flight[cells]).any():
            what = "read of what an asynchronous copy has yet to bring"
            t.fail("shared memory race", what, t.mask_of(lanes[early]), line)
        if not self.options.races:
            return
        recent = (writer != t.thread[lanes]) & t.recent(stamp, lanes)
        if recent.any():
            wrong = ~t.ordered(stamp[recent], writer[recent] // 32, lanes[recent])
            if wrong.any():
                what = f"read of what thread {int(writer[recent][wrong][0])} wrote, no barrier between"
                t.fail("shared memory race", what, t.mask_of(lanes[recent][wrong]), line)
        self.last_read[cells] = t.stamp[lanes]
        warp, thread = t.own_warp[lanes], t.thread[lanes]
        self.read[warp, cells] = t.stamp[lanes]
        self.reader[warp, cells] = thread
        several = self.reader[warp, cells] != thread
        self.reader[warp[several], cells[several]] = SEVERAL

    def note_write(self, place, size, mask, line, changes=None):
        """Note a write; `changes`: the threads that are here and write another value than lies there."""
        t = self.t
        cells, lanes = self.cells(place, size, mask)
        if not len(cells):
            return
        if self.options.races:
            if self.any_in_flight and self.in_flight[cells].any():
                t.fail("shared memory race", "write to where an asynchronous copy is on its way", None, line)
            if self.any_products and self.products[cells].any():
                t.fail("shared memory race", "write to what a product that was not waited for reads", None, line)
            self._check_readers(cells, lanes, line)
            writer, stamp = self.writer[cells], self.written[cells]
            clash = (writer != t.thread[lanes]) & (writer != NOBODY) & t.recent(stamp, lanes)
            if changes is not None:
                clash &= np.repeat(changes, len(cells) // len(changes))
            if clash.any():
                wrong = ~t.ordered(stamp[clash], writer[clash] // 32, lanes[clash])
                if wrong.any():
                    what = "write to what another thread wrote, no barrier between"
                    t.fail("shared memory race", what, t.mask_of(lanes[clash][wrong]), line)
        self.written_by(cells, lanes)

    def written_by(self, cells, lanes):
        self.writer[cells], self.written[cells] = self.t.thread[lanes], self.t.stamp[lanes]
        self.proxy.written[cells] = self.proxy.count

    def read_by(self, cells, lane):
        """Note a read by the warp that begins with this thread, as a whole."""
        warp, stamp = self.t.own_warp[lane], self.t.stamp[lane]
        self.last_read[cells] = np.maximum(self.last_read[cells], stamp)
        self.read[warp, cells], self.reader[warp, cells] = stamp, SEVERAL

    def _check_readers(self, cells, lanes, line):
        t = self.t
        read = t.recent(self.last_read[cells], lanes)
        if not read.any():
            return
        cells, lanes = cells[read], lanes[read]
        for warp in range(t.warps):
            stamp, reader = self.read[warp, cells], self.reader[warp, cells]
            clash = (reader != t.thread[lanes]) & t.recent(stamp, lanes)
            if clash.any():
                wrong = ~t.ordered(stamp[clash], np.full(clash.sum(), warp), lanes[clash])
                if wrong.any():
                    what = f"write to what warp {warp} reads, no barrier between"
                    t.fail("shared memory race", what, t.mask_of(lanes[clash][wrong]), line)


class Proxy:
    """The writes that a fence.proxy.async has made visible to asynchronous products (PTX ISA, "Async Proxy").

    written: of each cell, the count of fences when it was written. fenced: of each thread, the count at its own last
    fence; stamp: and what it had passed then.
    """

    def __init__(self, threads, cells):
        self.t, self.count = threads, 0
        self.written = np.zeros(cells, i8)
        self.fenced, self.stamp = np.full(threads.n, -1, i8), np.full(threads.n, -1, i8)

    def fence(self, mask):
        self.count += 1
        here = slice(None) if mask is None else mask
        self.fenced[here], self.stamp[here] = self.count, self.t.stamp[here]


class GenericMemory:
    """Addresses without a space: an instruction's threads must all mean the same one."""

    def __init__(self, threads, shared_memory, global_memory):
        self.t, self.shared, self.wide = threads, shared_memory, global_memory

    def _of(self, base, offset, mask, line):
        """Return the memory that is meant, and the address in it."""
        address = base.view(i8) + i8(offset)
        shared = address >> _WINDOW_BITS == SHARED_WINDOW >> _WINDOW_BITS
        here = shared if mask is None else shared[mask]
        if not here.any():
            return self.wide, base, offset
        if not here.all():
            raise NotImplementedError(f"line {line}: one instruction on two spaces")
        return self.shared, (address & i8(2**_WINDOW_BITS - 1)).view(u8), 0

    def load(self, base, offset, mask, size, count, line, acquire=False):
        memory, base, offset = self._of(base, offset, mask, line)
        return memory.load(base, offset, mask, size, count, line, acquire)

    def store(self, base, offset, mask, values, line, release=False):
        memory, base, offset = self._of(base, offset, mask, line)
        memory.store(base, offset, mask, values, line, release)

    def atomic(self, base, offset, mask, name, kind, values, order, line):
        memory, base, offset = self._of(base, offset, mask, line)
        return memory.atomic(base, offset, mask, name, kind, values, order, line)
