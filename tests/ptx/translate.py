"""A basic block as the source of a Python function over arrays with one element a thread.

Arrays are never changed in place, so that registers may share them. `block(s, R, C, M)` has the batch of threads, its
registers, its constants and the mask of the threads that are here.
"""

import re
import struct

from tests.ptx.arithmetic import Arithmetic
from tests.ptx.forms import unknown
from tests.ptx.kinds import BITS, NUMPY
from tests.ptx.parse import Instruction, Kernel
from tests.ptx.transfers import Transfers


class Unsupported(NotImplementedError):
    """An instruction, or a form of one, that is not modelled."""


#: PTX ISA, "Special Registers"; `_Batch.special` gives their values.
SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
SPECIAL |= {"%laneid", "%warpid", "%lanemask_lt"}


class Translator(Arithmetic, Transfers):
    """symbols: the addresses of variables. constants: unsigned type and value to the place in the list of constants."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]):
        self.kernel = kernel
        self.symbols = symbols
        self.constants: dict[tuple[str, int], int] = {}
        products = (i for i in kernel.instructions() if i.op[:2] == ["wgmma", "mma_async"])
        self.of_products = {name for i in products for part in i.args[:2] if isinstance(part, list) for name in part}

    def block(self, instructions: list[Instruction], masked: bool) -> str:
        lines = ["def block(s, R, C, M):"]
        for instruction in instructions:
            try:
                lines += self._instruction(instruction, masked)
            except Exception as error:
                what = f"{self.kernel.name}, line {instruction.line}: {instruction}"
                raise Unsupported(f"{what} ({error if isinstance(error, Unsupported) else repr(error)})") from error
        return "\n    ".join([*lines, "pass"])

    def _instruction(self, ins, masked):
        if pieces := unknown(ins.op):
            raise Unsupported(f"not modelled: {', '.join(pieces)}")
        lines, mask = [], "M" if masked else "None"
        if ins.guard:
            lines.append(f"m = {'~' * ins.negated}{self.register(ins.guard)}{' & M' * masked}")
            mask = "m"
        written, calls = getattr(self, f"_op_{ins.op[0]}", self._arithmetic)(ins, mask)
        if self.of_products and ins.op[0] != "wgmma":
            lines += self._touch(ins, {name for name, _ in written}, mask)
        lines += calls
        if len(written) > 1:  # all are read before any is written
            lines += [f"t{place} = {expression}" for place, (_, expression) in enumerate(written)]
            written = [(register, f"t{place}") for place, (register, _) in enumerate(written)]
        for name, expression in written:
            register = self.register(name)
            lines.append(
                f"{register} = " + (expression if mask == "None" else f"where({mask}, {expression}, {register})")
            )
        return lines

    def _touch(self, ins, written, mask):
        """Record registers that asynchronous products use too."""
        names = {name for arg in ins.args for name in (arg if isinstance(arg, (list, tuple)) else [arg])}
        read, wrote = (
            sorted(self.kernel.registers[name][0] for name in some & self.of_products)
            for some in (names - written, written)
        )
        return [f"s.warpgroups.touch({read}, {wrote}, {mask}, {ins.line})"] if read or wrote else []

    # --- operands -----------------------------------------------------------------------------------------------------

    def unsupported(self, ins):
        raise Unsupported(str(ins))

    def register(self, name: str) -> str:
        return f"R[{self.kernel.registers[name][0]}]"

    def _constant(self, value: int, bits: int) -> str:
        key = f"u{max(bits, 8) // 8}" if bits > 1 else "b1", value % 2**bits
        return f"C[{self.constants.setdefault(key, len(self.constants))}]"

    def raw(self, arg: str, bits: int) -> str:
        """Return the operand as an unsigned array of `bits`."""
        if arg in self.kernel.registers:
            have = self.kernel.registers[arg][1]
            return self.register(arg) + ("" if have == bits else f".astype(u{bits // 8})")
        if arg in SPECIAL:
            return f"s.special({arg!r}, u{bits // 8})"
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", arg):
            return self._constant(int(arg.rstrip("U"), 0), bits)
        if number := re.match(r"0([fFdD])([0-9a-fA-F]+)$", arg):
            value = int(number[2], 16)
            if number[1] in "fF" and bits == 64:
                value = struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", value))[0]))[0]
            return self._constant(value, bits)
        if arg in self.symbols:
            return self._constant(self.symbols[arg], bits)
        if arg in self.kernel.params:
            return self._constant(self.kernel.params[arg][0], bits)
        raise Unsupported(f"operand {arg!r}")

    def predicate(self, arg: str) -> str:
        return "~" * arg.startswith("!") + self.raw(arg.lstrip("!"), 1)

    def value(self, arg: str, kind: str) -> str:
        """Return the operand as an array of its type."""
        raw = self.raw(arg, BITS[kind])
        return raw if NUMPY[kind][0] in "ub" else f"{raw}.view({NUMPY[kind]})"

    def values(self, args, kind, op=()) -> list[str]:
        values = [self.value(arg, kind) for arg in args]
        return [f"ftz({value})" for value in values] if "ftz" in op and kind == "f32" else values

    def stored(self, expression: str, kind: str, register: str) -> str:
        """Convert a value of a type to its register's form; one of more bits is extended as the type says."""
        if kind == "pred":
            return expression
        have, bits, numpy = self.kernel.registers[register][1], BITS[kind], NUMPY[kind]
        if numpy[0] == "f":
            expression, numpy = f"({expression}).view(u{bits // 8})", f"u{bits // 8}"
        if have > bits:
            numpy = f"{numpy[0]}{have // 8}"
            expression = f"({expression}).astype({numpy})"
        return expression if numpy[0] == "u" else f"({expression}).view(u{have // 8})"

    def address(self, arg) -> tuple[str, int]:
        """Return a base and an offset."""
        _, base, offset = arg
        if base in self.kernel.registers:
            return self.register(base), offset
        return self._constant((self.symbols[base] if base in self.symbols else int(base, 0)) + offset, 64), 0
