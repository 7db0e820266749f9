"""Products of the matrix unit (PTX ISA, "Warp Level Matrix Instructions" and "Asynchronous Warpgroup Level Matrix
Instructions"): where a lane holds which element, and the sums.

NVIDIA does not say how the unit sums. Here a sum of one instruction is exact and rounded once, to the nearest or, by
option, toward zero: an A100's or H100's lies near the latter (tests/kit/matrix_unit.py).
"""

import numpy as np

from tests.ptx.floats import bf16_to_f4
from tests.ptx.kinds import f2, f4, f8, i1, i4, i8, u1, u2, u4


def rounded(exact, rounding):
    """Round float64 sums to float32."""
    near = exact.astype(f4)
    if rounding == "truncate":
        near = np.where(np.abs(near.astype(f8)) > np.abs(exact), np.nextafter(near, f4(0)), near)
    return near


def numbers(raw, kind):
    """Return the bytes of the last axis as float64 numbers of a type; of float32 for TF32 the unit reads 19 bits."""
    raw = np.ascontiguousarray(raw)
    if kind == "tf32":
        return (raw.view(u4) & u4(0xFFFFE000)).view(f4).astype(f8)
    if kind == "bf16":
        return bf16_to_f4(raw.view(u2)).astype(f8)
    return raw.view({"f16": f2, "s8": i1, "u8": u1}[kind]).astype(f8)


def _rows(register, kind):
    """Return a register `[warps, 32]` as `[warps, 8 rows, numbers]`: row g is in lanes 4 g to 4 g + 3."""
    return numbers(register.reshape(-1, 8, 4), kind)


def left_operand(registers, kind):
    """Return A of m16, `[warps, 16, k]`: registers alternate between rows g and g + 8, columns ascend."""
    parts = [_rows(register, kind) for register in registers]
    return np.concatenate([np.concatenate(parts[half::2], 2) for half in (0, 1)], 1)


def accumulator(registers):
    """Return C of m16 and any n, `[warps, 16, n]`: of eight columns, lanes hold two of row g and two of g + 8."""
    words = np.stack([np.ascontiguousarray(register) for register in registers]).reshape(
        -1, 2, 2, registers[0].shape[0], 8, 4
    )
    # [n / 8, half, of two, warps, g, t] to [warps, half, g, n / 8, t, of two]
    return words.transpose(3, 1, 4, 0, 5, 2).reshape(registers[0].shape[0], 16, -1)


def lanes(matrix):
    """Return the registers, each `[warps, 32]`, that hold `[warps, 16, n]`: the inverse of `accumulator`."""
    warps, _, n = matrix.shape
    parts = matrix.reshape(warps, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, warps, 32)
    return [np.ascontiguousarray(part) for part in parts]


def mma(shape, a_kind, b_kind, d_kind, a, b, c, rounding="nearest"):
    """mma.m16n8: `a`, `b`, `c` as lists of registers `[warps, 32]`; gives those of the result."""
    left = left_operand(a, a_kind)
    right = np.concatenate([_rows(register, b_kind) for register in b], 2)  # [warps, 8, k]
    assert left.shape[2] == right.shape[2] == int(shape.split("k")[1]), (shape, left.shape, right.shape)
    product = left @ right.transpose(0, 2, 1)
    before = accumulator(c)
    if d_kind == "s32":
        total = (product.astype(i8) + before.view(i4)).astype(i4)
    else:
        total = rounded(product + before.view(f4), rounding)
    return lanes(total.view(u4))
