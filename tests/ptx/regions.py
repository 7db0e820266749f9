"""Global memory as regions of the host's, each at an address far from all others, so that every overrun is seen."""

import ctypes

import numpy as np

from tests.ptx.kinds import i8, u1, u2, u4, u8

_SHIFT = 40
#: Where shared memory lies among generic addresses (PTX ISA, "Generic Addressing").
SHARED_WINDOW = 200 << _SHIFT
#: The address of the first region, which holds the module's variables.
FIRST = 1 << _SHIFT


class Fault(AssertionError):
    """A forbidden act of a kernel."""


class Memory:
    """Regions are added; after `freeze`, addresses become places in one flat array over all of them."""

    def __init__(self):
        self.names, self.hosts, self.sizes, self._kept = ["null"], [0], [0], []

    def add(self, name: str, host: int, size: int, keep=None) -> int:
        """Return the address under which a kernel sees these bytes; its last twelve bits are those of the host's."""
        self.names.append(name)
        self.hosts.append(host)
        self.sizes.append(size)
        self._kept.append(keep)
        return (len(self.names) - 1 << _SHIFT) | (host & 0xFFF)

    def add_bytes(self, name: str, raw: bytes) -> int:
        array = np.zeros(len(raw) + 4096 + 16, u1)
        start = -array.ctypes.data % 4096
        array[start : start + len(raw)] = np.frombuffer(raw, u1)
        return self.add(name, array.ctypes.data + start, len(raw), array)

    def freeze(self):
        hosts, sizes = np.array(self.hosts, i8), np.array(self.sizes, i8)
        real = [i for i in range(1, len(hosts)) if sizes[i]]
        self._empty = np.zeros(128, u1)
        base = min((self.hosts[i] for i in real), default=self._empty.ctypes.data + 63) // 64 * 64
        span = max((self.hosts[i] + self.sizes[i] for i in real), default=base) - base
        span = -(-max(span, 64) // 64) * 64
        self.virtual = (np.arange(len(hosts), dtype=i8) << _SHIFT) | (hosts & 0xFFF)
        self.ends = self.virtual + sizes
        self.delta = self.virtual - (hosts - base)  # an address less this is its place
        self.flat = np.frombuffer((ctypes.c_uint8 * int(span)).from_address(base), u1)
        self.views = {}
        for size, kind in ((1, u1), (2, u2), (4, u4), (8, u8)):
            typed = self.flat.view(kind)
            for count in (1, 2, 4, 8):
                if size * count <= 32:
                    self.views[size, count] = typed if count == 1 else typed.reshape(-1, count)
        self._lay_shadow(real)

    def _lay_shadow(self, real):
        """Lay notes on writers densely: hosts' intervals without the gaps between them."""
        self.shadow_delta = np.zeros(len(self.hosts), i8)
        at, begin, end = 0, None, None
        for i in sorted(real, key=lambda i: self.hosts[i]):
            if begin is None or self.hosts[i] >= end:
                at += 0 if begin is None else -(-(end - begin) // 64) * 64
                begin = end = self.hosts[i] // 64 * 64
            end = max(end, self.hosts[i] + self.sizes[i])
            self.shadow_delta[i] = self.virtual[i] - (at + self.hosts[i] - begin)
        self.shadow_size = at + (0 if begin is None else -(-(end - begin) // 64) * 64) + 64

    def places(self, address, size, mask, fail):
        """Flat places of `size` bytes at addresses (int64), 0 where the mask is off; and the regions.

        `fail(kind, what, lanes)` is told of those that lie outside of their region or are not a multiple of the size.
        """
        region = address >> _SHIFT
        region = np.where((region > 0) & (region < len(self.names)), region, 0)
        bad = (address < self.virtual[region]) | (address + size > self.ends[region]) | (region == 0)
        bad |= (address & (size - 1)) != 0
        if mask is not None:
            bad &= mask
        if bad.any():
            lane = int(bad.nonzero()[0][0])
            at, near = int(address[lane]), int(region[lane])
            near = near or min(max(at >> _SHIFT, 0), len(self.names) - 1)
            what = f"{at - int(self.virtual[near])} of {self.sizes[near]} bytes of {self.names[near]}"
            fail("misaligned" if at & (size - 1) else "out of bounds", f"{size} bytes at {what}", bad)
            mask = ~bad if mask is None else mask & ~bad
        place = address - self.delta[region]
        return (place if mask is None else np.where(mask, place, 0)), region
