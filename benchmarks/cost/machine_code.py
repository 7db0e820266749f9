"""Instructions that a warp of a compiled kernel issues, counted from its machine code.

The code of a kernel is a sequence of arms, each of which ends with an unconditional EXIT; what follows the last one are
routines that are called in rare cases. Loops are branches backwards. Code outside of loops counts once, also where a
branch may skip it, so that a count is at most a little too high.
"""

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.[\w.$]+):")
_TARGET = re.compile(r"`\((\.[\w.$]+)\)")
#: The beginnings of the opcodes of the matrix unit's products.
MATRIX = ("HMMA", "HGMMA", "IMMA", "QGMMA", "IGMMA")


@dataclass(frozen=True)
class Loop:
    """The places of a loop's first and last instruction in its kernel."""

    first: int
    last: int


@dataclass(frozen=True)
class Arm:
    """One way through a kernel.

    Args:
        first, end: its places.
        loops: by their first place, so that an outer loop comes before its inner ones.
        arrival: the place behind which only the program goes on that arrives last; None without such a counter.
        opcodes: of its instructions.
    """

    first: int
    end: int
    loops: tuple[Loop, ...]
    arrival: int | None
    opcodes: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Tell whether it uses the matrix unit."""
        return any(opcode.startswith(MATRIX) for opcode in self.opcodes)

    def issued(self, trips: tuple[float, ...], last: float = 1.0, kinds: tuple[str, ...] = ("",)) -> float:
        """Return the instructions of a warp.

        Args:
            trips: how often each of `loops` runs, an inner one for each turn of its outer loop.
            last: the share of programs that go on behind `arrival`.
            kinds: beginnings of the opcodes that count; by default all.

        Raises:
            ValueError: the code has another number of loops than `trips`.
        """
        if len(trips) != len(self.loops):
            raise ValueError(f"the compiled code has {len(self.loops)} loops, and the model knows {len(trips)} of them")
        total = 0.0
        for place, opcode in enumerate(self.opcodes, self.first):
            if not opcode.startswith(kinds):
                continue
            often = 1.0 if self.arrival is None or place <= self.arrival else last
            for loop, count in zip(self.loops, trips, strict=True):
                often *= count if loop.first <= place <= loop.last else 1.0
            total += often
        return total


def arms(sass: str) -> list[Arm]:
    """Return the arms of a kernel, as `nvdisasm -c` writes it. Raises `ValueError` for a text without instructions."""
    code: list[tuple[str | None, str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append((found[1], found[2], found[3]))
    if not code:
        raise ValueError("no instruction is in this text")
    ends = [place for place, (predicate, opcode, _) in enumerate(code) if opcode == "EXIT" and predicate is None]
    loops = []
    for place, (_, opcode, operands) in enumerate(code):
        target = _TARGET.search(operands) if opcode == "BRA" else None
        if target and labels[target[1]] < place:
            loops.append(Loop(labels[target[1]], place))
    found, first = [], 0
    for end in ends:
        here = (loop for loop in loops if first <= loop.first and loop.last <= end)
        inside = tuple(sorted(here, key=lambda loop: (loop.first, -loop.last)))
        opcodes = tuple(opcode for _, opcode, _ in code[first : end + 1])
        found.append(Arm(first, end + 1, inside, _arrival(code, first, end), opcodes))
        first = end + 1
    return found


def _arrival(code: list, first: int, end: int) -> int | None:
    """Return the place of the first conditional exit behind an atomic addition."""
    counted = False
    for place in range(first, end):
        predicate, opcode, _ = code[place]
        counted = counted or opcode.startswith("ATOM")
        if counted and opcode == "EXIT" and predicate is not None:
            return place
    return None
