"""PTX text as kernels of basic blocks (PTX ISA, "Syntax" and "State Spaces, Types, and Variables")."""

import re
from dataclasses import dataclass, field

from tests.ptx.kinds import BITS

#: Instructions that end a basic block.
ENDS = {"bra", "ret", "exit", "trap", "bar", "barrier", "brx"}
_DIRECTIVES = r"\.(version|target|address_size|file|loc|section|pragma|reqntid|maxntid|minnctapersm|maxnreg)\b"
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"([\w$%.]+)\s*(?:\[(\d*)\])?\s*(?:=\s*\{([^}]*)\}|=\s*([^;{]+))?"
)


@dataclass
class Instruction:
    """op: the mnemonic, split at its dots. args: operands as text; a list for braces, a tuple for an address.

    guard, negated: its predicate register, if it has one. line: of the PTX text. where: `file:line:column` of the
    kernel's own source.
    """

    op: list[str]
    args: list
    guard: str | None
    negated: bool
    line: int
    where: str

    def __str__(self):
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{'.'.join(self.op)} {self.args}"


@dataclass
class Block:
    """Instructions without a jump; `end` is the jump or barrier behind them, None where the next block follows."""

    label: str
    body: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None

    def instructions(self) -> list[Instruction]:
        return [*self.body, self.end] if self.end else self.body


@dataclass
class Kernel:
    """params: name to offset, size and alignment. registers: name to index and bits. targets: label to block.

    shared, local: name to address and size. threads: of a CTA, where the text says so.
    """

    name: str
    params: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    registers: dict[str, tuple[int, int]] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=lambda: [Block("entry")])
    targets: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    static_shared: int = 0
    local: dict[str, tuple[int, int]] = field(default_factory=dict)
    local_size: int = 0
    threads: int | None = None

    def instructions(self):
        return (instruction for block in self.blocks for instruction in block.instructions())


@dataclass
class Module:
    """data: the contents of variables in global and constant memory."""

    kernels: dict[str, Kernel]
    data: dict[str, bytes]


def instructions_of(text: str) -> str:
    """Return PTX without comments and places in the source, and names without the hash of the source's path."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith((".file", ".loc", "//")))
    kept = "\n".join(lines).partition("\n\t.section")[0]  # what follows is for debuggers
    return re.sub(r"(_GLOBAL__N__)\w{8}(_\w+?_cu_)\w{8}", r"\1\2", kept)


def parse(text: str) -> Module:
    lines = _statements(text)
    sources = {number: name for number, name in re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text)}
    data, shared, kernels, extern, index = {}, {}, {}, [], 0
    while index < len(lines):
        line = lines[index][1]
        if re.match(r"(\.visible\s+|\.weak\s+)*\.entry", line):
            stop = _closing(lines, index)
            kernel = _Body(lines[index][1], dict(shared), list(extern), sources).read(lines[index + 1 : stop])
            kernels[kernel.name] = kernel
            index = stop
        elif line.startswith(".section"):
            break
        elif found := _VARIABLE.match(line):
            space, align, kind, name, count, values, single = found.groups()
            size = BITS[kind] // 8 * (int(count) if count else (0 if count == "" else 1))
            if space != "shared":
                numbers = [int(v, 0) for v in (values or single or "").split(",") if v.strip()]
                raw = b"".join((v % 2 ** BITS[kind]).to_bytes(BITS[kind] // 8, "little") for v in numbers)
                data[name] = raw.ljust(size, b"\0")
            elif size:
                shared[name] = size, int(align or BITS[kind] // 8)
            else:
                extern.append(name)
        index += 1
    return Module(kernels, data)


def cut(kernel: Kernel, behind) -> None:
    """End a block behind each instruction for which `behind(instruction)` is true."""
    blocks, begins = [], []
    for block in kernel.blocks:
        begins.append(len(blocks))
        parts = [[]]
        for instruction in block.body:
            parts[-1].append(instruction)
            if behind(instruction):
                parts.append([])
        labels = [block.label, *("" for _ in parts[1:])]
        blocks += [Block(label, body) for label, body in zip(labels, parts, strict=True)]
        blocks[-1].end = block.end
    kernel.blocks, kernel.targets = blocks, {label: begins[at] for label, at in kernel.targets.items()}


def _closing(lines, index):
    """Return the line of the brace that ends the body of the kernel at `index`."""
    depth = 0
    for place in range(index + 1, len(lines)):
        depth += {"{": 1, "}": -1}.get(lines[place][1], 0)
        if depth == 0 and lines[place][1] == "}":
            return place
    raise ValueError(f"line {lines[index][0]}: the kernel has no end")


def _statements(text: str) -> list[tuple[int, str]]:
    """Return statements, labels and braces, each with its line; comments are removed."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    found, pending, first = [], "", 0
    for number, line in enumerate(text.split("\n"), 1):
        line = line.split("//")[0].strip()
        if not line:
            continue
        if not pending:
            first = number
        pending = f"{pending} {line}".strip()
        while pending:
            statement, rest = _cut(pending)
            if statement is None:
                pending = rest
                break
            found.append((first, statement))
            pending = rest
    return found


def _cut(pending: str) -> tuple[str | None, str]:
    """Return the first statement and the rest; None and the rest where the statement goes on in the next line."""
    if label := re.match(r"([\w$]+):(?!:)\s*", pending):
        return label[1] + ":", pending[label.end() :]
    if pending[0] in "{}":
        return pending[0], pending[1:].strip()
    if re.match(_DIRECTIVES, pending):
        return pending, ""
    if re.match(r"(\.\w+\s+)*\.entry", pending):
        whole = "(" in pending and pending.count("(") == pending.count(")")
        return (pending, "") if whole else (None, pending)
    cut = pending.find(";")
    if cut >= 0:
        return pending[:cut].strip(), pending[cut + 1 :].strip()
    return None, "" if pending.startswith((".b", ".end")) else pending  # the bytes of a debug section


class _Body:
    """Reads one kernel: registers of inner scopes get names of their own."""

    def __init__(self, header: str, shared: dict[str, tuple[int, int]], extern: list[str], sources: dict[str, str]):
        self.sources = sources
        self.kernel = Kernel(re.search(r"\.entry\s+([\w$]+)", header)[1])
        self.shared, self.extern = shared, extern
        self.scopes, self.fresh, self.where = [{}], 0, ""
        offset = 0
        for part in filter(None, (p.strip() for p in header[header.index("(") + 1 : header.rindex(")")].split(","))):
            kind = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)", part)
            named = re.search(r"([\w$]+)(?:\[(\d+)\])?$", part)
            size = BITS[kind[2]] // 8 * int(named[2] or 1)
            align = int(kind[1] or BITS[kind[2]] // 8)
            offset = -(-offset // align) * align
            self.kernel.params[named[1]] = offset, size, align
            offset += size

    def read(self, lines: list[tuple[int, str]]) -> Kernel:
        for number, line in lines:
            self._line(number, line)
        kernel, at = self.kernel, 0
        for variable, (size, align) in self.shared.items():
            at = -(-at // align) * align
            kernel.shared[variable] = at, size
            at += size
        kernel.static_shared = -(-at // 16) * 16 if self.extern else at
        kernel.shared |= {variable: (kernel.static_shared, 0) for variable in self.extern}
        return kernel

    def _line(self, number, line):
        kernel = self.kernel
        if line == "{":
            self.scopes.append({})
        elif line == "}":
            self.scopes.pop()
        elif line.startswith(".loc"):
            source, row, column = line.replace(",", " ").split()[1:4]
            self.where = f"{self.sources.get(source, source)}:{row}:{column}"
        elif line.startswith((".reqntid", ".maxntid")):
            kernel.threads = 1
            for size in re.findall(r"\d+", line):
                kernel.threads *= int(size)
        elif line.startswith(".reg"):
            self._registers(line)
        elif line.endswith(":"):
            last = kernel.blocks[-1]
            if last.body or last.end or len(kernel.blocks) == 1:
                kernel.blocks.append(Block(line[:-1]))
            kernel.targets[line[:-1]] = len(kernel.blocks) - 1
        elif line.startswith("."):
            if found := _VARIABLE.match(line):
                self._variable(*found.groups()[:5])
        else:
            instruction = _instruction(line, number, self.where, self.scopes)
            if kernel.blocks[-1].end is not None:
                kernel.blocks.append(Block(""))
            if instruction.op[0] in ENDS and instruction.op[:2] != ["bar", "warp"]:
                kernel.blocks[-1].end = instruction
            else:
                kernel.blocks[-1].body.append(instruction)

    def _registers(self, line):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", line).groups()
        for one in (n.strip() for n in names.split(",")):
            many = re.match(r"([%\w$]+)<(\d+)>", one)
            for register in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [one]:
                unique = register
                if len(self.scopes) > 2:
                    unique, self.fresh = f"{register}~{self.fresh}", self.fresh + 1
                    self.scopes[-1][register] = unique
                self.kernel.registers[unique] = len(self.kernel.registers), BITS[kind]

    def _variable(self, space, align, kind, variable, count):
        size, align = BITS[kind] // 8 * int(count or 1), int(align or BITS[kind] // 8)
        if space == "shared":
            if count == "":
                self.extern.append(variable)
            else:
                self.shared[variable] = size, align
        else:
            start = -(-self.kernel.local_size // align) * align
            self.kernel.local[variable] = start, size
            self.kernel.local_size = start + size


def _instruction(line, number, where, scopes):
    guard = re.match(r"@(!?)([%\w$]+)\s+", line)
    if guard:
        line = line[guard.end() :]
    name, *rest = line.split(None, 1)
    args = [_operand(text, scopes) for text in split(rest[0] if rest else "")]
    predicate = _scoped(guard[2], scopes) if guard else None
    return Instruction([p for p in name.split(".") if p], args, predicate, bool(guard and guard[1]), number, where)


def split(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts


def _scoped(name, scopes):
    return next((scope[name] for scope in reversed(scopes) if name in scope), name)


def _operand(text, scopes):
    if text.startswith("{"):
        return [_operand(part, scopes) for part in split(text[1:-1].strip())]
    if text.startswith("["):
        found = re.match(r"([%\w$.~]+)(?:\+?(-?\d+))?$", text[1:-1].replace(" ", ""))
        return "address", _scoped(found[1], scopes), int(found[2] or 0)
    if "|" in text:
        return [("pair", *(_scoped(part.strip(), scopes) for part in text.split("|")))]
    return _scoped(text, scopes)
