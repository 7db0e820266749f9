"""Seconds of `make stress`: nothing is lost, nothing hangs, pages come back, and memory is flat."""

import json

import pytest

from benchmarks import stress


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_stress(seconds, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stress.Machine, "measure", lambda *_: stress.Machine("m", 1, 1.0, {"float32": 1.0}))
    failed = stress.main(["--seconds", str(seconds), "--results", str(tmp_path)])
    told = capsys.readouterr().out
    assert not failed, told
    (row,) = map(json.loads, next(tmp_path.glob("*/stress.jsonl")).read_text().splitlines())
    assert row["error"] == 0 and row["planted"] > 0 and row["ended"]["right"] > 0
    with capsys.disabled():
        print("", told, sep="\n")
