"""Memory: access outside, of unwritten bytes, before arrival, or without order is a fault."""

import numpy as np
import pytest

from tests.ptx import machine
from tests.ptx.assembled import run
from tests.ptx.regions import Fault


@pytest.mark.parametrize(
    "body, what",
    [
        ("ld.global.b32 %r1, [%d4+4];", "read out of bounds: 4 bytes at 128 of 128 bytes of a"),
        ("ld.global.b32 %r1, [%d4+-4];", "out of bounds"),
        ("st.global.b32 [%d6+4], %r0;", "write out of bounds: 4 bytes at 128 of 128 bytes of out"),
        ("ld.global.v2.b32 {%r1, %r2}, [%d4];", "misaligned"),
        ("mov.b64 %d7, 0; ld.global.b32 %r1, [%d7];", "null"),
        ("st.global.b32 [%d2], %r0;", "different values to one place"),
        ("ld.shared.b32 %r1, [%r0];", "misaligned"),
        ("mov.b32 %r1, 0; ld.shared.b32 %r2, [%r1];", "nobody has written"),
        ("mov.b32 %r1, 64; st.shared.b32 [%r1], %r1;", "shared memory out of bounds"),
        ("mov.b32 %r1, 0; st.shared.b32 [%r1], %r0;", "different values to one place"),
    ],
)
def test_faults(body, what):
    with pytest.raises(Fault, match=what):
        run(body, shared=64)


def test_a_thread_that_is_switched_off_does_no_harm():
    run("setp.lt.u32 %p1, %r0, 31; @%p1 ld.global.b32 %r1, [%d4+4];")


def test_words_of_many_widths():
    a = np.arange(64, dtype=np.uint32) * 0x01030507
    body = """mul.wide.u32 %d7, %r0, 8; add.s64 %d7, %d0, %d7; ld.global.v2.b32 {%r1, %r2}, [%d7];
    ld.global.u8 %r3, [%d7+1]; ld.global.s16 %r4, [%d7+6]; xor.b32 %r1, %r1, %r2; xor.b32 %r1, %r1, %r3;
    xor.b32 %r1, %r1, %r4; st.global.b32 [%d6], %r1;"""
    first, second = a[::2], a[1::2]
    signed = (second >> 16).astype(np.uint16).view(np.int16).astype(np.int32).view(np.uint32)
    assert (run(body, a) == first ^ second ^ (first >> 8 & 255) ^ signed).all()


NEIGHBOUR = """add.s32 %r1, %r0, 7; st.global.b32 [%d6], %r1; {} xor.b32 %r3, %r0, 1; mul.wide.u32 %d7, %r3, 4;
add.s64 %d7, %d2, %d7; ld.global.b32 %r2, [%d7]; {} st.global.b32 [%d6], %r2;"""


def test_another_threads_write_is_read_after_a_barrier():
    assert (run(NEIGHBOUR.format("bar.sync 0;", "bar.sync 0;")) == (np.arange(32) ^ 1) + 7).all()
    with pytest.raises(Fault, match="nothing orders"):
        run(NEIGHBOUR.format("", "bar.sync 0;"))


# --- atomics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op, value, expected",
    [
        ("add.u32", "%r0", 5 + 496),
        ("max.u32", "%r0", 31),
        ("min.u32", "%r0", 0),
        ("or.b32", "%r0", 31),
        ("inc.u32", "6", 2),
    ],
)
def test_atomics(op, value, expected):
    """Count by inc 5, 6, 0, 1 and so on: 32 steps from 5 within 0 to 6."""
    a = np.full(32, 5, np.uint32)
    run(f"atom.global.{op} %r1, [%d0], {value};", a)
    assert a[0] == expected


def test_a_lock_has_one_owner():
    out = run("atom.global.cas.b32 %r1, [%d0], 0, 1; st.global.b32 [%d6], %r1;", np.zeros(32, np.uint32))
    assert sorted(out) == [0] + [1] * 31


SPLIT = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r0, 0; mul.wide.u32 %d7, %r1, 256; add.s64 %d7, %d0, %d7;
add.s64 %d7, %d7, %d3; add.s32 %r2, %r0, %r1; st.global.b32 [%d7], %r2; {before}
mov.b32 %r9, 0; @%p1 atom.global.gpu.{order}.add.u32 %r9, [%d1], 1; {after}
mov.u32 %r5, memory; @%p1 st.shared.b32 [%r5], %r9;
bar.sync 0; ld.shared.b32 %r9, [%r5]; setp.ne.u32 %p2, %r9, 3; @%p2 bra END;
xor.b32 %r3, %r0, 32; mul.wide.u32 %d8, %r3, 4; add.s64 %d8, %d0, %d8; ld.global.b32 %r10, [%d8];
ld.global.b32 %r11, [%d8+256]; add.s32 %r10, %r10, %r11; ld.global.b32 %r11, [%d8+512]; add.s32 %r10, %r10, %r11;
ld.global.b32 %r11, [%d8+768]; add.s32 %r10, %r10, %r11; st.global.b32 [%d6], %r10;
END: """


def last_arrives(before, order, after="", **options):
    """Let four CTAs write; the last that counts itself adds up what all wrote."""
    words, count = np.zeros(256, np.uint32), np.zeros(1, np.uint32)
    body = SPLIT.format(before=before, order=order, after=after)
    return run(body, words, count, threads=64, grid=4, shared=16, **options)


@pytest.mark.parametrize("lanes", [4096, 64])
def test_the_last_cta_to_arrive_sees_what_the_others_wrote(lanes):
    """Run all at once, and one behind the other."""
    assert (last_arrives("bar.sync 0;", "acq_rel", lanes=lanes) == 4 * (np.arange(64) ^ 32) + 6).all()


@pytest.mark.parametrize(
    "before, order",
    [("", "acq_rel"), ("bar.sync 0;", "relaxed"), ("bar.sync 0;", "release"), ("bar.sync 0;", "acquire")],
)
def test_a_weaker_order_between_ctas_is_seen(before, order):
    with pytest.raises(Fault, match="nothing orders"):
        last_arrives(before, order)


@pytest.mark.parametrize("fence", ["membar.gl;", "fence.acq_rel.gpu;", "fence.sc.sys;"])
def test_fences_make_a_relaxed_count_do(fence):
    """Order by a fence before the count and one behind it ("Memory Consistency Model", release patterns)."""
    assert (last_arrives(f"bar.sync 0; {fence}", "relaxed", fence) == 4 * (np.arange(64) ^ 32) + 6).all()


@pytest.mark.parametrize(
    "before, after",
    [
        ("bar.sync 0; membar.gl;", ""),
        ("bar.sync 0;", "membar.gl;"),
        ("membar.gl; bar.sync 0;", "membar.gl;"),  # of what this thread alone had seen
        ("bar.sync 0; membar.cta;", "membar.gl;"),
        ("bar.sync 0; fence.proxy.async.shared::cta;", "fence.proxy.async.shared::cta;"),
    ],
)
def test_a_fence_that_is_missing_or_another_one_is_seen(before, after):
    with pytest.raises(Fault, match="nothing orders"):
        last_arrives(before, "relaxed", after)


@pytest.mark.parametrize("at, what", [(20, "at 20 of 24"), (24, "at 24 of 24"), (-8, "at -8 of 24"), (4, "at 4 of 24")])
def test_parameters_at_an_address_outside_of_them(at, what):
    with pytest.raises(Fault, match=what):
        run(f"mov.b64 %d7, a; mul.wide.u32 %d8, %r0, 0; add.s64 %d7, %d7, %d8; ld.param.u64 %d9, [%d7+{at}];")


# --- asynchronous copies ----------------------------------------------------------------------------------------------

COPY = """mov.u32 %r5, memory; shl.b32 %r1, %r0, 2; add.s32 %r1, %r1, %r5; xor.b32 %r2, %r1, 128;
cp.async.ca.shared.global [%r1+0], [%d4+0], 0x4; cp.async.commit_group;
cp.async.ca.shared.global [%r1+256], [%d4+0], 0x4; cp.async.commit_group;
cp.async.wait_group {left}; {barrier} ld.shared.b32 %r3, [%r2+{second}]; st.global.b32 [%d6], %r3;"""


def copied(left, barrier, second):
    return run(
        COPY.format(left=left, barrier=barrier, second=second),
        np.arange(5, 69, dtype=np.uint32),
        threads=64,
        shared=512,
    )


def test_copies_arrive_with_their_group():
    expected = (np.arange(64) ^ 32) + 5
    assert (copied(1, "bar.sync 0;", 0) == expected).all()
    assert (copied(0, "bar.sync 0;", 256) == expected).all()


def test_a_copy_is_read_no_earlier():
    with pytest.raises(Fault, match="has yet to bring"):
        copied(1, "bar.sync 0;", 256)
    with pytest.raises(Fault, match="no barrier between"):
        copied(0, "", 256)


def test_nobody_writes_where_a_copy_is_on_its_way():
    body = """mov.u32 %r5, memory; shl.b32 %r1, %r0, 2; add.s32 %r1, %r1, %r5;
    cp.async.ca.shared.global [%r1], [%d4], 4; cp.async.commit_group; {} st.shared.b32 [%r1], %r0;"""
    run(body.format("cp.async.wait_group 0;"), shared=128)
    with pytest.raises(Fault, match="on its way"):
        run(body.format(""), shared=128)


def test_a_copy_of_no_bytes_brings_zeros_and_reads_nothing():
    body = """mov.u32 %r5, memory; shl.b32 %r1, %r0, 2; add.s32 %r1, %r1, %r5; setp.lt.u32 %p1, %r0, 31;
    selp.b32 %r2, 4, 0, %p1; cp.async.ca.shared.global [%r1], [%d4+4], 4, %r2; cp.async.wait_all;
    ld.shared.b32 %r3, [%r1]; st.global.b32 [%d6], %r3;"""
    assert (run(body, np.arange(32, dtype=np.uint32), shared=128) == [*range(1, 32), 0]).all()


POLL = """mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; mul.wide.u32 %d7, %r1, 128; add.s64 %d7, %d0, %d7;
add.s64 %d7, %d7, %d3; @%p1 bra WRITE;
LOOK: atom.global.gpu.acquire.add.u32 %r9, [%d1], 0; bar.warp.sync -1; setp.lt.u32 %p2, %r9, {}; @%p2 bra LOOK;
ld.global.b32 %r3, [%d7+128]; ld.global.b32 %r4, [%d7+256]; add.s32 %r3, %r3, %r4; st.global.b32 [%d6], %r3; bra END;
WRITE: add.s32 %r2, %r0, %r1; st.global.b32 [%d7], %r2; bar.sync 0; setp.eq.u32 %p3, %r0, 0;
@%p3 atom.global.gpu.release.add.u32 %r9, [%d1], 1;
END: """


def poll(wanted, **options):
    """Let the first of three CTAs wait until so many others have counted themselves."""
    return run(POLL.format(wanted), np.zeros(96, np.uint32), np.zeros(1, np.uint32), grid=3, **options)


@pytest.mark.parametrize("lanes", [4096, 32])
@pytest.mark.parametrize("seed", range(4))
def test_a_cta_that_polls_lets_others_go_on(lanes, seed):
    assert (poll(2, lanes=lanes, seed=seed) == 2 * np.arange(32) + 3).all()


def test_a_read_that_comes_too_early_is_found():
    with pytest.raises(Fault, match="nothing orders"):
        for seed in range(8):
            poll(1, lanes=32, seed=seed)


@pytest.mark.parametrize("lanes", [4096, 32])
def test_polling_for_what_nobody_writes_is_a_deadlock(monkeypatch, lanes):
    monkeypatch.setattr(machine, "_PATIENCE", 50)
    with pytest.raises(Fault, match="deadlock"):
        poll(3, lanes=lanes)


COPIES = """mov.u32 %r5, memory; setp.eq.u32 %p1, %r0, {}; selp.b32 %r1, 0f3F800001, 0f3F800000, %p1;
st.shared.b32 [%r5], %r1; bar.sync 0; ld.shared.b32 %r2, [%r5]; st.global.b32 [%d6], %r2;"""


def test_of_copies_that_differ_in_the_last_bit_the_last_lane_s_stays_or_any():
    assert (run(COPIES.format(31), shared=16) == 0x3F800001).all() and (
        run(COPIES.format(30), shared=16) == 0x3F800000
    ).all()
    drawn = {int(run(COPIES.format(30), shared=16, random_copies=True, seed=seed)[0]) for seed in range(200)}
    assert drawn == {0x3F800000, 0x3F800001}
