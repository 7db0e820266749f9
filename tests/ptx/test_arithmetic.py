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


def field(x, position, length, width, signed):
    """Return the field as the page of "bfe" has it, a bit at a time."""
    position, length = position & 255, length & 255
    last = x >> min(position + length - 1, width - 1) & 1 if signed and length else 0
    inside = (i < length and position + i < width for i in range(width))
    return sum((x >> position + i & 1 if within else last) << i for i, within in enumerate(inside))


def inserted(x, into, position, length, width):
    """Return what the page of "bfi" has, a bit at a time."""
    position, length = position & 255, length & 255
    for i in range(min(length, max(width - position, 0))):
        into = into & ~(1 << position + i) | (x >> i & 1) << position + i
    return into


@pytest.mark.parametrize("position", [0, 5, 31, 32, 200, 261])
@pytest.mark.parametrize("length", [0, 1, 8, 32, 70, 255, 256 + 3])
def test_fields_at_the_ends_of_a_word(position, length):
    ends = f"{position}, {length}; st.global.b32 [%d6], %r3;"
    load = "ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5];"
    a, b = INTS.view(np.uint32), OTHER.view(np.uint32)
    for kind, signed in (("s32", True), ("u32", False)):
        expected = [field(int(x), position, length, 32, signed) for x in a]
        assert (run(f"{load} bfe.{kind} %r3, %r1, {ends}", a) == expected).all(), kind
    expected = [inserted(int(x), int(y), position, length, 32) for x, y in zip(a, b, strict=True)]
    assert (run(f"{load} bfi.b32 %r3, %r1, %r2, {ends}", a, b) == expected).all()


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


def test_of_zeros_the_negative_is_the_less():
    """Expect "+0.0 > -0.0" of min and max, in each type."""
    a, b = floats(0.0, -0.0, -0.0, 3), floats(-0.0, 0.0, -0.0, -0.0)
    assert np.signbit(binary("min.f32", a, b, np.float32)[:4]).tolist() == [True, True, True, True]
    assert np.signbit(binary("max.f32", a, b, np.float32)[:4]).tolist() == [False, False, True, False]
    halves = [np.full(32, word, np.uint32) for word in (0x80000000, 0x00008000)]
    for kind in ("f16x2", "bf16x2"):
        assert (binary(f"min.{kind}", *halves) == 0x80008000).all() and (binary(f"max.{kind}", *halves) == 0).all()


def test_magnitudes_with_the_product_of_signs():
    """Hold .xorsign.abs of min ("min"): a NaN stays one, and a number beside it is taken."""
    a, b = floats(-500, 500, -3, 3, np.nan, -2), floats(448, -448, 448, -448, -448, np.nan)
    found = binary("min.xorsign.abs.f32", a, b, np.float32)[:6]
    assert found[:4].tolist() == [-448, -448, -3, -3] and np.abs(found[4:]).tolist() == [448, 2]
    assert np.isnan(binary("min.NaN.xorsign.abs.f32", a, b, np.float32)[4:6]).all()


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


@pytest.mark.parametrize("kind, one, two", [("bf16x2", 0x3F80, 0x4000), ("f16x2", 0x3C00, 0x4000)])
def test_a_comparison_of_two_halves(kind, one, two):
    """Give the lower's result first ("Half Precision Comparison Instructions: setp"), each with the third operand."""
    nan = 0x7FFF
    a = [one | two << 16, two | one << 16, one | one << 16, nan | one << 16]
    for name, combined, expected in (
        ("lt", "", [1, 2, 3, 2]), ("ge", "", [2, 1, 0, 0]), ("geu", "", [2, 1, 0, 1]), ("ne", "", [1, 2, 3, 2]),
        ("lt", ".and", [0, 0, 3, 2]),
    ):  # fmt: skip
        body = f"""ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5]; setp.lt.u32 %p3, 1, %r0;
        setp.{name}{combined}.{kind} %p1|%p2, %r1, %r2{", %p3" if combined else ""};
        selp.b32 %r3, 1, 0, %p1; selp.b32 %r4, 2, 0, %p2; or.b32 %r3, %r3, %r4; st.global.b32 [%d6], %r3;"""
        word = np.full(32, two | two << 16, np.uint32)
        found = run(body, np.array(a * 8, np.uint32), word)[:4]
        assert found.tolist() == expected, (name, combined)


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


@pytest.mark.parametrize(
    "kind, source, expected",
    [("s32", "f32", 0), ("u16", "f32", 0), ("s64", "f32", 2**63), ("u64", "f32", 2**63), ("s32", "f64", 2**31),
     ("u32", "f64", 2**31)],
)  # fmt: skip
def test_nan_to_whole_numbers(kind, source, expected):
    """Hold "cvt", "Integer Notes": 0, but the highest bit where 64 bits are read or written."""
    number = "%r1" if source == "f32" else "%d7"
    body = f"""mov.b32 %r1, 0f7FC00000; cvt.f64.f32 %d7, %r1; cvt.rzi.{kind}.{source} %d8, {number};
    mul.wide.u32 %d3, %r0, 8; add.s64 %d6, %d2, %d3; st.global.b64 [%d6], %d8;"""
    found = int(run(body, out=np.zeros(32, np.uint64))[0])
    assert found % 2 ** int(kind[1:]) == expected


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
    negative = np.full(32, 0xFFC00000, np.uint32)
    body = "ld.global.b32 %r1, [%d4]; cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, 0f3F800000; cvt.u32.u16 %r2, %h1;"
    assert (run(body + "st.global.b32 [%d6], %r2;", negative) == 0x7F38).all()


@pytest.mark.parametrize("kind, digits", [("bf16", 8), ("f16", 11)])
def test_fused_products_of_half_types_are_rounded_once(kind, digits):
    """Square 1 + u, with u the last place, less 1 + 2 u: it is u squared, or 0 if the product was rounded."""
    last = 2.0 ** (1 - digits)
    body = f"""ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5];
    cvt.rn.{kind}.f32 %h1, %r1; cvt.rn.{kind}.f32 %h2, %r2;
    fma.rn.{kind} %h3, %h1, %h1, %h2; cvt.f32.{kind} %r3, %h3; st.global.b32 [%d6], %r3;"""
    a, b = (np.full(32, x, np.float32) for x in (1 + last, -1 - 2 * last))
    assert (run(body, a.view(np.uint32), b.view(np.uint32)).view(np.float32) == last**2).all()


@pytest.mark.parametrize(
    "kind, a, b, c, expected",
    [
        ("f32", 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60, 1 + 2.0**-11 + 2.0**-23),
        ("f32", 1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-60), 1 + 2.0**-11),
        ("f32", 2.0**-75, 2.0**-75, 2.0**-149, 2.0**-148),
        ("f32", 1.5 * 2.0**-75, 2.0**-75, -(2.0**-149), -0.0),
        ("bf16", 1.5, 1 + 2.0**-7, 2.0**-90, 1.5 + 2.0**-6),
        ("bf16", 1.5, 1 + 2.0**-7, -(2.0**-90), 1.5 + 2.0**-7),
    ],
)
def test_a_product_in_the_middle_of_two_numbers_is_decided_by_the_least_of_the_sum(kind, a, b, c, expected):
    """Hold fma ("Floating Point Instructions: fma") to no loss of digits before its one rounding."""
    words = [np.full(32, x, np.float32).view(np.uint32) for x in (a, b)]
    least = int(np.float32(c).view(np.uint32))
    names = ("%r1", "%r2", "%r3") if kind == "f32" else ("%h1", "%h2", "%h3")
    convert = "" if kind == "f32" else "".join(f"cvt.rn.bf16.f32 %h{i}, %r{i};" for i in (1, 2, 3))
    back = "mov.b32 %r4, %r5;" if kind == "f32" else "cvt.f32.bf16 %r4, %h4;"
    body = f"""ld.global.b32 %r1, [%d4]; ld.global.b32 %r2, [%d5]; mov.b32 %r3, {least}; {convert}
    fma.rn.{kind} {"%r5" if kind == "f32" else "%h4"}, {", ".join(names)}; {back} st.global.b32 [%d6], %r4;"""
    assert run(body, *words).view(np.float32)[0] == np.float32(expected)


@pytest.mark.parametrize(
    "body, what",
    [
        ("add.rz.f32 %r1, %r0, %r0;", "rz"),
        ("add.sat.s32 %r1, %r0, %r0;", "saturation"),
        ("fma.rn.relu.bf16x2 %r1, %r0, %r0, %r0;", "relu"),
        ("cvt.rn.relu.bf16x2.f32 %r1, %r0, %r0;", "relu"),
        ("min.s16x2 %r1, %r0, %r0;", "s16x2"),
        ("mad.lo.cc.u32 %r1, %r0, %r0, %r0;", "cc"),
        ("ex2.approx.f16 %h1, %h2;", "a type"),
        ("ld.volatile.global.b32 %r1, [%d4];", "volatile"),
        ("ld.acquire.cta.global.b32 %r1, [%d4];", "cta"),
        ("atom.global.add.noftz.f16x2 %r1, [%d0], %r0;", "noftz"),
        ("setp.lt.u32 %p1, %r0, 3; cp.async.ca.shared.global [%r0], [%d4], 4, %p1;", "cp.async"),
        ("mov.u32 %r1, %clock;", "clock"),
        ("st.global.b128 [%d6], %d1;", "b128"),
    ],
)
def test_a_modifier_that_is_not_modelled_is_named(body, what):
    with pytest.raises(NotImplementedError, match=rf"line 13.*{what}"):
        run(body)
