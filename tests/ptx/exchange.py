"""Joint operations of a warp's lanes: they exchange words, vote, load matrices and multiply them.

PTX ISA, "Parallel Synchronization and Communication Instructions" (vote.sync, redux.sync, bar.warp.sync), "shfl.sync"
and "Warp Level Matrix Instructions". Every lane in the member mask must be there.
"""

import numpy as np

from tests.ptx import matrices
from tests.ptx.kinds import i8, u2, u4

_ALL = u4(0xFFFFFFFF)
_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _packed(yes):
    """Return the bits of a warp's lanes as a word, for each lane."""
    return np.repeat((yes.reshape(-1, 32).astype(u4) << np.arange(32, dtype=u4)).sum(1, dtype=u4), 32)


class Exchange:
    def __init__(self, threads, shared_memory):
        self.t, self.shared = threads, shared_memory

    def _check_members(self, members, mask, line):
        """Expect each lane, and all that its mask names and that have not exited, to be here with the same mask."""
        t, here = self.t, np.ones(self.t.n, np.bool_) if mask is None else mask
        if (members[here] == _ALL).all() and (mask is None or t.whole(mask)):
            return
        mine, here, live = (part.reshape(-1, 32) for part in (members, here, t.live))
        named = ((mine[:, :, None] >> np.arange(32, dtype=u4)) & u4(1)).astype(np.bool_)  # [warps, by, whom]
        away = named & live[:, None] & (~here[:, None] | (mine[:, :, None] != mine[:, None]))
        wrong = (here & (away.any(2) | ~named.diagonal(0, 1, 2))).ravel()
        if wrong.any():
            t.fail("divergence", "lanes of the member mask are elsewhere, or name others", wrong, line)

    def _check_whole(self, members, mask, line):
        """Refuse what is modelled for whole warps alone."""
        self._check_members(members, mask, line)
        here = slice(None) if mask is None else mask
        if (members[here] != _ALL).any() or not self.t.live.reshape(-1, 32)[np.unique(self.t.warp[here])].all():
            raise NotImplementedError(f"line {line}: part of a warp")

    def sync(self, members, mask, line):
        self._check_whole(members, mask, line)
        self.t.warps_met(mask)

    def shuffle(self, mode, a, b, c, members, mask, line):
        """Return the word of another lane, and whether it is within the segment; a lane without one gets its own."""
        self._check_members(members, mask, line)
        lane, b, clamp = self.t.lane, (b & u4(31)).astype(i8), (c & u4(31)).astype(i8)
        segment = ((c >> u4(8)) & u4(31)).astype(i8)
        lowest, end = lane & segment, (lane & segment) | (clamp & ~segment)
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
        inside = source >= end if mode == "up" else source <= end
        source = np.where(inside, source, lane) + self.t.warp_base
        if mask is not None and (mask & ~mask[source]).any():
            self.t.fail("divergence", "a shuffle reads a lane that is elsewhere", mask & ~mask[source], line)
        return a[source], inside

    def reduce(self, name, a, members, mask, line):
        self._check_whole(members, mask, line)
        return np.repeat(_REDUCTIONS[name].reduce(a.reshape(-1, 32), 1, dtype=a.dtype), 32)

    def vote(self, name, a, members, mask, line):
        self._check_members(members, mask, line)
        yes = _packed(a if mask is None else a & mask) & members
        if name == "ballot":
            return yes
        return yes != 0 if name == "any" else yes == members & self.active(mask)

    def active(self, mask):
        return _packed(np.ones(self.t.n, np.bool_) if mask is None else mask)

    # --- matrices -----------------------------------------------------------------------------------------------------

    def load_matrix(self, base, offset, count, transposed, mask, line):
        """ldmatrix: lanes 8 m to 8 m + 7 name the rows of matrix m, 16 bytes each; lane 4 g + t gets word t of g."""
        t = self.t
        t.check_whole_warps(mask, line)
        used = t.lane < 8 * count
        used = used if mask is None else used & mask
        place = self.shared.places(base.astype(i8) + i8(offset), 16, used, line)
        self.shared.note_read(place, 16, used, line)  # as of the lane that names the row: the reader is the warp
        rows = self.shared.views[4, 4][place >> i8(4)].reshape(-1, 32, 4)[:, : 8 * count].reshape(-1, count, 8, 4)
        if transposed:
            halves = np.ascontiguousarray(rows).view(u2).reshape(-1, count, 8, 8)
            rows = np.ascontiguousarray(halves.transpose(0, 1, 3, 2)).view(u4)
        return [np.ascontiguousarray(rows[:, i]).reshape(t.n) for i in range(count)]

    def store_matrix(self, base, offset, words, transposed, mask, line):
        """stmatrix: `load_matrix` the other way."""
        t, count = self.t, len(words)
        t.check_whole_warps(mask, line)
        used = t.lane < 8 * count
        used = used if mask is None else used & mask
        rows = np.stack([word.reshape(-1, 8, 4) for word in words], 1)  # [warps, count, 8, 4]
        if transposed:
            halves = np.ascontiguousarray(rows).view(u2).reshape(-1, count, 8, 8)
            rows = np.ascontiguousarray(halves.transpose(0, 1, 3, 2)).view(u4)
        whole = np.zeros((t.n // 32, 32, 4), u4)
        whole[:, : 8 * count] = rows.reshape(-1, 8 * count, 4)
        self.shared.store(base, offset, used, list(whole.reshape(t.n, 4).T), line)

    def mma(self, shape, a_kind, b_kind, d_kind, a, b, c, mask, line):
        self.t.check_whole_warps(mask, line)
        a, b, c = ([word.reshape(-1, 32) for word in part] for part in (a, b, c))
        done = matrices.mma(shape, a_kind, b_kind, d_kind, a, b, c, self.t.options.rounding)
        return [word.reshape(self.t.n) for word in done]
