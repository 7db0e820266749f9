"""Launches whose CTAs are all there at once, a barrier of the grid, and reads of what nobody may write."""

import numpy as np
import pytest

from tests.ptx.assembled import run
from tests.ptx.regions import Fault

CTAS = 4
# Each CTA writes a word, all wait for all, and each reads the next one's.
WAIT = """bar.sync 0; @%p1 bra ARRIVE; bra MET;
ARRIVE: atom.add.{order}.gpu.global.u32 %r5, [%d1], 1;
LOOK: ld.{seen}.gpu.global.u32 %r6, [%d1]; setp.lt.u32 %p2, %r6, 4; {again}
MET: bar.sync 0;"""
NEIGHBOUR = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r0, 0; mul.wide.u32 %d7, %r1, 4; add.s64 %d8, %d0, %d7;
add.u32 %r2, %r1, 100; @%p1 st.global.b32 [%d8], %r2; {wait}
add.u32 %r3, %r1, 1; and.b32 %r3, %r3, 3; mul.wide.u32 %d9, %r3, 4; add.s64 %d9, %d0, %d9;
ld.global{how}.b32 %r4, [%d9]; add.s64 %d10, %d2, %d7; @%p1 st.global.b32 [%d10], %r4;"""
AGAIN = "@%p2 bra LOOK;"


def exchanged(seed, order="acq_rel", seen="acquire", again=AGAIN, how=""):
    body = NEIGHBOUR.format(wait=WAIT.format(order=order, seen=seen, again=again), how=how)
    words = np.zeros(CTAS, np.uint32)
    return run(body, words, np.zeros(1, np.uint32), words.copy(), threads=64, grid=CTAS, cooperative=True, seed=seed)


@pytest.mark.parametrize("seed", range(20))
def test_all_wait_for_all(seed):
    assert exchanged(seed).tolist() == [101, 102, 103, 100]


@pytest.mark.parametrize(
    "weaker", [{"again": ""}, {"order": "relaxed"}, {"seen": "relaxed"}], ids=["looks once", "arrives", "looks"]
)
def test_a_wait_that_does_not_hold_is_seen(weaker):
    def is_seen(seed):
        try:
            return exchanged(seed, **weaker).tolist() != [101, 102, 103, 100]
        except Fault:
            return True

    assert any(map(is_seen, range(3)))


def test_a_wait_without_end_is_a_deadlock():
    with pytest.raises(Fault, match="deadlock"):
        run(
            "LOOK: ld.acquire.gpu.global.u32 %r6, [%d1]; setp.eq.u32 %p2, %r6, 0; @%p2 bra LOOK;",
            threads=32, grid=2, cooperative=True,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_written_memory_may_not_be_read_as_constant(seed):
    with pytest.raises(Fault, match="non-coherent"):
        exchanged(seed, how=".nc")


def test_memory_read_as_constant_may_not_be_written():
    with pytest.raises(Fault, match="was read non-coherently"):
        run("ld.global.nc.b32 %r1, [%d6]; st.global.b32 [%d6], %r1;")


def test_constants_beside_what_is_written():
    a = np.arange(32, dtype=np.uint32)
    assert (run("ld.global.nc.b32 %r1, [%d4]; st.global.b32 [%d6], %r1;", a) == a).all()
