"""The types of PTX (PTX ISA, "Fundamental Types"): their bits, and how NumPy holds them.

A register is an array of unsigned numbers of its width, with one element a thread; a predicate is one of bools.
"""

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

BITS = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
}

#: Names of an array of a type in the source of a translated block; what NumPy lacks is as unsigned as its bits.
NUMPY = {
    "pred": "b1",
    **{kind: f"u{bits // 8}" for kind, bits in BITS.items() if kind != "pred"},
    **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"f{bits}": f"f{bits // 8}" for bits in (16, 32, 64)},
}

#: Names that the source of a translated block may use for types.
NAMES = dict(b1=np.bool_, u1=u1, u2=u2, u4=u4, u8=u8, i1=i1, i2=i2, i4=i4, i8=i8, f2=f2, f4=f4, f8=f8)


def is_float(kind: str) -> bool:
    return kind in ("f16", "f32", "f64")


def is_signed(kind: str) -> bool:
    return kind[0] == "s"
