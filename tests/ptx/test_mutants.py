"""Planted faults: their kinds, that a program with one differs, and that the first stays as it is."""

import json
import random
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest

from tests.ptx import suites
from tests.ptx.machine import Program
from tests.ptx.mutants import counted, drawn, explained, latest, merged, mutants, reasons_of_survivors, survey

TEXT = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 a)
.reqntid 32
{
.reg .pred %p<3>; .reg .b32 %r<5>; .reg .b64 %d<3>;
ld.param.u64 %d0, [a]; mov.u32 %r0, %tid.x; setp.lt.s32 %p1, %r0, 7; @%p1 bra L;
sub.s32 %r1, %r0, %r2; ld.global.v2.b32 {%r1, %r2}, [%d0+8]; bar.sync 0; cp.async.wait_group 1; membar.gl;
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
        "order relaxed": 1, "fence removed": 1,
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


def raw(*found):
    return [dict(fault=["k", "p", 1, "comparison"], where=where, text="setp", seen=seen) for where, seen in found]


def test_a_place_counts_as_seen_with_one_of_its_faults():
    faults = raw(("norm.py:2:3", None), ("norm.py:2:3", "a test"), ("norm.py:9:9", None))
    assert survey({("norm", "sm_90", "1f"): (faults, {"comparison": 8})}) == [
        dict(
            kernel="norm", target="sm_90", source="1f", kind="comparison", of=8, faults=3, seen=1, places=2,
            seen_places=1, equivalent={}, open={"norm.py:9:9": "setp"},
        )
    ]  # fmt: skip


def test_a_place_counts_as_seen_with_the_tests_of_another_kernel():
    faults = {"mlp": raw(("linear.py:2:3", None)), "linear": raw(("linear.py:2:3", "a test"))}
    rows = survey({(name, "sm_90", "1f"): (mine, {}) for name, mine in faults.items()})
    assert [(row["kernel"], row["seen_places"], row["open"]) for row in rows] == [("linear", 1, {}), ("mlp", 1, {})]


def test_a_survivor_with_a_reason_is_not_open():
    reasons = {("norm", "comparison", "norm.py:9:9"): "setp compares numbers that are never equal"}
    rows = survey({("norm", "sm_90", "1f"): (raw(("norm.py:8:8", None), ("norm.py:9:9", None)), {})})
    (found,) = explained(rows, reasons)
    assert found["open"] == {"norm.py:8:8": "setp"}
    assert found["equivalent"] == {"norm.py:9:9": "setp compares numbers that are never equal"}
    assert explained([found], reasons) == [found]


def row(kernel, target, source, faults):
    return dict(kernel=kernel, target=target, source=source, kind="comparison", faults=faults)


@pytest.mark.parametrize(
    ("new", "is_better"),
    [
        (row("norm", "sm_90", "1f", 8), True),
        (row("norm", "sm_90", "1f", 7), True),  # the same, whose places tests of others may have seen since
        (row("norm", "sm_90", "1f", 6), False),
        (row("norm", "sm_90", "2f", 1), True),
    ],
)
def test_rows_of_a_kernel_and_target_are_replaced_together(new, is_better):
    old = [row("mlp", "sm_90", "1e", 3), row("norm", "sm_80", "1f", 9), row("norm", "sm_90", "1f", 7)]
    assert merged(old, [new]) == [*old[:2], new if is_better else old[2]]
    assert merged(old, []) == old


def test_the_last_row_of_a_fault_counts(tmp_path):
    file = tmp_path / "norm-sm_90-1f.jsonl"
    assert latest(file) == {}
    (first, other, again) = raw(("norm.py:2:3", None), ("norm.py:9:9", None), ("norm.py:2:3", "a test"))
    other["fault"] = ["k", "p", 2, "comparison"]
    lines = [{"of": {"comparison": 2}}, first, other, {"of": {"comparison": 3}}, again]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert latest(file) == {("k", "p", 1, "comparison"): again, ("k", "p", 2, "comparison"): other}
    assert counted(file) == {"comparison": 3}


def test_part_of_a_row_that_a_killed_run_left_is_passed_over(tmp_path):
    file = tmp_path / "norm-sm_90-1f.jsonl"
    (row,) = raw(("norm.py:2:3", None))
    file.write_text(json.dumps(row) + "\n" + json.dumps(row)[:30] + "\n" + json.dumps({"of": {"comparison": 2}}))
    assert list(latest(file).values()) == [row] and counted(file) == {"comparison": 2}


def test_a_fault_is_found_again_in_another_folder():
    """Keep the key of a program where only its places in files differ; Triton's text names the folder of its source."""
    here = TEXT.replace("{\n.reg", '.file 1 "/here/norm.py"\n{\n.loc 1 5 3\n.reg')
    there = here.replace("/here", "/there/and/on")
    assert here != TEXT and Program.of(here).key == Program.of(there).key
    assert Program.of(here).key != Program.of(here.replace("%r0, 7", "%r0, 8")).key


def fault(kernel, what, where):
    program = SimpleNamespace(kernel=SimpleNamespace(name=kernel))
    return SimpleNamespace(program=program, what=what, instruction=SimpleNamespace(where=where))


def test_faults_are_drawn_evenly():
    """Draw of each kernel in turn, of each kind as often, though one has more, and at each place once before twice."""
    left = [fault("k", "comparison", f"norm.py:{i % 3}:1") for i in range(600)]
    left += [fault("k", "offset shifted", "norm.py:9:9") for _ in range(60)]
    left += [fault("l", "comparison", "norm.py:8:8") for _ in range(60)]
    tried = Counter({("comparison", "norm.py:0:1"): 5})
    order = list(islice(drawn(left, tried, set(), random.Random(0)), 100))
    assert [one.program.kernel.name for one in order] == ["k", "l"] * 50
    kinds = Counter(one.what for one in order[::2])
    assert kinds.keys() == {"comparison", "offset shifted"} and min(kinds.values()) > 15
    places = [one.instruction.where for one in order[::2] if one.what == "comparison"]
    assert Counter(places[:10]) == {"norm.py:1:1": 5, "norm.py:2:1": 5}
    assert max(Counter(places[10:]).values()) - min(Counter(places[10:]).values()) <= 1
    assert len(list(drawn(left, Counter(), set(), random.Random(0)))) == len(left)


def test_places_where_a_fault_was_seen_come_last():
    left, seen = [fault("k", "comparison", f"norm.py:{i % 3}:1") for i in range(60)], set()
    faults = drawn(left, Counter(), seen, random.Random(0))
    seen.add(("comparison", next(faults).instruction.where))
    rest = [("comparison", one.instruction.where) in seen for one in faults]
    assert rest == [False] * 40 + [True] * 19


def test_each_reason_names_a_survivor():
    """Keep no reason of a fault that is seen by now."""
    named = {(row["kernel"], row["kind"], where) for row in suites.faults() for where in row["equivalent"]}
    assert named == set(reasons_of_survivors())


def test_at_most_a_tenth_of_the_places_is_open():
    assert 10 * sum(len(row["open"]) for row in suites.faults()) <= sum(row["places"] for row in suites.faults())


def test_the_page_shows_the_rows_on_faults():
    page = suites.FAULTS_PAGE.read_text()
    assert suites.with_faults(page) == page


def test_rows_of_an_earlier_source_are_marked(monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "MUTATED", tmp_path / "rows.jsonl")
    monkeypatch.setattr(suites, "FAULTS_PAGE", tmp_path / "page.md")
    monkeypatch.setattr(suites, "source_hash", lambda kernel, target: None if kernel == "log_mel" else f"{target}")
    suites.FAULTS_PAGE.write_text("<!-- faults -->\n<!-- end -->\n")
    of_each = dict(of=9, seen=1, places=1, seen_places=1, equivalent={}, open={})
    found = [row("log_mel", "sm_80", "1f", 3), row("norm", "sm_80", "80", 4), row("norm", "sm_90", "80", 5)]
    suites.write_faults([one | of_each for one in found])
    assert [one["outdated"] for one in suites.faults()] == [False, False, True]
    page = suites.FAULTS_PAGE.read_text()
    assert "| norm | sm_80 | 4 of 9 | 1 | 1 | 1 | 0 | 0 |\n" in page
    assert "| norm (of an earlier source) | sm_90 | 5 of 9 |" in page and "| all |  | 12 of 27 | 3 |" in page
