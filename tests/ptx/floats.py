"""Floating-point arithmetic and conversions (PTX ISA, "Floating Point Instructions" and "cvt"), on NumPy arrays.

bfloat16 is held as its bits, in uint16; two of a half type in a word as uint32.
"""

import numpy as np

from tests.ptx.kinds import f2, f4, f8, i8, u2, u4, u8


def ftz(x):
    """.ftz: a subnormal float32 is a zero of its sign."""
    return np.where(np.abs(x) < f4(2.0**-126), np.copysign(f4(0), x), x)


def saturated(x):
    """.sat: within 0 and 1, and 0 for NaN."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


def minmax(function, a, b, nan):
    """min, max: NaN if one is NaN with .NaN, else the number beside it; of zeros, -0.0 is the less."""
    done = (getattr(np, {"min": "minimum", "max": "maximum"}[function]) if nan else getattr(np, f"f{function}"))(a, b)
    zeros = (a == 0) & (b == 0)
    if not zeros.any():
        return done
    bits = f"u{a.dtype.itemsize}"
    signed = (a.view(bits) | b.view(bits)) if function == "min" else (a.view(bits) & b.view(bits))
    return np.where(zeros, signed.view(a.dtype), done)


def xorsign(function, a, b, nan):
    """min, max with .xorsign.abs: of the magnitudes, with the product of both signs; a NaN stays as it is."""
    done = minmax(function, np.abs(a), np.abs(b), nan)
    return np.where((np.signbit(a) ^ np.signbit(b)) & ~np.isnan(done), -done, done)


def _sum_to_odd(a, b):
    """Add in float64, rounded to odd: a further rounding to fewer digits then equals one from the start."""
    near = a + b
    back = near - a
    off = (a - (near - back)) + (b - back)  # what the rounding left out, exactly
    even = (near.view(u8) & u8(1)) == 0
    return np.where(np.isfinite(near) & (off != 0) & even, np.nextafter(near, np.copysign(np.inf, off)), near)


def fma4(a, b, c):
    """fma.f32: the product is exact in float64; the sum is rounded once."""
    product, c = a.astype(f8) * b.astype(f8), c.astype(f8)
    total = product + c
    # In the middle of two numbers of float32, and below its normal ones, two roundings can differ from one.
    doubtful = ((total.view(u8) & u8(0x1FFFFFFF)) == u8(0x10000000)) | (np.abs(total) < 2.0**-126)
    return (_sum_to_odd(product, c) if doubtful.any() else total).astype(f4)


def fma_to_bf16(a, b, c):
    return f8_to_bf16(_sum_to_odd(a * b, c))


def fma_to_f2(a, b, c):
    return f8_to_f2(_sum_to_odd(a * b, c))


def approximate(name, x):
    """Compute, correctly rounded, the special function unit's approximations, which err by about 2 units."""
    x = x.astype(f8)
    exact = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": lambda v: 1.0 / v, "rsqrt": lambda v: 1.0 / np.sqrt(v),
        "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    }  # fmt: skip
    return exact[name](x).astype(f4)


# --- conversions ------------------------------------------------------------------------------------------------------


def bf16_to_f4(x):
    return (x.astype(u4) << u4(16)).view(f4)


def f4_to_bf16(x, rounding="rn"):
    """Round to the nearest, ties to even, or cut off (rz); NaN is 0x7fff."""
    bits = np.ascontiguousarray(x, f4).view(u4)
    if rounding == "rn":
        bits = bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))
    return np.where(np.isnan(x), u2(0x7FFF), (bits >> u4(16)).astype(u2))


def _to_odd(x):
    """Round float64 to odd in float32: a further rounding then equals one rounding from the start."""
    near = x.astype(f4)
    bits, wide = near.view(u4), near.astype(f8)
    toward = np.where(np.abs(wide) > np.abs(x), bits - u4(1), bits)
    return np.where(np.isfinite(near) & (wide != x), toward | u4(1), bits).view(f4)


def f8_to_bf16(x):
    return f4_to_bf16(_to_odd(x))


def f8_to_f2(x):
    return _to_odd(x).astype(f2)


def pair(high, low):
    """Return two 16-bit numbers as a word."""
    return (high.view(u2).astype(u4) << u4(16)) | low.view(u2).astype(u4)


def to_tf32(bits):
    """cvt.rna.tf32: to the nearest of 11 digits, ties away from zero."""
    special = (bits & u4(0x7F800000)) == u4(0x7F800000)
    return np.where(special, bits, (bits + u4(0x1000)) & u4(0xFFFFE000))


def directed(x, kind, rounding):
    """Round toward zero (rz), down (rm) or up (rp)."""
    near = x.astype(kind)
    wide, x = near.astype(f8), x.astype(f8)
    if rounding == "rz":
        return np.where(np.abs(wide) > np.abs(x), np.nextafter(near, kind(0)), near)
    off, to = (wide > x, -np.inf) if rounding == "rm" else (wide < x, np.inf)
    return np.where(off, np.nextafter(near, kind(to)), near)


def whole(x, rounding):
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x)


def to_integer(x, kind, rounding):
    """Convert to an integer: numbers beyond the type's ends become its ends.

    NaN is 0, but only the highest bit is set where the source or the integer has 64 bits ("cvt", "Integer Notes").
    """
    info, nan = np.iinfo(kind), np.isnan(x)
    unlike = kind(info.min or info.max // 2 + 1) if x.dtype == f8 or info.bits == 64 else kind(0)
    x = whole(np.where(nan, x.dtype.type(0), x).astype(f8), rounding)
    above, below = x >= float(info.max), x <= float(info.min)
    inner = np.where(above | below, 0.0, x).astype(i8 if info.min else u8).astype(kind)
    return np.where(nan, unlike, np.where(above, kind(info.max), np.where(below, kind(info.min), inner)))


_E4M3 = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])
_E4M3 = _E4M3[:127]


def f4_to_e4m3(x):
    """cvt.rn.satfinite.e4m3x2: to the nearest, ties to even, at most 448; NaN is 0x7f, without its sign."""
    size = np.where(np.isnan(x), 0.0, np.minimum(np.abs(x.astype(f8)), 448.0))
    code = np.searchsorted(_E4M3, size, "right") - 1
    above = np.minimum(code + 1, 126)
    middle = (_E4M3[code] + _E4M3[above]) / 2
    code = np.where((size > middle) | ((size == middle) & (code & 1 == 1)), above, code)
    return np.where(np.isnan(x), 127, code | np.where(np.signbit(x), 128, 0)).astype(u2)


def e4m3_to_f2(x):
    code = (x & u2(127)).astype(i8)
    value = np.where(code == 127, np.nan, np.append(_E4M3, 0.0)[code])
    return np.where(x & u2(128), -value, value).astype(f2)
