"""A batch of CTAs: who each thread is, which barriers it has passed, and what it has learnt of other CTAs.

A stamp counts barriers: those of the CTA in its upper bits, those of the warp below. An act of one thread of a CTA at a
stamp comes before an act of another now if a barrier of the CTA lies between, or, within a warp, one of the warp
(PTX ISA, "Memory Consistency Model").
"""

from dataclasses import dataclass, field

import numpy as np

from tests.ptx.kinds import i8
from tests.ptx.regions import Fault

_WARP_BITS = 20


@dataclass
class Options:
    """Checks, and the order in which CTAs run.

    races: shared memory, between threads with no barrier between them. warp_races: the same within a warp.
    global_races: the same in global memory, also between CTAs. seed: shuffles the CTAs; None leaves their order.
    lanes: threads that run at once. rounding: of matrix sums, "nearest" or "truncate". random_warps: a warp at a time.
    limit: instructions of a launch. swap: a program, and what runs in its place. random_copies: of copies of a float32
    whose last bits differ, any is written.
    """

    races: bool = True
    warp_races: bool = True
    global_races: bool = True
    lanes: int = 4096
    seed: int | None = 0
    rounding: str = "nearest"
    random_warps: bool = False
    random_copies: bool = False
    limit: int | None = None
    swap: tuple | None = None


@dataclass
class Report:
    """Facts of a launch: instructions that batches executed, and the basic blocks that ran.

    copies_differ: lines that write copies of one element that are not equal.
    """

    kernel: str
    program: object
    instructions: int = 0
    blocks: set[int] = field(default_factory=set)
    copies_differ: set[int] = field(default_factory=set)


class Threads:
    """All arrays have one element a thread, CTA by CTA, unless their comment says otherwise."""

    def __init__(self, run, ctas):
        self.kernel, self.options, self.rng = run.program.kernel, run.options, run.rng
        self.threads, self.ctas = run.threads, ctas
        self.warps = run.threads // 32  # of a CTA
        count = len(ctas)
        self.n = count * run.threads
        self.thread = np.tile(np.arange(run.threads), count)
        self.slot = np.repeat(np.arange(count), run.threads)  # of its CTA in the batch
        self.cta = np.repeat(ctas, run.threads)
        self.lane = self.thread % 32
        self.warp = np.arange(self.n) // 32  # of the batch
        self.own_warp = self.thread // 32  # of the CTA
        self.warp_base = self.warp * 32
        self.live = np.ones(self.n, np.bool_)  # has not returned
        self._epoch = np.zeros(count, i8)  # a CTA
        self._warp_epoch = np.zeros(self.n // 32, i8)  # a warp
        self.fenced_at = np.full(self.n, -1, i8)  # the stamp at a thread's last fence
        self._observed = {}  # of a thread, what it has read without acquiring it
        # Stamps that CTAs of the whole grid published and learnt: address, or CTA, to stamps [ctas, warps].
        self._grid, self._released, self._known, self._pending = run.count, run.released, run.known, run.pending
        self._restamp()

    def _restamp(self):
        self.stamp = (self._epoch[self.slot] << _WARP_BITS) | self._warp_epoch[self.warp]

    def warps_met(self, mask):
        """Pass a barrier of the warps that are here; in a CTA of one warp it is one of the CTA."""
        self._warp_epoch += 1 if mask is None else mask.reshape(-1, 32).any(1)
        self._restamp()
        if self.warps == 1:
            self._learn(range(len(self.ctas)) if mask is None else np.unique(self.slot[mask]))

    def ctas_met(self, slots=None):
        """Pass a barrier of the CTAs in these slots of the batch (None: of all)."""
        self._epoch[slice(None) if slots is None else slots] += 1
        self._restamp()
        self._learn(range(len(self.ctas)) if slots is None else slots)

    def ordered(self, stamp, warp, lanes):
        """Tell whether a barrier lies between an access at `stamp` by a thread of `warp` and one of `lanes` now."""
        now = self.stamp[lanes]
        later = (stamp >> _WARP_BITS) < (now >> _WARP_BITS)
        return later | ((warp == self.own_warp[lanes]) & ((stamp < now) | (not self.options.warp_races)))

    @staticmethod
    def behind_a_barrier(stamp, later):
        """Tell whether a barrier of the CTA lies between two stamps."""
        return (stamp >> _WARP_BITS) < (later >> _WARP_BITS)

    def recent(self, stamp, lanes):
        """Tell whether the CTA has passed no barrier since a stamp; false also where there is none (-1)."""
        return (stamp >> _WARP_BITS) >= (self.stamp[lanes] >> _WARP_BITS)

    # --- between CTAs: release and acquire ----------------------------------------------------------------------------

    def fence(self, mask):
        """Do a fence of the GPU: what a thread did before is released by its next atomics, what it read is acquired."""
        self.fenced_at = np.where(True if mask is None else mask, self.stamp, self.fenced_at)
        for lane in [lane for lane in self._observed if mask is None or mask[lane]]:
            self._await(lane, self._observed.pop(lane))

    def release(self, key, lane, of_fence=False):
        """Publish at an address the acts of the CTA before its last barrier, and this thread's until now.

        of_fence: those before this thread's last fence.
        """
        cta, stamp = int(self.cta[lane]), self.fenced_at[lane] if of_fence else self.stamp[lane]
        if stamp < 0:
            return
        stamps = np.zeros((self._grid, self.warps), i8)
        stamps[cta] = stamp >> _WARP_BITS << _WARP_BITS
        stamps[cta, self.own_warp[lane]] = stamp
        stamps = np.maximum(stamps, self._known.get(cta, 0))
        self._released[key] = np.maximum(self._released.get(key, 0), stamps)

    def acquire(self, key, lane, at_fence=False):
        """Let the CTA read what is published there, from its next barrier on; at_fence: behind this thread's next."""
        if (found := self._released.get(key)) is None:
            return
        if at_fence:
            self._observed[lane] = np.maximum(self._observed.get(lane, 0), found)
        else:
            self._await(lane, found)

    def _await(self, lane, stamps):
        cta = int(self.cta[lane])
        self._pending[cta] = np.maximum(self._pending.get(cta, 0), stamps)

    def _learn(self, slots):
        for slot in slots:
            cta = int(self.ctas[slot])
            if (new := self._pending.pop(cta, None)) is not None:
                self._known[cta] = np.maximum(self._known.get(cta, 0), new)

    def known(self, cta: int):
        """Return the stamps `[ctas, warps]` up to which this CTA may read others' writes; None if it knows none."""
        return self._known.get(int(cta))

    # --- masks and faults ---------------------------------------------------------------------------------------------

    def lanes_of(self, mask):
        return np.arange(self.n) if mask is None else mask.nonzero()[0]

    def mask_of(self, lanes):
        mask = np.zeros(self.n, np.bool_)
        mask[lanes] = True
        return mask

    def whole(self, mask, size=32):
        """Tell whether of each warp (128: warpgroup) all threads that have not returned are here, or none."""
        here, live = mask.reshape(-1, size), self.live.reshape(-1, size)
        return not (here.any(1) & (here != live).any(1)).any()

    def check_whole_warps(self, mask, line):
        if mask is not None and not self.whole(mask):
            self.fail("divergence", "part of a warp at an instruction of the whole warp", mask, line)

    def fail(self, kind, what, lanes=None, line=None):
        text = f"{self.kernel.name}: {kind}: {what}"
        if lanes is not None and np.asarray(lanes).any():
            first, *others = np.asarray(lanes).nonzero()[0]
            text += f", CTA {int(self.cta[first])} thread {int(self.thread[first])} and {len(others)} others"
        for i in self.kernel.instructions():
            if i.line == line:
                text += f" by line {line}: {i} [source {i.where}]"
        raise Fault(text)
