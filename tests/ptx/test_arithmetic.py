"""Instructions on one thread's own numbers, against answers computed otherwise."""

import numpy as np
import pytest

from tests.ptx.assembled import binary, run, unary

RNG = np.random.default_rng(1)
INTS = RNG.integers(-(2**31), 2**31, 32).astype(np.int32)
OTHER = np.concatenate([RNG.integers(-(2**31), 2**31, 24), [1, -1, 7, -7, 2, 3, -2, 100]]).astype(np.int32)
FLOATS = RNG.standard_normal(32).astype(np.float32) * 100
UNSIGNED = [(int(x) % 2**32, int(y) % 2**32) for x, y in zip(INTS, OTHER, strict=True)]
PAIRS = [(int(x), int(y)) for x, y in zip(INTS, OTHER, strict=True)]


def words(values):
    return np.array([int(v) % 2**32 for v in values], np.uint32)


def floats(*values):
    return np.array([*values, *[0] * (32 - len(values))], np.float32)


def cut_off(x, y):
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


@pytest.mark.parametrize(
    "op, expected",
    [
        ("add.s32", [x + y for x, y in PAIRS]),
        ("sub.s32", [x - y for x, y in PAIRS]),
        ("mul.lo.s32", [x * y for x, y in PAIRS]),
        ("mul.hi.s32", [(x * y) >> 32 for x, y in PAIRS]),
        ("mul.hi.u32", [(x * y) >> 32 for x, y in UNSIGNED]),
        ("div.s32", [cut_off(x, y) for x, y in PAIRS]),
        ("div.u32", [x // y for x, y in UNSIGNED]),
        ("rem.s32", [x - cut_off(x, y) * y for x, y in PAIRS]),
        ("min.s32", [min(pair) for pair in PAIRS]),
        ("max.u32", [max(pair) for pair in UNSIGNED]),
        ("and.b32", [x & y for x, y in PAIRS]),
        ("or.b32", [x | y for x, y in PAIRS]),
        ("xor.b32", [x ^ y for x, y in PAIRS]),
    ],
)
def test_whole_numbers(op, expected):
    assert (binary(op, INTS, OTHER) == words(expected)).all()


def test_shifts_beyond_the_width():
    by = (np.arange(32) * 2).astype(np.int32)
    assert (
        binary("shl.b32", INTS, by) == words(x << int(y) for x, y in zip(INTS.astype(object), by, strict=True))
    ).all()
    assert (binary("shr.s32", INTS, by) == words(int(x) >> int(y) for x, y in zip(INTS, by, strict=True))).all()
    assert (binary("shr.u32", INTS, by) == words(x >> int(y) for (x, _), y in zip(UNSIGNED, by, strict=True))).all()
    assert (binary("shl.b32", INTS, np.full(32, -1, np.int32)) == 0).all()


def test_funnel_shifts():
    body = """ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5]; shf.l.wrap.b32 %r3, %r1, %r2, 39;
    shf.r.clamp.b32 %r4, %r1, %r2, 40; xor.b32 %r5, %r3, %r4; st.global.b32 [%d6], %r5;"""
    expected = [((y << 7 | x >> 25) & 0xFFFFFFFF) ^ y for x, y in UNSIGNED]
    assert (run(body, INTS.view(np.uint32), OTHER.view(np.uint32)) == words(expected)).all()


def test_bits():
    assert (unary("popc.b32", INTS) == [bin(x).count("1") for x, _ in UNSIGNED]).all()
    assert (unary("clz.b32", INTS) == [32 - x.bit_length() for x, _ in UNSIGNED]).all()
    assert (unary("brev.b32", INTS) == [int(f"{x:032b}"[::-1], 2) for x, _ in UNSIGNED]).all()
    body = """ld.global.b32 %r1, [%d4]; bfe.s32 %r2, %r1, 7, 9; bfe.u32 %r3, %r1, 7, 9; sub.s32 %r4, %r3, %r2;
    bfi.b32 %r4, %r4, 0, 3, 20; st.global.b32 [%d6], %r4;"""
    field = [((x >> 7 & 511) - ((x >> 7 & 511) - (x >> 15 & 1) * 512)) << 3 & 0x7FFFFF for x, _ in UNSIGNED]
    assert (run(body, INTS.view(np.uint32)) == field).all()


def test_prmt():
    """Use digits of the selector from the lowest: byte 0, byte 7, the sign of byte 3 (0xB), byte 3."""
    first, second = np.full(32, 0x83020100, np.uint32), np.full(32, 0x87068504, np.uint32)
    body = """ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5]; prmt.b32 %r3, %r1, %r2, 0x3B70;
    st.global.b32 [%d6], %r3;"""
    assert run(body, first, second)[0] == 0x83FF8700


def test_lop3():
    body = """ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5]; lop3.b32 %r3, %r1, %r2, %r0, {};
    st.global.b32 [%d6], %r3;"""
    for table, function in ((0xEA, lambda a, b, c: a & b | c), (0x6A, lambda a, b, c: (a & b) ^ c)):
        expected = words(function(x, y, i) for i, (x, y) in enumerate(UNSIGNED))
        assert (run(body.format(table), INTS.view(np.uint32), OTHER.view(np.uint32)) == expected).all()


def test_wide_products():
    body = """ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5]; mul.wide.s32 %d7, %r1, %r2; shr.s64 %d7, %d7, 17;
    cvt.u32.u64 %r3, %d7; st.global.b32 [%d6], %r3;"""
    expected = words((x * y) >> 17 for x, y in PAIRS)
    assert (run(body, INTS.view(np.uint32), OTHER.view(np.uint32)) == expected).all()


# --- floating point ---------------------------------------------------------------------------------------------------


def test_sums_and_products():
    a, b = FLOATS, FLOATS[::-1].copy()
    assert (binary("add.f32", a, b, np.float32) == a + b).all()
    body = """ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5]; fma.rn.f32 %r3, %r1, %r2, %r1;
    st.global.b32 [%d6], %r3;"""
    exact = (a.astype(np.longdouble) * b + a).astype(np.float32)
    assert (run(body, a.view(np.uint32), b.view(np.uint32)).view(np.float32) == exact).all()


def test_minimum_and_maximum_of_nan():
    nan, b = FLOATS.copy(), FLOATS[::-1].copy()
    nan[::3] = np.nan
    assert (binary("max.f32", nan, b, np.float32) == np.fmax(nan, b)).all()
    assert (np.isnan(binary("max.NaN.f32", nan, b, np.float32)) == np.isnan(nan)).all()
    assert (binary("min.f32", nan, b, np.float32) == np.fmin(nan, b)).all()


def test_subnormal_numbers_are_flushed_where_an_instruction_says_so():
    tiny = floats(2.0**-130, -(2.0**-130), 1)
    assert (binary("add.f32", tiny, floats(), np.float32) == tiny).all()
    flushed = binary("add.ftz.f32", tiny, floats(), np.float32)
    assert (flushed[:3] == [0, 0, 1]).all() and np.signbit(flushed[1]) == np.signbit(np.float32(-0.0) + 0)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("lt", [1, 0, 0, 0]),
        ("ltu", [1, 0, 1, 0]),
        ("eq", [0, 1, 0, 0]),
        ("ne", [1, 0, 0, 1]),
        ("neu", [1, 0, 1, 1]),
        ("num", [1, 1, 0, 1]),
        ("nan", [0, 0, 1, 0]),
        ("geu", [0, 1, 1, 1]),
    ],
)
def test_comparisons_with_nan(name, expected):
    body = f"""ld.global.b32 %r1, [%d4]; setp.{name}.f32 %p1, %r1, 0f40000000; selp.b32 %r2, 1, 0, %p1;
    st.global.b32 [%d6], %r2;"""
    assert (run(body, np.array([1, 2, np.nan, 3] * 8, np.float32).view(np.uint32))[:4] == expected).all()


def test_a_comparison_with_two_results_and_a_third_operand():
    body = """setp.lt.u32 %p1, %r0, 9; setp.ge.and.u32 %p2|%p3, %r0, 5, !%p1; selp.b32 %r1, 1, 0, %p2;
    selp.b32 %r2, 2, 0, %p3; add.s32 %r1, %r1, %r2; st.global.b32 [%d6], %r1;"""
    assert (run(body) == [0 if i < 9 else 1 for i in range(32)]).all()


# --- conversions ------------------------------------------------------------------------------------------------------


def test_to_whole_numbers():
    values = floats(1.7, -1.7, 3e9, -3e9, np.nan, 2.5, -0.5)
    assert (unary("cvt.rzi.s32.f32", values, np.int32)[:7] == [1, -1, 2**31 - 1, -(2**31), 0, 2, 0]).all()
    assert (unary("cvt.rni.s32.f32", values, np.int32)[:7] == [2, -2, 2**31 - 1, -(2**31), 0, 2, 0]).all()
    assert (unary("cvt.rmi.s32.f32", values, np.int32)[5:7] == [2, -1]).all()
    assert (unary("cvt.rzi.u32.f32", values)[:5] == [1, 0, 3 * 10**9, 0, 0]).all()


def test_to_tf32():
    """Round to the nearest of ten digits behind the point; ties go away from zero."""
    found = unary("cvt.rna.tf32.f32", floats(1 + 2**-11, 1 + 2**-12, -1 - 2**-11), np.float32)
    assert (found[:3] == [1 + 2**-10, 1, -1 - 2**-10]).all()


def test_to_half_types():
    """Round ties to even; of two numbers, the first operand is the upper."""
    values, two = floats(1 + 2**-8, 1 + 3 * 2**-8, np.nan, 3.3e38), np.full(32, 2, np.float32)
    assert (binary("cvt.rn.bf16x2.f32", values, two)[:4] == [0x3F804000, 0x3F824000, 0x7FFF4000, 0x7F784000]).all()
    assert (binary("cvt.rz.bf16x2.f32", values, two)[:2] == [0x3F804000, 0x3F814000]).all()
    assert (
        binary("cvt.rn.f16x2.f32", floats(1 + 2**-11, 65520, 65519), two)[:3] >> 16 == [0x3C00, 0x7C00, 0x7BFF]
    ).all()


def test_float8():
    values = floats(448, 1000, -0.0625, 17, 19, 2.0**-10, 3 * 2.0**-10, np.nan)
    body = """ld.global.b32 %r1, [%d4]; cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, %r1; cvt.rn.f16x2.e4m3x2 %r2, %h1;
    mov.b32 {%h2, %h3}, %r2; cvt.f32.f16 %r3, %h3; st.global.b32 [%d6], %r3;"""
    found = run(body, values.view(np.uint32)).view(np.float32)
    assert (found[:7] == [448, 448, -0.0625, 16, 20, 0, 2.0**-8]).all() and np.isnan(found[7])


@pytest.mark.parametrize("kind, digits", [("bf16", 8), ("f16", 11)])
def test_fused_products_of_half_types_are_rounded_once(kind, digits):
    """Square 1 + u, with u the last place, less 1 + 2 u: it is u squared, or 0 if the product was rounded."""
    last = 2.0 ** (1 - digits)
    body = f"""ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5];
    cvt.rn.{kind}.f32 %h1, %r1; cvt.rn.{kind}.f32 %h2, %r2;
    fma.rn.{kind} %h3, %h1, %h1, %h2; cvt.f32.{kind} %r3, %h3; st.global.b32 [%d6], %r3;"""
    a, b = (np.full(32, x, np.float32) for x in (1 + last, -1 - 2 * last))
    assert (run(body, a.view(np.uint32), b.view(np.uint32)).view(np.float32) == last**2).all()
