"""Runs a grid: batches of CTAs in lockstep, block of instructions by block (PTX ISA, "Control Flow Instructions")."""

import hashlib
from typing import ClassVar

import numpy as np

from tests.ptx import floats, global_memory, integers, kinds
from tests.ptx.copies import Copies
from tests.ptx.dependent import Dependent
from tests.ptx.exchange import Exchange
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.kinds import i8, u1, u2, u4, u8
from tests.ptx.parse import Kernel, Module, cut, instructions_of, parse
from tests.ptx.regions import FIRST, SHARED_WINDOW, Fault, Memory
from tests.ptx.shared_memory import GenericMemory, SharedMemory
from tests.ptx.threads import Options, Report, Threads
from tests.ptx.translate import Translator
from tests.ptx.warpgroups import Warpgroups

_NAMES = {name: value for part in (integers, floats) for name, value in vars(part).items() if name[0] != "_"}
_NAMES |= kinds.NAMES | {"np": np, "where": np.where}
# The number of turns without an ending batch of CTAs after which they count as deadlocked.
_PATIENCE = 20000
# Instructions after which another CTA's poll may see something new.
_WRITES = frozenset({"st", "atom", "red", "cp"})
# The most blocks of instructions that a CTA of a cooperative launch runs at once; one of these is drawn.
_STRIDES = (1, 1, 8, 64, 1000)
# Instructions that need the whole warp: threads wait before a block that has one until the others have caught up.
_OF_WARPS = {"shfl", "mma", "ldmatrix", "stmatrix", "redux", "vote", "bar", "barrier"}


def _together(block) -> int:
    """Return how many threads a block wants together: those of a warpgroup, of a warp, or one."""
    names = {i.op[0] for i in block.instructions()}
    return 128 if "wgmma" in names else 32 if names & _OF_WARPS else 1


def _polls(block) -> bool:
    """Tell whether a block looks at values that other CTAs may write meanwhile."""
    return any("acquire" in i.op or "acq_rel" in i.op for i in block.body)


class Program:
    """A kernel with its translated blocks. key: the same wherever its source lies."""

    _cache: ClassVar[dict[str, dict[str, "Program"]]] = {}

    def __init__(self, module: Module, kernel: Kernel, key: str):
        self.kernel, self.key, self.data = kernel, key, b""
        symbols = {name: at for name, (at, _) in kernel.shared.items()}
        for name, content in module.data.items():
            symbols[name] = FIRST | len(self.data)
            self.data += content.ljust(-(-len(content) // 64) * 64 or 64, b"\0")
        self.translator = Translator(kernel, symbols)
        self.polls = [_polls(block) for block in kernel.blocks]
        self.needs = [_together(block) for block in kernel.blocks]
        self._functions = {}

    @classmethod
    def of(cls, text: str, name: str | None = None, fine: bool = False) -> "Program":
        """Return the kernel of this name, or the first.

        fine: other CTAs may come between any two of its memory operations.
        """
        key = hashlib.sha256(text.encode() + b"fine" * fine).hexdigest()
        if key not in cls._cache:
            module = parse(text)
            if fine:
                for kernel in module.kernels.values():
                    cut(kernel, global_memory.is_shared_with_others)
            same = hashlib.sha256(instructions_of(text).encode()).hexdigest()[:12]
            cls._cache[key] = {kernel.name: cls(module, kernel, same) for kernel in module.kernels.values()}
        programs = cls._cache[key]
        return programs[name] if name else next(iter(programs.values()))

    def function(self, index: int, masked: bool):
        if (index, masked) not in self._functions:
            source = self.translator.block(self.kernel.blocks[index].body, masked)
            names = dict(_NAMES)
            exec(compile(source, f"{self.kernel.name}:block{index}", "exec"), names)
            self._functions[index, masked] = names["block"]
        return self._functions[index, masked]


def new_memory(program: Program) -> Memory:
    """Memory with the module's variables; what a launch reads and writes is added to it."""
    memory = Memory()
    memory.add_bytes("module data", program.data)
    return memory


def launch(program: Program, grid, threads: int, shared_bytes: int, params: bytes, memory: Memory,
           options: Options | None = None, cooperative: bool = False) -> Report:  # fmt: skip
    """Run `grid` CTAs of `threads` threads with `shared_bytes` of dynamic shared memory; raise `Fault`.

    cooperative: all CTAs are there from the beginning, and go on in a random order.
    """
    memory.freeze()
    run = _Run(program, grid, threads, shared_bytes, params, memory, options or Options(), cooperative)
    per_batch = 1 if cooperative else max(1, run.options.lanes // threads)
    todo = [run.order[start : start + per_batch] for start in range(0, run.count, per_batch)]
    with np.errstate(all="ignore"):
        (_all_at_once if cooperative else _take_turns)(run, todo)
    return run.report


def _take_turns(run, todo):
    """Run one batch after another; where one polls for others' writes, the next begins beside it."""
    alive, turns = [], 0
    while todo or alive:
        if todo:
            alive.append(_Batch(run, todo.pop(0)).run())
        for batch in alive if not todo else alive[-1:]:
            if next(batch, None) is None:
                alive.remove(batch)
                turns = 0
                break
        turns += 1
        if turns > _PATIENCE:
            raise Fault(f"{run.program.kernel.name}: deadlock: CTAs poll for what no other writes")


def _all_at_once(run, todo):
    """Run each CTA for a drawn number of blocks of instructions: a few, or until it waits for others."""
    alive, polls = [_Batch(run, ctas).run() for ctas in todo], 0
    while alive:
        batch = alive[run.rng.integers(len(alive))]
        for _ in range(run.rng.choice(_STRIDES)):
            polled = next(batch, None)
            if polled is None:
                alive.remove(batch)
            if polled is None or run.wrote:
                polls, run.wrote = 0, False
            polls += bool(polled)
            if polled is not False:
                break
        if polls > _PATIENCE:
            raise Fault(f"{run.program.kernel.name}: deadlock: CTAs poll for what no other writes")


class _Notes:
    """The last writer of each cell of global memory: CTA * threads + thread, or -1; and at which stamp.

    constant: whether a thread has read it as what nobody writes during the launch.
    """

    def __init__(self, kernel, memory):
        self.grain = global_memory.grain_of(kernel)
        cells = memory.shadow_size // self.grain + 1
        self.writer, self.stamp = np.full(cells, -1, i8), np.zeros(cells, i8)
        self.constant = np.zeros(cells, np.bool_)


class _Run:
    """The state that all batches of a grid share."""

    def __init__(self, program, grid, threads, shared_bytes, params, memory, options, cooperative):
        if threads % 32:
            raise NotImplementedError(f"{threads} threads, no whole warps")
        self.program, self.grid, self.threads = program, grid, threads
        self.memory, self.options, self.params, self.cooperative = memory, options, params, cooperative
        self.shared = max(program.kernel.static_shared + shared_bytes, 16)
        self.count = grid[0] * grid[1] * grid[2]
        self.order, self.rng = np.arange(self.count), np.random.default_rng(options.seed)
        if options.seed is not None:
            self.rng.shuffle(self.order)
        self.report = Report(program.kernel.name, program)
        self.wrote = False  # whether a block with a write ran since `_all_at_once` last looked
        self.notes = _Notes(program.kernel, memory) if options.global_races else None
        self.released, self.known, self.pending = {}, {}, {}  # tests/ptx/threads.py


class _Batch:
    """CTAs that run at once. Its parts are what translated blocks call."""

    def __init__(self, run: _Run, ctas):
        self.r, self.program, self.t = run, run.program, Threads(run, ctas)
        self.n = n = self.t.n
        self.shared_memory = SharedMemory(run, self.t)
        self.dependent = Dependent(run.program.kernel, self.t)
        self.global_memory = GlobalMemory(run, self.t, self.dependent)
        self.generic_memory = GenericMemory(self.t, self.shared_memory, self.global_memory)
        self.copies = Copies(self.t, self.shared_memory, self.global_memory)
        self.exchange = Exchange(self.t, self.shared_memory)
        self.shared_window = u8(SHARED_WINDOW)
        poison = {1: np.zeros(n, np.bool_), 8: np.full(n, 0xAD, u1), 16: np.full(n, 0xDEAD, u2),
                  32: np.full(n, 0xFFFFDEAD, u4), 64: np.full(n, 0xFFFFDEADFFFFDEAD, u8)}  # fmt: skip
        self.registers = [poison[bits] for _, bits in run.program.kernel.registers.values()]
        self.warpgroups = Warpgroups(self.t, self.shared_memory, self.registers)
        self.constants, self._special, self._params = [], {}, {}
        # Blocks with the threads at their beginning (None: all of the batch); and where those at a barrier go on.
        self.ready: dict[int, np.ndarray | None] = {0: self.t.live.copy() if run.options.random_warps else None}
        self.waiting: list[tuple[int, np.ndarray]] = []
        self.polled: dict[int, int] = {}  # how often a polling block was run

    # --- control ------------------------------------------------------------------------------------------------------

    def run(self):
        """Run, and yield true where threads look again for others' writes.

        Of a cooperative launch it yields behind each block, false where none looks.
        """
        report, blocks = self.r.report, self.program.kernel.blocks
        while self.ready or self.waiting:
            if not self.ready:
                self.t.fail("deadlock", "threads wait at a barrier that others never reach", self.waiting[0][1])
            index = self._choose()
            mask = self._take(index)
            function = self.program.function(index, mask is not None)
            for kind, value in list(self.program.translator.constants)[len(self.constants) :]:
                self.constants.append(np.full(self.n, value, kinds.NAMES[kind]))
            function(self, self.registers, self.constants, mask)
            report.instructions += len(blocks[index].body) + 1
            report.blocks.add(index)
            self.r.wrote |= any(line.op[0] in _WRITES for line in blocks[index].body)
            if self.r.options.limit and report.instructions > self.r.options.limit:
                self.t.fail("endless", f"more than {self.r.options.limit} instructions", mask)
            if self.program.polls[index]:
                self.polled[index] = self.polled.get(index, 0) + 1
            for place, group in self._end(index, mask):
                if group is not None and self.ready.get(place) is not None:
                    group = group | self.ready[place]
                self.ready[place] = group
            if self.polled.get(index, 0) > 1:
                yield True
            elif self.r.cooperative:
                yield False

    def _choose(self):
        """Return the first block, so that others catch up; but none where part of a warp would enter a whole one's."""
        if self.r.options.random_warps:
            return int(self.r.rng.choice(list(self.ready)))
        order = sorted(self.ready, key=lambda index: (self.polled.get(index, 0), index))
        needs = self.program.needs
        fits = (i for i in order if needs[i] == 1 or self.ready[i] is None or self.t.whole(self.ready[i], needs[i]))
        return next(fits, order[0])

    def _take(self, index):
        mask = self.ready.pop(index)
        if mask is None or not self.r.options.random_warps:
            return None if mask is None or mask.all() else mask
        mine = self.t.warp == self.r.rng.choice(np.unique(self.t.warp[mask]))
        if (mask & ~mine).any():
            self.ready[index] = mask & ~mine
        return mask & mine

    def _end(self, index, mask) -> list[tuple[int, np.ndarray | None]]:
        """Return where the threads of `mask` go from the block's end."""
        end = self.program.kernel.blocks[index].end
        if end is None:
            return [(index + 1, mask)]
        if end.op[0] == "bra":
            target = self.program.kernel.targets[end.args[0]]
            if end.guard is None:
                return [(target, mask)]
            yes, no = self._sides(end, mask)
            if not no.any():
                return [(target, mask)]
            return [(target, yes), (index + 1, no)] if yes.any() else [(index + 1, mask)]
        if end.op[0] in ("ret", "exit"):
            gone, stay = self._sides(end, mask)
            self.dependent.ends(gone)
            self.t.live &= ~gone
            self._release()
            return [(index + 1, stay)] if stay.any() else []
        if end.op[0] in ("bar", "barrier"):
            return self._wait(index, mask, end)
        if end.op[0] == "trap":
            trapped, others = self._sides(end, mask)
            if trapped.any():
                self.t.fail("trap", str(end), trapped, end.line)
            return [(index + 1, others)]
        raise NotImplementedError(f"line {end.line}: {end}")

    def _wait(self, index, mask, end):
        """Do bar.sync 0; those whose guard is false pass by."""
        if end.args != ["0"] or "sync" not in end.op:
            raise NotImplementedError(f"line {end.line}: {end}")
        passing = []
        if end.guard is not None:
            mask, others = self._sides(end, mask)
            passing = [(index + 1, others)] if others.any() else []
            if not mask.any():
                return passing
        self.t.check_whole_warps(mask, end.line)
        if mask is None or mask.all():
            self.t.ctas_met()
            return [(index + 1, None)]
        self.waiting.append((index + 1, mask))
        self._release()
        return passing

    def _sides(self, end, mask):
        """Return the threads for which the predicate of `end` holds, and the others that are here."""
        here = np.ones(self.n, np.bool_) if mask is None else mask
        if end.guard is None:
            return here, np.zeros(self.n, np.bool_)
        holds = self.registers[self.program.kernel.registers[end.guard][0]] ^ end.negated
        return holds & here, ~holds & here

    def _release(self):
        """Let threads go on whose whole CTA has arrived at its barrier."""
        if not self.waiting:
            return
        t, arrived = self.t, np.logical_or.reduce([mask for _, mask in self.waiting])
        whole = (arrived | ~t.live).reshape(-1, t.threads).all(1) & arrived.reshape(-1, t.threads).any(1)
        if not whole.any():
            return
        without = whole & ~t.live.reshape(-1, t.threads).all(1)
        if without.any():
            gone = arrived & np.repeat(without, t.threads)
            t.fail("barrier", "some threads of the CTA have exited before it", gone)
        t.ctas_met(whole.nonzero()[0])
        go, waiting = np.repeat(whole, t.threads), self.waiting
        self.waiting = [(place, mask & ~go) for place, mask in waiting if (mask & ~go).any()]
        for place, mask in waiting:
            if (mask & go).any():
                self.ready[place] = mask & go | self.ready.get(place, False)

    # --- operands -----------------------------------------------------------------------------------------------------

    def special(self, name, kind):
        """Return a register of PTX ISA, "Special Registers"."""
        if (name, kind) not in self._special:
            t, (x, y, z) = self.t, self.r.grid
            values = {
                "%tid.x": t.thread, "%tid.y": 0, "%tid.z": 0, "%ntid.x": t.threads, "%ntid.y": 1, "%ntid.z": 1,
                "%ctaid.x": t.cta % x, "%ctaid.y": t.cta // x % y, "%ctaid.z": t.cta // (x * y),
                "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z, "%laneid": t.lane, "%warpid": t.own_warp,
                "%lanemask_lt": (1 << t.lane) - 1,
            }  # fmt: skip
            self._special[name, kind] = np.broadcast_to(np.asarray(values[name]), self.n).astype(kind)
        return self._special[name, kind]

    def param(self, start, kind):
        if (start, kind) not in self._params:
            raw = self.r.params[start : start + np.dtype(kind).itemsize]
            self._params[start, kind] = np.full(self.n, np.frombuffer(raw, kind)[0], kind)
        return self._params[start, kind]

    def param_at(self, base, offset, kind, mask, line):
        """Read a parameter at a computed address, as of an array among the parameters."""
        size, at = np.dtype(kind).itemsize, base.view(i8) + offset
        bad = (at < 0) | (at + size > len(self.r.params)) | (at % size != 0)
        bad = bad if mask is None else bad & mask
        if bad.any():
            where = f"{size} bytes at {int(at[bad][0])} of {len(self.r.params)}"
            self.t.fail("parameters out of bounds, or misaligned", where, bad, line)
        at = at if mask is None else np.where(mask, at, 0)
        if (at == at[0]).all():
            return self.param(int(at[0]), kind)
        return np.frombuffer(self.r.params.ljust(-(-len(self.r.params) // size) * size, b"\0"), kind)[at // size]


__all__ = ["Fault", "Options", "Program", "launch", "new_memory"]
