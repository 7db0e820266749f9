"""wgmma: products of four warps that end later (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", sm_90).

A sum arrives in its registers when its group is waited for. Until then no thread may touch them, or write the shared
memory that is read. Registers that other instructions wrote need a wgmma.fence first, shared memory that they wrote a
fence.proxy.async behind the write or, behind a barrier, before the product ("Async Proxy").
"""

from dataclasses import dataclass

import numpy as np

from tests.ptx.groups import Groups
from tests.ptx.kinds import f4, u4
from tests.ptx.matrices import accumulator, lanes, left_operand, numbers, rounded
from tests.ptx.shared_memory import NOBODY

#: Of a descriptor's layout ("Matrix Descriptor"): the bytes of a row of eight, which are also those that swizzle.
_ROW = {0: 16, 1: 128, 2: 64, 3: 32}


@dataclass
class _Product:
    """mask: whose it is. registers: of the sum. operands: all registers in use. cells: read, a row a warpgroup."""

    mask: np.ndarray
    registers: tuple[int, ...]
    operands: frozenset[int]
    cells: np.ndarray
    warpgroups: np.ndarray


def descriptor(word: int):
    """Start, leading byte offset, stride byte offset, and bytes of a row."""
    assert word >> 49 & 7 == 0, "a base offset"
    return (word & 0x3FFF) << 4, (word >> 16 & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4, _ROW[word >> 62]


def chunks(word: int, count: int, across: bool) -> np.ndarray:
    """Return addresses of the 16-byte chunks of an operand (see "Strides" and "Canonical Layouts").

    Not across: `[count, 2]`, of each row (m or n) its 32 bytes along k. Across: `[16, count / 8]`, of each k the chunks
    along m or n.
    """
    start, leading, stride, row = descriptor(word)
    if not across:
        rows, parts = np.arange(count)[:, None], np.arange(2)
        offset = rows % 8 * row + rows // 8 * stride + parts * (leading if row == 16 else 16)
    else:
        depth, parts, of = np.arange(16)[:, None], np.arange(count // 8), row // 16
        first, second = (stride, leading) if row == 16 else (leading, stride)
        offset = depth % 8 * row + depth // 8 * second + parts % of * 16 + parts // of * first
    address = start + offset
    return address ^ (address >> 3 & (row - 16))


class Warpgroups:
    def __init__(self, threads, shared_memory, registers):
        self.t, self.shared, self.registers = threads, shared_memory, registers
        self.groups = Groups(threads.n)
        self.commit = self.groups.commit
        self.pending: dict[int, np.ndarray] = {}  # a register to what it will hold
        self.busy: dict[int, np.ndarray] = {}  # a register to the threads for which it is in use
        self.dirty: dict[int, np.ndarray] = {}  # a register to the threads that have written it since their last fence

    # --- what other instructions do -----------------------------------------------------------------------------------

    def touch(self, read, written, mask, line):
        """Check registers of products in another instruction."""
        if self.busy:
            for register in (*read, *written):
                if (busy := self.busy.get(register)) is not None and (busy if mask is None else busy & mask).any():
                    self.t.fail("wgmma", "a register is touched before its product was waited for", busy, line)
        for register in written:
            here = np.ones(self.t.n, np.bool_) if mask is None else mask
            self.dirty[register] = here | self.dirty.get(register, False)

    def fence(self, mask):
        """Do wgmma.fence."""
        self.dirty = {} if mask is None else {r: m & ~mask for r, m in self.dirty.items() if (m & ~mask).any()}

    # --- products -----------------------------------------------------------------------------------------------------

    def product(self, n, kind, target, a, a_across, b, b_across, scale, signs, mask, line):
        """Begin a product.

        target: indices of the sum's registers. a: indices, or an array of descriptors, as `b` is.
        scale: whether the former sum is added, an array of bools. signs: of `a` and `b`.
        """
        t = self.t
        if mask is not None and not t.whole(mask, 128):
            t.fail("divergence", "part of a warpgroup at a product of the whole", mask, line)
        held = () if isinstance(a, np.ndarray) else tuple(a)
        self._check_registers((*target, *held), held, mask, line)
        warps = np.arange(t.n // 32) if mask is None else mask.reshape(-1, 32).any(1).nonzero()[0]
        groups = warps[::4] // 4
        if isinstance(a, np.ndarray):
            left, cells = self._operand(a, 64, kind, a_across, groups, mask, line)
        else:
            words = [self.registers[index].reshape(-1, 32)[warps] for index in a]
            left, cells = left_operand(words, kind).reshape(len(groups), 64, -1), None
        right, more = self._operand(b, n, kind, b_across, groups, mask, line)
        cells = more if cells is None else np.concatenate([cells, more], 1)
        done = (signs[0] * signs[1] * (left @ right.transpose(0, 2, 1))).reshape(len(warps), 16, n)
        before = [self._sum(index).reshape(-1, 32)[warps] for index in target]
        added = scale.reshape(-1, 32)[warps, :1, None]
        total = rounded(np.where(added, accumulator(before).view(f4) + done, done), t.options.rounding).view(u4)
        here = self.groups.mask(mask)
        for index, word in zip(target, lanes(total), strict=True):
            whole = self._sum(index).copy()
            whole.reshape(-1, 32)[warps] = word
            self.pending[index] = whole
        for index in (*target, *held):
            self.busy[index] = here | self.busy.get(index, False)
        for mine in cells:  # two warpgroups of a CTA may read the same
            self.shared.products[mine] += 1
        self.shared.any_products = True
        self.groups.begin(_Product(here, tuple(target), frozenset((*target, *held)), cells, groups))

    def _sum(self, index):
        """Return a register's value or, for threads whose product is under way, its future value."""
        if index not in self.pending:
            return self.registers[index]
        return np.where(self.busy[index], self.pending[index], self.registers[index])

    def _check_registers(self, every, held, mask, line):
        for index in every:
            if (dirty := self.dirty.get(index)) is not None and (dirty if mask is None else dirty & mask).any():
                self.t.fail("wgmma", "registers were written since the last wgmma.fence", dirty, line)
        for index in held:
            if index in self.pending:
                self.t.fail("wgmma", "an operand is a sum that was not waited for", mask, line)

    def _operand(self, words, count, kind, across, groups, mask, line):
        """Return numbers `[groups, count, k]` and the cells that hold them."""
        t, shared = self.t, self.shared
        mine = words.reshape(-1, 128)[groups]
        if (mine != mine[:, :1]).any():
            t.fail("wgmma", "descriptors differ within a warpgroup", mask, line)
        layouts = {int(word): chunks(int(word), count, across) for word in np.unique(mine[:, 0])}
        address = np.stack([layouts[int(word)] for word in mine[:, 0]])  # [groups, ...]
        if (address < 0).any() or (address + 16 > shared.size).any():
            t.fail("shared memory out of bounds", f"an operand of {shared.size} bytes", mask, line)
        place = address + shared.base[groups * 128].reshape(-1, 1, 1)
        cells = (place.reshape(len(groups), -1, 1) // shared.grain + np.arange(max(16 // shared.grain, 1))).reshape(
            len(groups), -1
        )
        self._check_cells(cells, groups, line)
        raw = shared.bytes.reshape(-1, 16)[place // 16]  # [groups, rows, chunks, 16]
        found = numbers(raw.reshape(*raw.shape[:2], -1), kind)
        return (found.transpose(0, 2, 1) if across else found), cells

    def _check_cells(self, cells, groups, line):
        t, shared = self.t, self.shared
        for cell, group in zip(cells, groups, strict=True):
            lane, mine = group * 128, t.mask_of(np.arange(group * 128, group * 128 + 128))
            writer, stamp = shared.writer[cell], shared.written[cell]
            if (writer == NOBODY).any():
                t.fail("shared memory", "a product of what nobody has written", mine, line)
            if shared.any_in_flight and shared.in_flight[cell].any():
                t.fail("shared memory race", "a product of what an asynchronous copy has yet to bring", mine, line)
            if not t.options.races:
                continue
            for warp in range(4):
                first = np.full(len(cell), lane + 32 * warp)
                recent = t.recent(stamp, first)
                if recent.any() and not t.ordered(stamp[recent], writer[recent] // 32, first[recent]).all():
                    t.fail("shared memory race", "a product of what was just written, no barrier between", mine, line)
            whose = writer + t.slot[lane] * t.threads
            seen = shared.proxy.fenced[whose] > shared.proxy.written[cell]
            seen |= t.behind_a_barrier(stamp, shared.proxy.stamp[lane : lane + 128].min())
            if not seen.all():
                t.fail("wgmma", "shared memory was written, and no fence.proxy.async lies between", mine, line)

    def wait(self, left, mask):
        """wgmma.wait_group: the sums arrive, and operands may be written again, behind a barrier by other threads."""
        shared, ended = self.shared, self.groups.wait(left, mask)
        for product, now in ended:
            for index in product.registers:
                self.registers[index] = np.where(now, self.pending[index], self.registers[index])
            whole = now.reshape(-1, 128).all(1)
            for cells, group in zip(product.cells, product.warpgroups, strict=True):
                if whole[group]:
                    shared.products[cells] -= 1
                    for warp in range(4):
                        shared.read_by(cells, group * 128 + 32 * warp)
        self._settle({index for product, _ in ended for index in product.operands})

    def _settle(self, operands):
        """Free registers that no younger product uses."""
        left = [(p, p.mask & group.mask) for group in self.groups.groups for p in group.begun]
        left += [(p, p.mask) for p in self.groups.open]
        for index in operands:
            users = [mask for product, mask in left if index in product.operands]
            self.busy.pop(index)
            if users and np.logical_or.reduce(users).any():
                self.busy[index] = np.logical_or.reduce(users)
            else:
                self.pending.pop(index, None)
