"""Rows: what a record may hold, and what is told of one that cannot be spoken."""

import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from clvp_fast.batch.failures import LONGEST
from clvp_fast.batch.rows import Row


def test_plain():
    row = Row.read(3, {"id": "a", "text": "Hello.", "speaker": "someone"})
    assert row == Row(3, "a", "Hello.")


def test_voice_is_found_from_the_folder():
    def voice(place):
        return Row.read(0, {"id": "a", "text": "Hello.", "voice": place}, Path("/corpus")).voice

    assert voice("clips/a.wav") == "/corpus/clips/a.wav"
    assert voice("/clips/a.wav") == "/clips/a.wav"
    assert voice("~/a.wav") == str(Path.home() / "a.wav")
    assert voice("~draft.wav") == "/corpus/~draft.wav"  # there is no such user
    assert Row.read(0, {"id": "a", "text": "Hello.", "voice": "a.wav"}).voice == "a.wav"


@pytest.mark.parametrize("nothing", [None, "", b"", math.nan, Decimal("NaN")])
def test_absent_values_take_the_defaults(nothing):
    row = Row.read(0, {"id": "a", "text": "Hello.", "voice": nothing, "temperature": nothing, "seed": nothing})
    assert row == Row(0, "a", "Hello.")


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("num_candidates", "96", 96),
        ("num_candidates", 96.0, 96),
        ("num_candidates", np.int64(96), 96),
        ("temperature", "0.5", 0.5),
        ("temperature", "1e-1", 0.1),
        ("top_p", np.float32(0.5), 0.5),
        ("seed", "9223372036854775807", 2**63 - 1),
        ("seed", -1, -1),
        ("do_sample", "False", False),
        ("do_sample", np.True_, True),
        ("do_sample", "1", True),
        ("max_new_tokens", " 7 ", 7),
    ],
)
def test_numbers(name, given, read):
    sampling = Row.read(0, {"id": "a", "text": "Hello.", name: given}).sampling
    assert sampling == {name: read} and type(sampling[name]) is type(read)


@pytest.mark.parametrize("given", ["a", 17, 1.5, np.int32(4), "../x", "é"])
def test_ids(given):
    row = Row.read(0, {"id": given, "text": "Hello."})
    assert row.id == str(given) and row.error is None


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "Hello."}, "each row needs an id of its own"),
        ({"id": ["a"], "text": "Hello."}, "each row needs an id of its own, a string or a number, not ['a']"),
        ({"id": True, "text": "Hello."}, "each row needs an id of its own, a string or a number, not True"),
        ({"id": "a"}, "the row has no text"),
        ({"id": "a", "text": 7}, "text must be a string, not 7"),
        ({"id": "a", "text": "Hello.", "voice": 7}, "voice must be the path of a file or folder, not 7"),
        ({"id": "a", "text": "Hello.", "top_k": "many"}, "top_k must be a number, not 'many'"),
        ({"id": "a", "text": "Hello.", "top_k": True}, "top_k must be a number, not True"),
        ({"id": "a", "text": "Hello.", "do_sample": "perhaps"}, "do_sample must be true or false, not 'perhaps'"),
        ({"id": "a", "text": "Hello.", "seed": [1]}, "seed must be a number, not [1]"),
        ({"id": "a", "text": "Hello.", "voice": {"array": [0.1]}}, "voice must be the path of a file or folder"),
        (
            {"id": "a", "text": "Hello.", "voice": {"bytes": "x"}},
            "bytes of a voice must be those of a recording, not 'x'",
        ),
        ({"id": "a", "text": "Hello.", "seed": "1" * 5000}, "seed must be a number, not '111"),
        ({"id": "a", "text": {"x": "y" * 10**6}}, "text must be a string, not {'x': 'yyy"),
        ({"id": b"\xff", "text": "Hello."}, "id is not valid Unicode"),
        ({"id": "a", "text": "\ud800"}, "text is not valid Unicode"),
        ({"id": "\udcff", "text": "Hello."}, "id is not valid Unicode"),
    ],
)
def test_bad_records(record, said):
    row = Row.read(5, record)
    assert row.index == 5 and said in row.error and row.text is None and len(row.error) <= LONGEST
    (row.id or "").encode()


def test_seeds_follow_from_job_and_id():
    def seed(row_id, of_job=0, **more):
        return Row.read(0, {"id": row_id, "text": "Hello.", **more}).seed(of_job)

    assert seed("a") == Row.read(9, {"id": "a", "text": "Other."}).seed(0)
    many = {seed(f"row-{i}", of_job) for i in range(500) for of_job in (0, 1)}
    assert len(many) == 1000 and all(0 <= value < 2**63 for value in many)
    assert len({value >> 60 for value in many}) == 8
    # A row's results must stay the same in every version.
    assert seed("row-0") == 236872062590050484
    assert seed("a", seed=7) == 7
