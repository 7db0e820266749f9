"""Memory, asynchronous copies and joint operations of a warp's lanes, as source: a part of the translator."""

import re

from tests.ptx.kinds import BITS, NUMPY

_MEMORIES = {
    "global": "global_memory",
    "const": "global_memory",
    "shared": "shared_memory",
    "generic": "generic_memory",
}
_ATOMIC = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")


def space_of(op: list[str]) -> str:
    """Return the state space that a mnemonic names; an address without one is generic."""
    spaces = (piece.partition("::")[0] for piece in op)
    return next((space for space in spaces if space in (*_MEMORIES, "local", "param")), "generic")


def _list(operand):
    return operand if isinstance(operand, list) else [operand]


class Transfers:
    """Methods `_op_NAME(ins, mask)` give what is written to which register, and statements that come before."""

    def _loaded(self, targets, kind, place="L[{}]"):
        values = (
            place.format(i) + ("" if NUMPY[kind][0] == "u" else f".view({NUMPY[kind]})") for i in range(len(targets))
        )
        return [(t, self.stored(value, kind, t)) for t, value in zip(targets, values, strict=True) if t != "_"]

    def _op_ld(self, ins, mask):
        op, kind, targets = ins.op, ins.op[-1], _list(ins.args[0])
        size, space = BITS[kind] // 8, space_of(ins.op)
        if space == "param":
            return self._parameters(targets, kind, ins.args[1], mask, ins.line), []
        base, offset = self.address(ins.args[1])
        order = f"{ins.line}, {'acquire' in op}" + ", True" * ("nc" in op)
        call = f"L = s.{_MEMORIES[space]}.load({base}, {offset}, {mask}, {size}, {len(targets)}, {order})"
        return self._loaded(targets, kind), [call]

    def _parameters(self, targets, kind, address, mask, line):
        _, name, offset = address
        size, written = BITS[kind] // 8, []
        for place, target in enumerate(targets):
            at = offset + place * size
            if name in self.kernel.registers:
                value = f"s.param_at({self.raw(name, 64)}, {at}, u{size}, {mask}, {line})"
            else:
                value = f"s.param({self.kernel.params[name][0] + at}, u{size})"
            value += "" if NUMPY[kind][0] == "u" else f".view({NUMPY[kind]})"
            written.append((target, self.stored(value, kind, target)))
        return written

    def _op_st(self, ins, mask):
        kind, (base, offset) = ins.op[-1], self.address(ins.args[0])
        values = ", ".join(self.raw(source, BITS[kind]) for source in _list(ins.args[1]))
        order = f"{ins.line}, {'release' in ins.op}"
        return [], [f"s.{_MEMORIES[space_of(ins.op)]}.store({base}, {offset}, {mask}, [{values}], {order})"]

    def _op_atom(self, ins, mask, result=True):
        op, kind = ins.op, ins.op[-1]
        assert kind not in ("f16", "f16x2", "bf16", "bf16x2"), "a type of atomics"
        target, address, *sources = ins.args if result else [None, *ins.args]
        base, offset = self.address(address)
        name = next(piece for piece in op if piece in _ATOMIC)
        order = next((piece for piece in op if piece in ("relaxed", "acquire", "release", "acq_rel")), "relaxed")
        values = ", ".join(self.values(sources, kind))
        where = f"{base}, {offset}, {mask}, {name!r}, {NUMPY[kind]}, [{values}], {order!r}, {ins.line}"
        call = f"L = s.{_MEMORIES[space_of(op)]}.atomic({where})"
        return [(target, self.stored("L", kind, target))] if result and target != "_" else [], [call]

    def _op_red(self, ins, mask):
        return self._op_atom(ins, mask, result=False)

    def _op_cp(self, ins, mask):
        """cp.async: asynchronous copies ("Data Movement and Conversion Instructions"), not in bulk."""
        op, args = ins.op, ins.args
        if op[:2] == ["cp", "async"] and op[2] == "commit_group":
            return [], [f"s.copies.commit({mask})"]
        if op[:2] == ["cp", "async"] and op[2] == "wait_group":
            return [], [f"s.copies.wait({int(args[0])}, {mask})"]
        if op[:2] == ["cp", "async"] and op[2] == "wait_all":
            return [], [f"s.copies.commit({mask})", f"s.copies.wait(0, {mask})"]
        if op[:2] != ["cp", "async"] or op[2] not in ("ca", "cg"):
            return self.unsupported(ins)
        (to, to_offset), (source, source_offset) = self.address(args[0]), self.address(args[1])
        if len(args) > 3 and self.kernel.registers.get(args[3], (0, 32))[1] == 1:
            return self.unsupported(ins)  # a predicate, which means the opposite of a number of bytes
        taken = self.raw(args[3], 32) if len(args) > 3 else "None"
        where = f"{to}, {to_offset}, {source}, {source_offset}, {int(args[2], 0)}, {taken}"
        return [], [f"s.copies.copy({where}, {mask}, {ins.line})"]

    def _op_prefetch(self, ins, mask):
        return [], []

    def _op_membar(self, ins, mask):
        """membar and fence ("fence"); that of a CTA orders nothing that its barriers do not."""
        return [], [f"s.global_memory.fence({mask})"] if "cta" not in ins.op else []

    def _op_fence(self, ins, mask):
        if "proxy" not in ins.op:
            return self._op_membar(ins, mask)
        assert ins.op[2] == "async", "a proxy"
        return [], [f"s.shared_memory.proxy.fence({mask})"]

    def _op_griddepcontrol(self, ins, mask):
        return [], [f"s.dependent.wait({mask})"] if ins.op[1] == "wait" else []

    # --- warps --------------------------------------------------------------------------------------------------------

    def _op_bar(self, ins, mask):
        """bar.warp.sync: a barrier of a warp; the barriers of a CTA end their blocks."""
        return [], [f"s.exchange.sync({self.raw(ins.args[0], 32)}, {mask}, {ins.line})"]

    def _op_shfl(self, ins, mask):
        target, *words = ins.args
        registers = target[0][1:] if isinstance(target, list) else (target, "_")
        values = ", ".join(self.raw(word, 32) for word in words)
        call = f"L = s.exchange.shuffle({ins.op[2]!r}, {values}, {mask}, {ins.line})"
        return [(name, f"L[{i}]") for i, name in enumerate(registers) if name != "_"], [call]

    def _op_redux(self, ins, mask):
        (target, a, members), kind = ins.args, ins.op[-1]
        where = f"{self.value(a, kind)}, {self.raw(members, 32)}, {mask}, {ins.line}"
        return [(target, self.stored("L", kind, target))], [f"L = s.exchange.reduce({ins.op[2]!r}, {where})"]

    def _op_vote(self, ins, mask):
        target, a, members = ins.args
        where = f"{self.predicate(a)}, {self.raw(members, 32)}, {mask}, {ins.line}"
        return [(target, "L")], [f"L = s.exchange.vote({ins.op[2]!r}, {where})"]

    def _op_activemask(self, ins, mask):
        return [(ins.args[0], f"s.exchange.active({mask})")], []

    def _op_ldmatrix(self, ins, mask):
        op, targets = ins.op, _list(ins.args[0])
        assert "m8n8" in op and op[-1] == "b16", "a shape of ldmatrix"
        base, offset = self.address(ins.args[1])
        where = f"{base}, {offset}, {len(targets)}, {'trans' in op}, {mask}, {ins.line}"
        return self._loaded(targets, "b32"), [f"L = s.exchange.load_matrix({where})"]

    def _op_stmatrix(self, ins, mask):
        op, words = ins.op, _list(ins.args[1])
        assert "m8n8" in op and op[-1] == "b16", "a shape of stmatrix"
        base, offset = self.address(ins.args[0])
        words = "[" + ", ".join(self.raw(word, 32) for word in words) + "]"
        return [], [f"s.exchange.store_matrix({base}, {offset}, {words}, {'trans' in op}, {mask}, {ins.line})"]

    def _op_wgmma(self, ins, mask):
        op, args = ins.op, ins.args
        if op[1] == "fence":
            return [], [f"s.warpgroups.fence({mask})"]
        if op[1] == "commit_group":
            return [], [f"s.warpgroups.commit({mask})"]
        if op[1] == "wait_group":
            return [], [f"s.warpgroups.wait({int(args[0])}, {mask})"]
        shape, kinds = next(p for p in op if p.startswith("m64n")), op[-3:]
        if kinds[0] != "f32" or kinds[1] != kinds[2] or kinds[1] not in ("f16", "bf16", "tf32"):
            return self.unsupported(ins)
        target, a, b, scale, *signs = args
        signs, across = [int(x) for x in signs[:2]], [int(x) for x in signs[2:]]
        a_across = across.pop(0) if len(across) == 2 else 0
        left = self._indices(a) if isinstance(a, list) else self.raw(a, 64)
        scale = self.raw(scale, 1) if scale.isdigit() else self.predicate(scale)
        where = f"{shape[4:].split('k')[0]}, {kinds[1]!r}, {self._indices(target)}, {left}, {bool(a_across)}"
        where += f", {self.raw(b, 64)}, {bool(across[0]) if across else False}, {scale}, {signs}, {mask}, {ins.line}"
        return [], [f"s.warpgroups.product({where})"]

    def _indices(self, names):
        return str([self.kernel.registers[name][0] for name in names])

    def _op_mma(self, ins, mask):
        op, kinds = ins.op, ins.op[-4:]
        shape = next(piece for piece in op if re.match(r"m\d+n\d+k\d+$", piece))
        if op[1:3] != ["sync", "aligned"] or not shape.startswith("m16n8k") or kinds[0] not in ("f32", "s32"):
            return self.unsupported(ins)
        a, b, c = ("[" + ", ".join(self.raw(word, 32) for word in part) + "]" for part in ins.args[1:4])
        where = f"{shape!r}, {kinds[1]!r}, {kinds[2]!r}, {kinds[0]!r}, {a}, {b}, {c}, {mask}, {ins.line}"
        return self._loaded(ins.args[0], "b32"), [f"L = s.exchange.mma({where})"]
