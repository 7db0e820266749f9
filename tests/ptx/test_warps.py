"""Joint operations of threads: exchange, matrices, barriers, branches; and detection of a missing barrier."""

import numpy as np
import pytest

from tests.ptx.assembled import run
from tests.ptx.regions import Fault

RNG = np.random.default_rng(2)


@pytest.mark.parametrize(
    "mode, b, c, expected",
    [
        ("bfly", 1, 31, lambda i: i ^ 1),
        ("up", 2, 0, lambda i: i - 2 if i >= 2 else i),
        ("down", 3, 31, lambda i: i + 3 if i < 29 else i),
        ("idx", 5, 31, lambda i: 5),
        ("up", 1, 0x1800, lambda i: i - 1 if i % 8 else i),
        ("idx", 3, 0x181F, lambda i: i // 8 * 8 + 3),
    ],
)
def test_shuffles(mode, b, c, expected):
    body = f"and.b32 %r1, %r0, 31; shfl.sync.{mode}.b32 %r2, %r1, {b}, {c}, -1; st.global.b32 [%d6], %r2;"
    assert (run(body, threads=64) == [expected(i % 32) for i in range(64)]).all()


def test_votes_and_reductions():
    body = """setp.lt.u32 %p1, %r0, 40; vote.sync.ballot.b32 %r1, %p1, -1; vote.sync.any.pred %p2, %p1, -1;
    vote.sync.all.pred %p3, %p1, -1; selp.b32 %r2, 256, 0, %p2; selp.b32 %r3, 512, 0, %p3; and.b32 %r4, %r0, 31;
    redux.sync.max.u32 %r5, %r4, -1; xor.b32 %r1, %r1, %r2; xor.b32 %r1, %r1, %r3; xor.b32 %r1, %r1, %r5;
    st.global.b32 [%d6], %r1;"""
    assert (run(body, threads=96)[::32] == [0xFFFFFFFF ^ 256 ^ 512 ^ 31, 0xFF ^ 256 ^ 31, 31]).all()


TWO_PARTS = """setp.lt.u32 %p1, %r0, 16; selp.b32 %r9, 0xFFFF, 0xFFFF0000, %p1; rem.u32 %r1, %r0, 3;
setp.eq.u32 %p2, %r1, 0; or.pred %p3, %p1, %p2; {}"""


def test_votes_of_parts_of_a_warp():
    """Let a lane outside of the member mask count as none ("vote.sync")."""
    ballot = run(TWO_PARTS.format("vote.sync.ballot.b32 %r2, %p2, %r9; st.global.b32 [%d6], %r2;"))
    every = sum(1 << i for i in range(0, 32, 3))
    assert (ballot == [every & 0xFFFF] * 16 + [every & 0xFFFF0000] * 16).all()
    body = "vote.sync.all.pred %p4, %p3, %r9; vote.sync.any.pred %p5, %p1, %r9; selp.b32 %r2, 1, 0, %p4;"
    body += "selp.b32 %r3, 2, 0, %p5; or.b32 %r2, %r2, %r3; st.global.b32 [%d6], %r2;"
    assert (run(TWO_PARTS.format(body)) == [3] * 16 + [0] * 16).all()


def test_lanes_that_have_exited_are_not_waited_for():
    body = """setp.ge.u32 %p1, %r0, 20; @%p1 ret; setp.lt.u32 %p2, %r0, 20; vote.sync.all.pred %p3, %p2, -1;
    selp.b32 %r1, 1, 0, %p3; xor.b32 %r2, %r0, 1; shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; add.s32 %r1, %r1, %r3;
    st.global.b32 [%d6], %r1;"""
    assert (run(body) == [i + 1 if i < 20 else 0 for i in range(32)]).all()


@pytest.mark.parametrize(
    "body", ["mov.b32 %r9, 0xFFFF;", "setp.lt.u32 %p1, %r0, 16; selp.b32 %r9, 0xFFFF, -1, %p1;"], ids=["left", "mixed"]
)
def test_a_lane_that_its_member_mask_leaves_out(body):
    with pytest.raises(Fault, match="member mask"):
        run(body + "setp.eq.u32 %p2, %r0, 0; vote.sync.any.pred %p3, %p2, %r9;")


@pytest.mark.parametrize("what", ["bar.warp.sync 0xFFFF;", "redux.sync.add.s32 %r2, %r0, 0xFFFF;"])
def test_a_barrier_or_sum_of_part_of_a_warp_is_not_modelled(what):
    with pytest.raises(NotImplementedError, match="part of a warp"):
        run(f"setp.ge.u32 %p1, %r0, 16; @%p1 bra L; {what}\nL: st.global.b32 [%d6], %r0;")


def test_a_sum_leaves_out_no_lane_that_has_exited():
    with pytest.raises(NotImplementedError, match="part of a warp"):
        run("setp.ge.u32 %p1, %r0, 20; @%p1 ret; redux.sync.add.s32 %r2, %r0, -1; st.global.b32 [%d6], %r2;")


def half(kind, x):
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def fragments(kind, a, b):
    """Return A and B as the manual's tables lay them in registers, a row a lane."""
    k, regs_a, regs_b = a.shape[1], [], []
    if kind == "tf32":
        a, b = (x.astype(np.float32).view(np.uint32) | 0x1FFF for x in (a, b))  # digits that TF32 ignores
    else:
        a, b = half(kind, a), half(kind, b)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        if kind == "tf32":
            regs_a.append([a[g + 8 * (i % 2), t + 4 * (i // 2)] for i in range(k // 2)])
            regs_b.append([b[t + 4 * i, g] for i in range(k // 4)])
        else:
            places = [(g + 8 * (i % 2), 2 * t + 8 * (i // 2)) for i in range(k // 4)]
            regs_a.append([int(a[r, c]) | int(a[r, c + 1]) << 16 for r, c in places])
            regs_b.append([int(b[2 * t + 8 * i, g]) | int(b[2 * t + 8 * i + 1, g]) << 16 for i in range(k // 8)])
    return np.array(regs_a, np.uint32), np.array(regs_b, np.uint32)


def names(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def product(kind, k, a, b, start="0f3F800000", **options):
    regs_a, regs_b = fragments(kind, a, b)
    na, nb = regs_a.shape[1], regs_b.shape[1]
    loads = [f"ld.global.b32 %r{10 + i}, [%d7+{4 * i}];" for i in range(na)]
    loads += [f"ld.global.b32 %r{20 + i}, [%d8+{4 * i}];" for i in range(nb)]
    body = f"""mul.wide.u32 %d3, %r0, {4 * na}; add.s64 %d7, %d0, %d3; mul.wide.u32 %d3, %r0, {4 * nb};
    add.s64 %d8, %d1, %d3; {"".join(loads)} mov.b32 %r30, {start}; mov.b32 %r31, %r30; mov.b32 %r32, %r30;
    mov.b32 %r33, %r30; mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {names(30, 4)}, {names(10, na)},
    {names(20, nb)}, {names(30, 4)};
    mul.wide.u32 %d3, %r0, 16; add.s64 %d6, %d2, %d3; st.global.v4.b32 [%d6], {names(30, 4)};"""
    found = run(body, regs_a.ravel(), regs_b.ravel(), np.zeros(128, np.uint32), **options).view(np.float32)
    result = np.zeros((16, 8), np.float32)
    for lane, row in enumerate(found.reshape(32, 4)):
        g, t = lane // 4, lane % 4
        result[g, 2 * t : 2 * t + 2], result[g + 8, 2 * t : 2 * t + 2] = row[:2], row[2:]
    return result


@pytest.mark.parametrize("kind, k", [("bf16", 16), ("f16", 16), ("bf16", 8), ("f16", 8), ("tf32", 8), ("tf32", 4)])
def test_mma(kind, k):
    """Use whole numbers, so that every type is exact."""
    a, b = RNG.integers(-8, 8, (16, k)), RNG.integers(-8, 8, (k, 8))
    assert (product(kind, k, a, b) == a @ b + 1).all()


@pytest.mark.parametrize("kind, k", [("s8", 32), ("u8", 32), ("s8", 16)])
def test_mma_of_whole_numbers(kind, k):
    """Lay four numbers in a register, as "Matrix Fragments for mma.m16n8k32" does."""
    low = -128 if kind == "s8" else 0
    a, b = RNG.integers(low, low + 256, (16, k)), RNG.integers(low, low + 256, (k, 8))
    lanes = [(lane // 4, 4 * (lane % 4)) for lane in range(32)]

    def word(numbers):
        return int.from_bytes(bytes(int(x) % 256 for x in numbers), "little")

    rows = [(i % 2 * 8, i // 2 * 16) for i in range(k // 8)]
    regs_a = np.array([[word(a[g + r, c + t : c + t + 4]) for r, c in rows] for g, t in lanes], np.uint32)
    regs_b = np.array([[word(b[c + t : c + t + 4, g]) for c in range(0, k, 16)] for g, t in lanes], np.uint32)
    na, nb = regs_a.shape[1], regs_b.shape[1]
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%d7+{4 * i}];" for i in range(na))
    loads += "".join(f"ld.global.b32 %r{20 + i}, [%d8+{4 * i}];" for i in range(nb))
    body = f"""mul.wide.u32 %d3, %r0, {4 * na}; add.s64 %d7, %d0, %d3; mul.wide.u32 %d3, %r0, {4 * nb};
    add.s64 %d8, %d1, %d3; {loads} {"".join(f"mov.b32 %r{30 + i}, -5;" for i in range(4))}
    mma.sync.aligned.m16n8k{k}.row.col.s32.{kind}.{kind}.s32 {names(30, 4)}, {names(10, na)}, {names(20, nb)},
    {names(30, 4)}; mul.wide.u32 %d3, %r0, 16; add.s64 %d6, %d2, %d3; st.global.v4.b32 [%d6], {names(30, 4)};"""
    found = run(body, regs_a.ravel(), regs_b.ravel(), np.zeros(128, np.uint32)).view(np.int32).reshape(32, 4)
    expected = a @ b - 5
    for lane, row in enumerate(found):
        g, t = lane // 4, 2 * (lane % 4)
        assert row.tolist() == [*expected[g, t : t + 2], *expected[g + 8, t : t + 2]]


def test_a_matrix_sum_is_rounded_once_or_toward_zero():
    """Sum 2 and three quarters of a unit in the last place."""
    a, b = np.zeros((16, 8)), np.zeros((8, 8))
    a[0, :2], b[:2, 0] = [1, 2.0**-12], [2, 0.75 * 2.0**-10]
    assert product("bf16", 8, a, b, "0f00000000")[0, 0] == 2 + 2.0**-22
    assert product("bf16", 8, a, b, "0f00000000", rounding="truncate")[0, 0] == 2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(transposed, count):
    """Expect element (row, column) of matrix m to be 64 m + 8 row + column."""
    body = f"""shl.b32 %r1, %r0, 4; mov.u32 %r5, memory; add.s32 %r1, %r1, %r5; shl.b32 %r2, %r0, 3;
    mul.lo.u32 %r2, %r2, 65537; add.s32 %r10, %r2, 0x10000; add.s32 %r11, %r2, 0x30002; add.s32 %r12, %r2, 0x50004;
    add.s32 %r13, %r2, 0x70006; st.shared.v4.b32 [%r1], {names(10, 4)}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16 {names(20, count)}, [%r1];
    mul.wide.u32 %d3, %r0, 16; add.s64 %d6, %d2, %d3; st.global.v4.b32 [%d6], {names(20, 4)};"""
    out = run(body, out=np.zeros(128, np.uint32), shared=512)
    for lane in range(32):
        for m in range(count):
            row, column = lane // 4, 2 * (lane % 4)
            first = 64 * m + (column * 8 + row if transposed else row * 8 + column)
            assert out[4 * lane + m] == first | first + (8 if transposed else 1) << 16


# --- barriers ---------------------------------------------------------------------------------------------------------

EXCHANGE = """mov.u32 %r5, memory; shl.b32 %r1, %r0, 2; add.s32 %r1, %r1, %r5; xor.b32 %r2, %r0, {other};
shl.b32 %r2, %r2, 2; add.s32 %r2, %r2, %r5; st.shared.b32 [%r1], %r0; {barrier} ld.shared.b32 %r3, [%r2];
st.global.b32 [%d6], %r3;"""


def exchange(other, barrier, **options):
    """Let each thread write a word, and read that of another."""
    return run(EXCHANGE.format(other=other, barrier=barrier), threads=64, shared=256, **options)


def test_barriers_order_what_they_should():
    assert (exchange(32, "bar.sync 0;") == np.arange(64) ^ 32).all()
    assert (exchange(1, "bar.warp.sync -1;") == np.arange(64) ^ 1).all()
    assert (exchange(1, "bar.sync 0;", random_warps=True) == np.arange(64) ^ 1).all()
    assert (exchange(1, "", warp_races=False) == np.arange(64) ^ 1).all()


@pytest.mark.parametrize("other, barrier", [(32, ""), (1, ""), (32, "bar.warp.sync -1;")])
def test_a_missing_barrier_is_seen(other, barrier):
    with pytest.raises(Fault, match="no barrier between"):
        exchange(other, barrier)


def test_a_random_order_of_warps_shows_it_without_notes():
    with pytest.raises(Fault, match="nobody has written"):
        for seed in range(8):
            exchange(32, "", races=False, random_warps=True, seed=seed)


def test_a_write_after_a_read_is_seen():
    body = EXCHANGE.format(other=32, barrier="bar.sync 0;") + "{} st.shared.b32 [%r1], %r3;"
    run(body.format("bar.sync 0;"), threads=64, shared=256)
    with pytest.raises(Fault, match="write to what warp"):
        run(body.format(""), threads=64, shared=256)


def test_a_barrier_that_some_never_reach():
    with pytest.raises(Fault, match=r"divergence|barrier|deadlock"):
        run(
            "setp.lt.u32 %p1, %r0, 7; @%p1 bra L; bar.sync 0;\nL: bar.sync 0; st.global.b32 [%d6], %r0;\n bar.sync 0;",
            threads=64,
        )
    with pytest.raises(Fault, match="exited"):
        run("setp.lt.u32 %p1, %r0, 32; @%p1 bra L; bar.sync 0;\nL: st.global.b32 [%d6], %r0;", threads=64)


def test_a_barrier_with_a_guard():
    """Let a warp whose guard is false pass by; the others wait for it."""
    body = "setp.lt.u32 %p1, %r0, 32; {} st.global.b32 [%d6], %r0;"
    assert (run(body.format("@%p1 bar.sync 0; @!%p1 bar.sync 0;"), threads=64) == np.arange(64)).all()
    with pytest.raises(Fault, match="exited"):
        run(body.format("@%p1 bar.sync 0;"), threads=64)
    with pytest.raises(Fault, match="part of a warp"):
        run(body.replace("%r0, 32", "%r0, 7").format("@%p1 bar.sync 0;"), threads=64)


def test_a_trap_with_a_guard():
    body = "setp.ge.u32 %p1, %r0, {}; @%p1 trap; st.global.b32 [%d6], %r0;"
    assert (run(body.format(32)) == np.arange(32)).all()
    with pytest.raises(Fault, match=r"trap.*thread 30 and 1 others"):
        run(body.format(30))


def test_a_shuffle_that_some_never_reach():
    body = "setp.lt.u32 %p1, %r0, 7; @%p1 bra L; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\nL: st.global.b32 [%d6], %r0;"
    with pytest.raises(Fault, match="divergence"):
        run(body)


def test_branches_and_loops():
    body = """mov.b32 %r1, 0; mov.b32 %r2, 0;
LOOP: setp.ge.u32 %p1, %r1, %r0; @%p1 bra DONE;
and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra EVEN;
add.s32 %r2, %r2, 100; bra.uni NEXT;
EVEN: add.s32 %r2, %r2, 1;
NEXT: add.s32 %r1, %r1, 1; bra.uni LOOP;
DONE: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; st.global.b32 [%d6], %r4;"""
    value = [(i + 1) // 2 + i // 2 * 100 for i in range(64)]
    assert (run(body, threads=64) == [value[i ^ 1] for i in range(64)]).all()


def test_an_instruction_that_is_not_modelled_is_named():
    with pytest.raises(NotImplementedError, match=r"line 13: sad\.s32"):
        run("sad.s32 %r1, %r0, %r0, %r0;")
