"""Whole numbers (PTX ISA, "Integer Arithmetic Instructions" and "Logic and Shift Instructions"), on NumPy arrays."""

import numpy as np

from tests.ptx.kinds import i2, i4, i8, u2, u4, u8

_WIDER = {u2: u4, i2: i4, u4: u8, i4: i8}


def divide(a, b):
    """div: cut off toward zero; a division by zero gives a number that the machine chooses, all ones here."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a))
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def remainder(a, b):
    return a - divide(a, b) * b


def mul_hi(a, b):
    """mul.hi: the upper half of the product."""
    if a.dtype == u8:
        low, high = u8(0xFFFFFFFF), u8(32)
        a0, a1, b0, b1 = a & low, a >> high, b & low, b >> high
        middle = a1 * b0 + ((a0 * b0) >> high)
        return a1 * b1 + (middle >> high) + (((middle & low) + a0 * b1) >> high)
    wide = _WIDER[a.dtype.type]
    return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)


def shift_left(a, by):
    """shl: beyond the width, zero; NumPy's shifts are the same, by a number of the type."""
    return a << np.minimum(by, u4(127)).astype(a.dtype)


def shift_right(a, by):
    """shr: beyond the width, zero or copies of the sign."""
    return a >> np.minimum(by, u4(127)).astype(a.dtype)


def _bits(length):
    return np.where(length >= 64, ~u8(0), (u8(1) << np.minimum(length, 63).astype(u8)) - u8(1))


def bfe(a, position, length, signed):
    """bfe: `length` bits of `a` from `position` on, extended by the field's last bit where they are signed."""
    width = 8 * a.dtype.itemsize
    position, length = (position & u4(255)).astype(i8), (length & u4(255)).astype(i8)
    value, mask = a.astype(u8), _bits(length)
    field = (value >> np.minimum(position, 63).astype(u8)) & mask
    if signed:
        last = np.clip(np.minimum(position + length - 1, width - 1), 0, 63).astype(u8)
        negative = ((value >> last) & u8(1)).astype(bool) & (length > 0)
        beyond = ~u8(0) << np.maximum(width - position, 0).clip(0, 63).astype(u8)
        field = np.where(negative, field | ~mask | beyond, field)
    return field.astype(a.dtype)


def bfi(a, b, position, length):
    """bfi: `length` bits of `a` in place of those of `b` from `position` on."""
    width = 8 * b.dtype.itemsize
    position, length = (position & u4(255)).astype(i8), (length & u4(255)).astype(i8)
    at = np.minimum(position, 63).astype(u8)
    mask = np.where(position < width, _bits(length) << at, u8(0))
    return ((b.astype(u8) & ~mask) | ((a.astype(u8) << at) & mask)).astype(b.dtype)


def prmt(a, b, selector):
    """prmt ("Data Movement and Conversion Instructions"): four bytes of the eight, or copies of their signs."""
    source = a.astype(u8) | (b.astype(u8) << u8(32))
    result = np.zeros_like(a)
    for byte in range(4):
        control = ((selector >> u4(4 * byte)) & u4(15)).astype(u8)
        value = (source >> ((control & u8(7)) * u8(8))) & u8(255)
        value = np.where(control & u8(8), np.where(value & u8(128), u8(255), u8(0)), value)
        result |= value.astype(u4) << u4(8 * byte)
    return result


def lop3(a, b, c, table):
    """lop3: the bit that `table` has for each three bits; the place is 4 a + 2 b + c."""
    result = np.zeros_like(a)
    for place in range(8):
        if table >> place & 1:
            result |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return result


def shf(low, high, by, left, wrap):
    """shf: a funnel shift of the 64 bits, of which a shift to the left keeps the upper half."""
    by = (by & u4(31) if wrap else np.minimum(by, u4(32))).astype(u8)
    both = low.astype(u8) | (high.astype(u8) << u8(32))
    return ((both << by) >> u8(32)).astype(u4) if left else (both >> by).astype(u4)


def popc(a):
    return np.bitwise_count(a).astype(u4)


def clz(a):
    width = 8 * a.dtype.itemsize
    result = np.full(a.shape, width, u4)
    for bit in range(width):
        result = np.where((a >> a.dtype.type(bit)) & a.dtype.type(1) != 0, u4(width - 1 - bit), result)
    return result


def brev(a):
    result, width = np.zeros_like(a), 8 * a.dtype.itemsize
    for bit in range(width):
        result |= ((a >> a.dtype.type(bit)) & a.dtype.type(1)) << a.dtype.type(width - 1 - bit)
    return result
