"""Uniform registers that machine code reads before anything wrote them.

The uniform registers of sm_90 hold the addresses of wgmma's operands. ptxas 12.8, which triton 3.6 and 3.7 ship, can
lose the instruction that writes one: the product then reads whatever lies where the register points. No compiler
warns, and an emulator that executes PTX computes right numbers; only the machine code shows it. ptxas 12.9 compiled
the same PTX rightly.

The count misses some of these faults: a register whose own value was lost may hold another one.
"""

import re

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.[\w.$]+):")
_TARGET = re.compile(r"`\((\.[\w.$]+)\)")
_WRITERS = re.compile(r"U[A-Z]|R2UR|S2UR|CS2UR|VOTEU|REDUX")
_PAIRS = re.compile(r"ULDC\.64|UIADD3\.64|UMOV\.64|UIMAD\.WIDE|CS2UR(?!\.32)")
_OPERAND = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")


def _reads_and_writes(opcode: str, text: str) -> tuple[set[int], set[int]]:
    operands = [operand.strip() for operand in _OPERAND.findall(text)]
    reads, writes = set(), set()
    if _WRITERS.match(opcode):
        while operands and re.fullmatch(r"U?P[T\d]", operands[0]):
            operands.pop(0)
        if operands and (written := re.fullmatch(r"UR(\d+)", operands.pop(0))):
            first = int(written[1])
            writes = {first, first + 1} if _PAIRS.match(opcode) else {first}
    for operand in operands:
        for kind, number, wide in re.findall(r"(g?desc\[)?\bUR(\d+)(\.64)?", operand):
            first = int(number)
            if kind == "gdesc[":  # of four, the first two belong to an operand that may come from registers instead
                from_registers = re.fullmatch(r"R\d+(\.reuse)?", operands[1])
                reads |= set(range(first + 2 if from_registers else first, first + 4))
            elif kind or wide or opcode.startswith("UIADD3.64"):
                reads |= {first, first + 1}
            else:
                reads.add(first)
    return reads, writes


def unwritten(sass: str) -> list[str]:
    """Return the instructions, as `nvdisasm -c` writes them, that read a uniform register which some path skips."""
    lines, labels = [], {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _INSTRUCTION.match(line):
            lines.append(found.groups())
    if not lines:
        raise ValueError("no instruction is in this text")
    effects = [_reads_and_writes(opcode, text) for _, _, opcode, text in lines]
    written: dict[int, set[int]] = {0: set()}  # before an instruction, on every path to it
    waiting = [0]
    while waiting:
        place = waiting.pop()
        _, predicate, opcode, text = lines[place]
        after = written[place] | effects[place][1]
        following = [labels[name] for name in _TARGET.findall(text) if name in labels]
        always = predicate is None and not re.match(r"!?U?P\d", text)
        if not (always and opcode.startswith(("BRA", "EXIT", "RET"))) and place + 1 < len(lines):
            following.append(place + 1)
        for next_place in following:
            known = written.get(next_place)
            if known is None or not known <= after:
                written[next_place] = after if known is None else known & after
                waiting.append(next_place)
    return [
        f"{lines[place][0]}: {lines[place][2]} {lines[place][3]}"
        for place in sorted(written)
        if effects[place][0] - written[place]
    ]
