"""Planted faults: their kinds, that a program with one differs, and that the first stays as it is."""

import json
from collections import Counter

import pytest

from tests.ptx import suites
from tests.ptx.machine import Program
from tests.ptx.mutants import mutants, reasons_of_survivors, survey

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


def test_mutants_that_move_an_offset_or_a_wait(made):
    shifted, weakened = (next(m for m in made if m.what == what) for what in ("offset shifted", "wait weakened"))
    assert shifted.changed.args[1] == ("address", "%d0", 16) and weakened.changed.args == ["2"]


def rows(*found):
    return [dict(fault=["k", "p", 1, "comparison"], where=where, text="setp", seen=seen) for where, seen in found]


def test_a_place_counts_as_seen_with_one_of_its_faults():
    found = survey({"norm": rows(("norm.py:2:3", None), ("norm.py:2:3", "a test"), ("norm.py:9:9", None))}, {})
    assert found == [
        dict(
            kernel="norm", kind="comparison", faults=3, seen=1, places=2, seen_places=1, equivalent={},
            open={"norm.py:9:9": "setp"},
        )
    ]  # fmt: skip


def test_a_survivor_with_a_reason_is_not_open():
    reasons = {("norm", "comparison", "norm.py:9:9"): "setp compares numbers that are never equal"}
    (found,) = survey({"norm": rows(("norm.py:9:9", None))}, reasons)
    assert found["open"] == {} and found["equivalent"] == {"norm.py:9:9": "setp compares numbers that are never equal"}


def test_each_reason_names_a_survivor():
    """Keep no reason of a fault that is seen by now."""
    surveyed = [json.loads(line) for line in suites.MUTATED.read_text().splitlines()]
    named = {(row["kernel"], row["kind"], where) for row in surveyed for where in row["equivalent"]}
    assert named == set(reasons_of_survivors())


def test_at_most_a_tenth_of_the_places_is_open():
    surveyed = [json.loads(line) for line in suites.MUTATED.read_text().splitlines()]
    assert 10 * sum(len(row["open"]) for row in surveyed) <= sum(row["places"] for row in surveyed)
