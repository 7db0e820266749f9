"""The workload speech, over a recogniser that is pretended: word errors, equal candidates and ranks of its ways."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import document, speech
from benchmarks.machine import Machine


@pytest.fixture
def heard(monkeypatch):
    """Pretend that a recogniser hears one wrong word in four, and two more in sound that lasts over two seconds."""
    judge = importlib.import_module("examples.train.judge")
    sounds = []

    def errors_of(said, samples, kind):
        assert kind == "closed" and said == said.lower() and "." not in said
        sounds.append(samples)
        return 0.25 + 0.5 * (len(samples) > 2 * 22050)

    monkeypatch.setattr(judge, "recogniser", lambda kind: None)
    monkeypatch.setattr(judge, "errors_of", errors_of)
    monkeypatch.setattr(speech, "WAYS", [way for way in speech.WAYS if way.name in CHOSEN])
    return sounds


CHOSEN = (
    "float32",
    "float32, each sentence alone",
    "float32, trimmed scores",
    "float32, greedy",
    "float32, int8 weights",
)


def test_rows(heard):
    (task,) = speech.tasks("cpu", smoke=True)
    rows = {row["provider"].removeprefix("clvp_fast "): row for row in task.rows()}
    assert tuple(rows) == CHOSEN
    plain, alone, trimmed, greedy, int8 = rows.values()
    errors = [0.25 + 0.5 * (len(samples) > 2 * 22050) for samples in heard[:6]]
    assert plain["word_errors"] == np.mean(errors) and plain["more_word_errors"] == 0.0
    for row in plain, alone, trimmed:
        assert row["same_codes"] == 1.0 and row["word_errors"] == plain["word_errors"]
    assert plain["rank_correlation"] == alone["rank_correlation"] == pytest.approx(1.0)
    assert trimmed["rank_correlation"] < 1.0
    assert int8["same_codes"] < 1.0 and "same_codes" not in greedy
    assert greedy["more_word_errors"] == greedy["word_errors"] - plain["word_errors"]
    context = dict(device=Machine("m", 1, 1.0, {}).described(), commit="c", utc="2026-11-30", versions={})
    text = document.measured(
        [row | context | {"versions": {"torch": "2", "transformers": "5"}} for row in rows.values()], {}
    )
    assert f"| {plain['word_errors']:.3f} | +0.000 ± 0.000 |" in text and "| equal candidates |" in text


def test_it_is_absent_without_the_recogniser(monkeypatch):
    judge = importlib.import_module("examples.train.judge")
    state = importlib.import_module("examples.train.state")

    def refuse(kind):
        raise state.Refused("the package pocketsphinx is not installed: pip install pocketsphinx")

    monkeypatch.setattr(judge, "recogniser", refuse)
    (task,) = speech.tasks("cpu", smoke=True)
    assert task.rows() == []


def test_the_picked_candidate_is_the_one_with_the_highest_score():
    spoken = SimpleNamespace(errors=np.array([[0.5, 0.0], [0.2, 0.4]]), scores=torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
    assert speech.Spoken.picked.fget(spoken).tolist() == [0.0, 0.2]
