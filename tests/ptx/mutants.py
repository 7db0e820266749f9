"""Small faults in compiled kernels, one at a time, to see whether the tests find each."""

import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.ptx import suites
from tests.ptx.kinds import BITS, is_float
from tests.ptx.machine import Program
from tests.ptx.parse import Block, Instruction

_NEXT = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
_ORDERS = {"acquire", "release", "acq_rel"}


@dataclass(frozen=True)
class Mutant:
    """program: whose kernel is changed. block, place: where its instruction is, None: at the block's end.

    what: the kind of fault. changed: the instruction in its place, None: there is none.
    """

    program: Program
    block: int
    place: int | None
    what: str
    changed: Instruction | None

    @property
    def instruction(self) -> Instruction:
        block = self.program.kernel.blocks[self.block]
        return block.end if self.place is None else block.body[self.place]

    def build(self) -> Program:
        """Return the program with the fault; translations of other blocks are kept."""
        old = self.program.kernel.blocks[self.block]
        body, end = list(old.body), old.end
        if self.place is None:
            end = self.changed
        else:
            body[self.place : self.place + 1] = [self.changed] if self.changed else []
        blocks = list(self.program.kernel.blocks)
        blocks[self.block] = Block(old.label, body, end)
        made = copy.copy(self.program)
        made.kernel = replace(self.program.kernel, blocks=blocks)
        made._functions = {key: f for key, f in self.program._functions.items() if key[0] != self.block}
        return made


def mutants(program: Program) -> Iterator[Mutant]:
    """Yield all single faults of a program that are made here."""
    for number, block in enumerate(program.kernel.blocks):
        for place, instruction in enumerate(block.body):
            for what, changed in _faults(instruction):
                yield Mutant(program, number, place, what, changed)
        if block.end is not None and block.end.op[0] in ("bar", "barrier"):
            yield Mutant(program, number, None, "barrier removed", None)
        if _polls_again(program, block):
            yield Mutant(program, number, None, "wait removed", None)


def _polls_again(program: Program, block: Block) -> bool:
    """Tell whether threads go back from a block's end to look again for others' writes."""
    if block.end is None or block.end.op[0] != "bra" or block.end.guard is None:
        return False
    return program.polls[program.kernel.targets[block.end.args[0]]]


def _faults(i: Instruction) -> Iterator[tuple[str, Instruction | None]]:
    op, args = i.op, i.args
    if op[:2] == ["bar", "warp"]:
        yield "barrier removed", None
    if op[:3] == ["cp", "async", "wait_group"] or op[:2] == ["wgmma", "wait_group"]:
        yield "wait weakened", replace(i, args=[str(int(args[0]) + 1)])
    if op[:2] == ["wgmma", "fence"] or op[0] in ("fence", "membar"):
        yield "fence removed", None
    if op[0] == "griddepcontrol" and op[1] == "wait":
        yield "wait weakened", None
    if op[0] == "setp" and op[1] in _NEXT and not is_float(op[-1]):
        yield "comparison", replace(i, op=[op[0], _NEXT[op[1]], *op[2:]])
    if op[0] in ("sub", "selp"):
        yield "operands swapped", replace(i, args=[args[0], args[2], args[1], *args[3:]])
    if op[0] in ("atom", "red", "ld", "st") and _ORDERS & set(op):
        yield "order relaxed", replace(i, op=["relaxed" if piece in _ORDERS else piece for piece in op])
    if "param" not in op and (op[0] in ("ld", "st", "ldmatrix", "stmatrix") or op[:2] == ["cp", "async"]):
        for place, arg in enumerate(args):
            if isinstance(arg, tuple) and arg[0] == "address":
                moved = (arg[0], arg[1], arg[2] + _width(i))
                yield "offset shifted", replace(i, args=[*args[:place], moved, *args[place + 1 :]])


def _width(i: Instruction) -> int:
    """Return the bytes that an instruction moves for each thread."""
    if i.op[0] in ("ldmatrix", "stmatrix"):
        return 16
    if i.op[0] == "cp":
        return int(i.args[2], 0)
    count = max((len(arg) for arg in i.args if isinstance(arg, list)), default=1)
    return BITS[i.op[-1]] // 8 * count


def drawn(left: list[Mutant], tried: Counter, seen: set, rng: random.Random) -> Iterator[Mutant]:
    """Yield faults: of each kernel in turn, of each kind with the same chance, at a place that had the fewest.

    tried: the faults that a kind has had at a place; those that are yielded are added. seen: kinds and places of which
    a test has seen a fault, perhaps added meanwhile: they come after the others, as one fault is enough.
    """
    kernels: dict[str, dict[str, list[Mutant]]] = {}
    for mutant in left:
        kernels.setdefault(mutant.program.kernel.name, {}).setdefault(mutant.what, []).append(mutant)
    while any(kernels.values()):
        for kinds in filter(None, kernels.values()):
            what = rng.choice(sorted(kinds))
            places = [(what, mutant.instruction.where) for mutant in kinds[what]]
            ranks = [(place in seen, tried[place], rng.random()) for place in places]
            first = ranks.index(min(ranks))
            tried[places[first]] += 1
            mutant = kinds[what].pop(first)
            if not kinds[what]:
                del kinds[what]
            yield mutant


def key(mutant: Mutant) -> tuple:
    """Return what a fault is found again by: kernel, hash of its PTX, line, kind, and the changed instruction."""
    return mutant.program.kernel.name, mutant.program.key, mutant.instruction.line, mutant.what, str(mutant.changed)


def _lines(file: Path) -> list[dict]:
    """Return the rows of a file of `mutating.py`; a run that was killed may have left part of one."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def latest(file: Path) -> dict[tuple, dict]:
    """Return the last row of each fault in a file of `mutating.py`."""
    return {tuple(row["fault"]): row for row in _lines(file) if "fault" in row}


def counted(file: Path) -> dict[str, int]:
    """Return how many faults of each kind could be planted, from such a file."""
    return {kind: count for row in _lines(file) if "of" in row for kind, count in row["of"].items()}


def survey(found: dict[tuple[str, str, str], tuple[list[dict], dict[str, int]]]) -> list[dict]:
    """Make a row for each kernel, target, source and kind, of the rows that `mutating.py` wrote, and its counts.

    A place of the source is seen if one fault there is, by the tests of any kernel: it has many compiled forms, and in
    some of them a fault changes nothing. Places that are not are open, with one of their instructions.
    """
    surveyed, every = [], [row for faults, _ in found.values() for row in faults]
    for (kernel, target, source), (faults, of) in sorted(found.items()):
        for kind in sorted({row["fault"][3] for row in faults}):
            mine = [row for row in faults if row["fault"][3] == kind]
            anywhere = {row["where"] for row in every if row["seen"] and row["fault"][3] == kind}
            seen = {row["where"] for row in mine} & anywhere
            left = {row["where"]: row["text"] for row in mine if row["where"] not in seen}
            surveyed.append(dict(
                kernel=kernel, target=target, source=source, kind=kind, of=of.get(kind), faults=len(mine),
                seen=sum(row["seen"] is not None for row in mine), places=len(seen) + len(left),
                seen_places=len(seen), equivalent={}, open=left,
            ))  # fmt: skip
    return surveyed


def merged(committed: list[dict], found: list[dict]) -> list[dict]:
    """Return the committed rows, but of each kernel and target those found where they are better.

    Of one source, more faults are better: the files of a survey may have been lost, and another one begun.
    """
    surveys: dict[tuple[str, str], list[dict]] = {}
    for rows in (committed, found):
        new: dict[tuple[str, str], list[dict]] = {}
        for row in rows:
            new.setdefault((row["kernel"], row["target"]), []).append(row)
        for name, mine in new.items():
            old = surveys.get(name, mine)
            same = old[0]["source"] == mine[0]["source"]
            surveys[name] = old if same and _faults_of(old) > _faults_of(mine) else mine
    return [row for name in sorted(surveys) for row in surveys[name]]


def _faults_of(rows: list[dict]) -> int:
    return sum(row["faults"] for row in rows)


def explained(rows: list[dict], reasons: dict[tuple[str, str, str], str]) -> list[dict]:
    """Return the rows with each open place that has a reason among the equivalent ones."""
    done = []
    for row in rows:
        why = {where: reasons.get((row["kernel"], row["kind"], where)) for where in row["open"]}
        known = row["equivalent"] | {where: reason for where, reason in why.items() if reason}
        done.append(row | dict(equivalent=known, open={w: text for w, text in row["open"].items() if not why[w]}))
    return done


def reasons_of_survivors() -> dict[tuple[str, str, str], str]:
    """Return why a fault that no test sees changes nothing, by kernel, kind and place in the source."""
    found = map(json.loads, suites.EQUIVALENT.read_text().splitlines())
    return {(row["kernel"], row["kind"], row["where"]): row["reason"] for row in found}
