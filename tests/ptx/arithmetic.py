"""Arithmetic, logic, comparisons and conversions as source: a part of the translator."""

from tests.ptx.kinds import BITS, NUMPY, is_float

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_DIRECTIONS = ("rz", "rm", "rp")
_WHOLE = ("rni", "rzi", "rmi", "rpi")


class Arithmetic:
    """Methods `_alu_NAME(op, args, kind)` give an expression, and its type where it is not `kind`.

    Methods `_op_NAME(ins, mask)` give what is written to which register, and statements that come before.
    """

    def _arithmetic(self, ins, mask):
        method = getattr(self, f"_alu_{ins.op[0]}", None)
        result = method(ins.op, ins.args[1:], ins.op[-1]) if method else self.unsupported(ins)
        expression, kind = result if isinstance(result, tuple) else (result, ins.op[-1])
        return [(ins.args[0], self.stored(expression, kind, ins.args[0]))], []

    # --- two operands and three ---------------------------------------------------------------------------------------

    def _halves(self, arg, kind, wide="f4"):
        """Return an operand of one or two half-typed numbers, as numbers of `wide`."""
        raw = f"{self.raw(arg, BITS[kind])}.view(u2)"
        if kind.startswith("bf16"):
            return f"bf16_to_f4({raw})" + (".astype(f8)" if wide == "f8" else "")
        return f"{raw}.view(f2)" + (f".astype({wide})" if wide == "f8" else "")

    def _infix(self, sign, op, args, kind):
        """Add and multiply half types in float32 or float16, and round once."""
        assert "sat" not in op or kind == "f32", "saturation of this type"
        if kind in ("f16x2", "bf16", "bf16x2"):
            a, b = (self._halves(arg, kind) for arg in args)
            done = f"({a} {sign} {b})"
            done = f"f4_to_bf16{done}" if kind.startswith("bf16") else done
            return f"{done}.view({NUMPY[kind]})"
        a, b = self.values(args, kind, op)
        done = f"({a} {sign} {b})"
        if kind == "f32":
            done = f"saturated{done}" if "sat" in op else done
            done = f"ftz({done})" if "ftz" in op else done
        return done

    def _alu_add(self, op, args, kind):
        return self._infix("+", op, args, kind)

    def _alu_sub(self, op, args, kind):
        return self._infix("-", op, args, kind)

    def _alu_mul(self, op, args, kind):
        if is_float(kind) or kind.endswith("x2") or kind == "bf16":
            return self._infix("*", op, args, kind)
        a, b = self.values(args, kind)
        if "wide" in op:
            out = f"{kind[0]}{2 * BITS[kind]}"
            return f"({a}.astype({NUMPY[out]}) * {b}.astype({NUMPY[out]}))", out
        assert "hi" not in op or kind != "s64", "the upper half of a type"
        return f"mul_hi({a}, {b})" if "hi" in op else f"({a} * {b})"

    def _alu_mad(self, op, args, kind):
        if is_float(kind):
            return self._alu_fma(op, args, kind)
        product = self._alu_mul(op, args[:2], kind)
        product, out = product if isinstance(product, tuple) else (product, kind)
        return f"({product} + {self.value(args[2], out)})", out

    def _alu_fma(self, op, args, kind):
        if kind in ("f16", "f16x2", "bf16", "bf16x2"):
            a, b, c = (self._halves(arg, kind, "f8") for arg in args)
            done = f"fma_to_{'bf16' if kind.startswith('bf16') else 'f2'}({a}, {b}, {c})"
            return done if kind == "f16" else f"{done}.view({NUMPY[kind]})"
        assert kind == "f32", "a type of fma"
        a, b, c = self.values(args, kind, op)
        done = f"fma4({a}, {b}, {c})"
        return f"ftz({done})" if "ftz" in op else done

    def _alu_div(self, op, args, kind):
        return self._infix("/", op, args, kind) if is_float(kind) else f"divide({', '.join(self.values(args, kind))})"

    def _alu_rem(self, op, args, kind):
        return f"remainder({', '.join(self.values(args, kind))})"

    def _alu_copysign(self, op, args, kind):
        """Take the sign of the first, the magnitude of the second."""
        sign, size = self.values(args, kind)
        return f"np.copysign({size}, {sign})"

    def _minmax(self, op, args, kind):
        assert ("abs" in op) == ("xorsign" in op), "magnitudes without the signs"
        function = "xorsign" if "xorsign" in op else "minmax"
        if is_float(kind):
            a, b = self.values(args, kind, op)
            return f"{function}({op[0]!r}, {a}, {b}, {'NaN' in op})"
        if kind in ("f16x2", "bf16", "bf16x2"):
            a, b = (self._halves(arg, kind) for arg in args)
            done = f"{function}({op[0]!r}, {a}, {b}, {'NaN' in op})"
            done = f"f4_to_bf16({done})" if kind.startswith("bf16") else done
            return f"{done}.view({NUMPY[kind]})"
        return f"np.{op[0]}imum({', '.join(self.values(args, kind))})"

    _alu_min = _alu_max = _minmax

    def _bitwise(self, op, args, kind):
        a, b = (self.predicate(arg) if kind == "pred" else self.value(arg, kind) for arg in args)
        return f"({a} {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[op[0]]} {b})"

    _alu_and = _alu_or = _alu_xor = _bitwise

    def _alu_shl(self, op, args, kind):
        return f"shift_left({self.value(args[0], kind)}, {self.raw(args[1], 32)})"

    def _alu_shr(self, op, args, kind):
        return f"shift_right({self.value(args[0], kind)}, {self.raw(args[1], 32)})"

    def _alu_shf(self, op, args, kind):
        return f"shf({', '.join(self.raw(arg, 32) for arg in args)}, {op[1] == 'l'}, {'wrap' in op})"

    def _alu_bfe(self, op, args, kind):
        words = self.raw(args[0], BITS[kind]), self.raw(args[1], 32), self.raw(args[2], 32)
        return f"bfe({', '.join(words)}, {kind[0] == 's'})", f"b{BITS[kind]}"

    def _alu_bfi(self, op, args, kind):
        bits = (BITS[kind], BITS[kind], 32, 32)
        return f"bfi({', '.join(self.raw(arg, of) for arg, of in zip(args, bits, strict=True))})"

    def _alu_prmt(self, op, args, kind):
        assert len(op) == 2, "a mode of prmt"
        return f"prmt({', '.join(self.raw(arg, 32) for arg in args)})"

    def _alu_lop3(self, op, args, kind):
        return f"lop3({', '.join(self.raw(arg, 32) for arg in args[:3])}, {int(args[3].rstrip('U'), 0)})"

    def _alu_selp(self, op, args, kind):
        a, b = (self.raw(arg, BITS[kind]) for arg in args[:2])
        return f"where({self.raw(args[2], 1)}, {a}, {b})", f"b{BITS[kind]}"

    # --- one operand --------------------------------------------------------------------------------------------------

    def _alu_neg(self, op, args, kind):
        if kind in ("f16x2", "bf16x2", "bf16"):
            return f"({self.raw(args[0], BITS[kind])} ^ {NUMPY[kind]}({0x8000 if kind == 'bf16' else 0x80008000}))"
        return f"(-{self.values(args, kind, op)[0]})"

    def _alu_abs(self, op, args, kind):
        if kind in ("f16x2", "bf16x2", "bf16"):
            return f"({self.raw(args[0], BITS[kind])} & {NUMPY[kind]}({0x7FFF if kind == 'bf16' else 0x7FFF7FFF}))"
        return f"np.abs({self.values(args, kind, op)[0]})"

    def _alu_not(self, op, args, kind):
        return f"(~{self.value(args[0], kind)})"

    def _alu_popc(self, op, args, kind):
        return f"popc({self.value(args[0], kind)})", "b32"

    def _alu_clz(self, op, args, kind):
        return f"clz({self.value(args[0], kind)})", "b32"

    def _alu_brev(self, op, args, kind):
        return f"brev({self.value(args[0], kind)})"

    def _special(self, op, args, kind):
        assert kind in ("f32", "f64"), "a type of approximations"
        (x,) = self.values(args, kind, op)
        if kind == "f64":
            return f"(1.0 / {x})" if op[0] == "rcp" else f"np.{op[0]}({x})"
        done = f"approximate({op[0]!r}, {x})"
        return f"ftz({done})" if "ftz" in op else done

    _alu_ex2 = _alu_lg2 = _alu_rcp = _alu_rsqrt = _alu_sqrt = _alu_sin = _alu_cos = _alu_tanh = _special

    def _alu_cvta(self, op, args, kind):
        address = self.raw(args[0], 64)
        return f"({address} {'-' if 'to' in op else '+'} s.shared_window)" if "shared" in op else address

    def _alu_mov(self, op, args, kind):
        bits = BITS[kind]
        if not isinstance(args[0], list):
            return self.raw(args[0], bits), "pred" if bits == 1 else f"b{bits}"
        small, word = bits // len(args[0]), f"u{bits // 8}"
        parts = (f"({self.raw(arg, small)}.astype({word}) << {word}({small * i}))" for i, arg in enumerate(args[0]))
        return f"({' | '.join(parts)})", f"b{bits}"

    def _op_mov(self, ins, mask):
        target = ins.args[0]
        if not isinstance(target, list):
            return self._arithmetic(ins, mask)
        bits = BITS[ins.op[-1]]
        small, source = bits // len(target), self.raw(ins.args[1], bits)
        parts = [f"({source} >> u{bits // 8}({small * i})).astype(u{small // 8})" for i in range(len(target))]
        return [(name, part) for name, part in zip(target, parts, strict=True) if name != "_"], []

    # --- comparisons --------------------------------------------------------------------------------------------------

    def _op_setp(self, ins, mask):
        op, args, kind = ins.op, ins.args, ins.op[-1]
        registers = args[0][0][1:] if isinstance(args[0], list) else (args[0],)
        test = self._test(op, args[1:3], kind)
        # Of two numbers in a word, the first result is the lower's, the second the upper's.
        results = [f"{test}[{half}::2]" for half in (0, 1)] if kind.endswith("x2") else [test, f"(~{test})"]
        if combine := next((piece for piece in op[2:] if piece in ("and", "or", "xor")), None):
            sign = {"and": "&", "or": "|", "xor": "^"}[combine]
            results = [f"({result} {sign} {self.predicate(args[3])})" for result in results]
        return [(name, result) for name, result in zip(registers, results, strict=False) if name != "_"], []

    def _test(self, op, args, kind):
        """setp: of NaN, the ordered comparisons are false and those that end in u are true."""
        compare = op[1]
        if compare in _UNSIGNED:
            a, b = (self.raw(arg, BITS[kind]) for arg in args)
            return f"({a} {_UNSIGNED[compare]} {b})"
        halves = kind in ("bf16", "bf16x2", "f16x2")
        a, b = (self._halves(arg, kind) for arg in args) if halves else self.values(args, kind, op)
        if not (is_float(kind) or halves):
            return f"({a} {_COMPARE[compare]} {b})"
        unordered = f"(np.isnan({a}) | np.isnan({b}))"
        if compare in ("num", "nan"):
            return unordered if compare == "nan" else f"(~{unordered})"
        if compare.endswith("u"):
            return f"({unordered} | ({a} {_COMPARE[compare[:-1]]} {b}))"
        return f"(({a} < {b}) | ({a} > {b}))" if compare == "ne" else f"({a} {_COMPARE[compare]} {b})"

    # --- conversions --------------------------------------------------------------------------------------------------

    def _op_cvt(self, ins, mask):
        (target, *args), (to, source) = ins.args, ins.op[-2:]
        if to.endswith("x2") or source.endswith("x2"):
            return [(target, self._pair(ins, to, source, args))], []
        assert len(args) == 1, "two numbers to one"
        if to == "tf32":
            assert "rna" in ins.op, "a rounding of tf32"
            return [(target, f"to_tf32({self.raw(args[0], 32)})")], []
        kind = "b16" if to == "bf16" else to
        return [(target, self.stored(self._one(ins.op, to, source, args[0]), kind, target))], []

    def _pair(self, ins, to, source, args):
        """Put two numbers of a narrow type into one register; the first operand is the upper."""
        op = ins.op
        if (
            to in ("bf16x2", "f16x2")
            and source == "f32"
            and not {"satfinite", "relu"} & set(op)
            and {"rn", "rz"} & set(op)
        ):
            rounding = "rn" if "rn" in op else "rz"
            floats = [self.value(arg, "f32") for arg in args]
            if to == "bf16x2":
                return "pair({}, {})".format(*(f"f4_to_bf16({x}, {rounding!r})" for x in floats))
            return "pair({}, {})".format(
                *(f"directed({x}, f2, 'rz')" if rounding == "rz" else f"{x}.astype(f2)" for x in floats)
            )
        if to == "e4m3x2":
            if source == "f32":
                high, low = (f"f4_to_e4m3({self.value(arg, 'f32')})" for arg in args)
            else:
                word = self.raw(args[0], 32)
                high, low = (f"f4_to_e4m3(({word} >> u4({by})).astype(u2).view(f2).astype(f4))" for by in (16, 0))
            return f"(({high} << u2(8)) | {low})"
        if source == "e4m3x2" and to == "f16x2":
            word = self.raw(args[0], 16)
            return f"pair(e4m3_to_f2({word} >> u2(8)), e4m3_to_f2({word}))"
        return self.unsupported(ins)

    def _one(self, op, to, source, arg):
        rounding = next((piece for piece in op if piece in ("rn", "rna", *_DIRECTIONS, *_WHOLE)), None)
        value, kind = self._halves(arg, source) if source == "bf16" else self.value(arg, source), source
        kind = "f32" if source == "bf16" else source
        if "ftz" in op and kind == "f32":
            value = f"ftz({value})"
        numpy = NUMPY[to]
        if not is_float(kind):
            assert rounding in ("rn", None) and "sat" not in op, "a rounding of whole numbers"
            assert to != "bf16" or BITS[kind] <= 16, "float32 does not hold it"
            return f"f4_to_bf16({value}.astype(f4))" if to == "bf16" else f"{value}.astype({numpy})"
        if to == "bf16":
            assert rounding in ("rn", "rz", None) and kind in ("f32", "f16"), "a rounding to bf16"
            return f"f4_to_bf16({value}.astype(f4), {rounding or 'rn'!r})"
        if not is_float(to):
            return f"to_integer({value}, {numpy}, {rounding!r})"
        if rounding in _WHOLE:
            value = f"whole({value}, {rounding!r})"
        done = f"directed({value}, {numpy}, {rounding!r})" if rounding in _DIRECTIONS else f"{value}.astype({numpy})"
        done = f"saturated({done})" if "sat" in op else done
        return f"ftz({done})" if "ftz" in op and to == "f32" else done
