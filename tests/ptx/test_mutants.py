"""Planted faults: which are made, that a program with one is another, and that the first stays as it is."""

from collections import Counter

import pytest

from tests.ptx.machine import Program
from tests.ptx.mutants import mutants, summary

TEXT = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 a)
.reqntid 32
{
.reg .pred %p<3>; .reg .b32 %r<5>; .reg .b64 %d<3>;
ld.param.u64 %d0, [a]; mov.u32 %r0, %tid.x; setp.lt.s32 %p1, %r0, 7; @%p1 bra L;
sub.s32 %r1, %r0, %r2; ld.global.v2.b32 {%r1, %r2}, [%d0+8]; bar.sync 0; cp.async.wait_group 1;
atom.global.acq_rel.gpu.add.u32 %r1, [%d0], 1; bar.warp.sync -1;
L: setp.lt.f32 %p1, %r0, %r1;
ret;
}
"""


@pytest.fixture
def made():
    return list(mutants(Program.of(TEXT)))


def test_kinds(made):
    assert Counter(mutant.what for mutant in made) == {
        "comparison": 1, "operands swapped": 1, "offset shifted": 1, "barrier removed": 2, "wait weakened": 1,
        "order relaxed": 1,
    }  # fmt: skip


def text(program):
    return [str(i) for i in program.kernel.instructions()]


def test_each_changes_one_instruction(made):
    before = text(Program.of(TEXT))
    for mutant in made:
        after = text(mutant.build())
        if mutant.changed is None:
            assert [*after, str(mutant.instruction)] != before and sorted([*after, str(mutant.instruction)]) == sorted(
                before
            )
        else:
            assert [(x, y) for x, y in zip(before, after, strict=True) if x != y] == [
                (str(mutant.instruction), str(mutant.changed))
            ]
    assert text(Program.of(TEXT)) == before


def test_what_is_moved(made):
    shifted, weakened = (next(m for m in made if m.what == what) for what in ("offset shifted", "wait weakened"))
    assert shifted.changed.args[1] == ("address", "%d0", 16) and weakened.changed.args == ["2"]


def test_a_place_counts_as_seen_with_one_of_its_faults():
    found = [("1 2 3", None), ("1 2 3", "a test"), ("1 9 9", None)]
    rows = [dict(fault=["k", "p", 1, "comparison"], where=where, seen=seen) for where, seen in found]
    assert summary(rows) == ["ptx: k: comparison: 1 of 3 seen, in 1 of 2 places"]
