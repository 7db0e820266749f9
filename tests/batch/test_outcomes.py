"""Outcomes of rows, to Arrow and back."""

import numpy as np
import pytest

from clvp_fast.batch.outcomes import Outcome, from_table, outcome_schema, shard_schema, to_table
from clvp_fast.batch.rows import Row
from clvp_fast.batch.settings import Settings
from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from tests.batch.jobs import NoModel


def result(**changed):
    given = {
        "codes": np.array([[5, 6, 9], [7, 9, 9], [1, 2, 3]]),
        "lengths": np.array([2, 1, 3]),
        "stopped": np.array([True, True, False]),
        "scores": np.array([0.1, 0.5, 0.3], dtype=np.float32),
        "text_embeds": np.array([1, 2], dtype=np.float32),
        "speech_embeds": np.arange(6, dtype=np.float32).reshape(3, 2),
        "kept": np.array([1, 2]),
        "timings": {"prepare": 0.25, "queue": 0.5, "decode": 1.0, "rank": 2.0},
    }
    return CandidateResult(CandidateRequest(text="Hello.", input_features=0), **given | changed)


def test_lines_of_a_result():
    settings = Settings(num_candidates=3, keep=2, embeddings=True)
    outcome = Outcome.of(Row(4, "a", "Hello."), 2**64 - 1, result(), settings, ("a remark",))
    first, second = to_table([outcome], shard_schema(settings)).to_pylist()
    assert first == {
        "row": 4,
        "id": "a",
        "rank": 1,
        "candidate": 1,
        "candidates": 3,
        "codes": [7],
        "length": 1,
        "stopped": True,
        "score": 0.5,
        "tokens": 2 + 1 + 3 + 2,  # the stops too
        "seed": -1,
        "settings": settings.digest,
        "timings": {"prepare": 0.25, "queue": 0.5, "decode": 1.0, "rank": 2.0},
        "remarks": ["a remark"],
        "text_embedding": [1, 2],
        "speech_embedding": [2, 3],
    }
    assert second["codes"] == [1, 2, 3] and second["rank"] == 2 and not second["stopped"]
    assert outcome.drawn == {"candidates": 3, "tokens": 8}


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1])
def test_seeds_are_the_same_64_bits(seed):
    outcome = Outcome.of(Row(4, "a", "Hello."), seed, result(), Settings(num_candidates=3))
    found = to_table([outcome], shard_schema(Settings()))["seed"][0].as_py()
    assert found.to_bytes(8, "little", signed=True) == seed.to_bytes(8, "little")


def test_results_that_cannot_be_used():
    row, settings = Row(4, "a", "Hello."), Settings(dtype="float16")
    failed = CandidateResult(result().request, error=ValueError("the text is too long"))
    assert Outcome.of(row, 0, failed, settings) == Outcome(4, "a", error="the text is too long")
    for bad in (np.nan, np.inf, -np.inf):
        scores = np.array([0.1, bad, 0.3], dtype=np.float32)
        outcome = Outcome.of(row, 0, result(scores=scores), settings)
        assert outcome == Outcome(4, "a", error="the scores are not finite in float16; try float32")
    # A candidate without tokens has nothing that could be judged.
    empty = result(lengths=np.array([2, 0, 3]), scores=np.array([0.1, -np.inf, 0.3]))
    assert Outcome.of(row, 0, empty, settings).error is None
    nothing = result(lengths=np.array([2, 0, 3]), scores=np.array([0.1, np.nan, 0.3]))
    assert "not finite" in Outcome.of(row, 0, nothing, settings).error


@pytest.mark.parametrize("latents", [False, True])
def test_there_and_back(latents):
    settings = Settings(keep=3, latents=latents)
    schema = outcome_schema(settings)
    outcomes = [NoModel(settings).outcome(Row(index, f"{index}", "Hello.")) for index in range(4)]
    if latents:
        for outcome in outcomes:
            for line in outcome.lines:
                line["latents"] = list(np.ones((line["length"], 2), dtype=np.float32))
    outcomes.insert(2, Outcome(9, None, error="no"))
    table = to_table(outcomes, schema)
    assert table.schema == schema
    again = from_table(table)
    assert [(outcome.row, outcome.id, outcome.error) for outcome in again] == [
        (outcome.row, outcome.id, outcome.error) for outcome in outcomes
    ]
    assert to_table(again, schema).equals(table)
    # Shards have no failures among their lines.
    assert to_table(again, shard_schema(settings)).num_rows == 12


def test_lines_in_another_order():
    """Put the best candidate first, even if a cluster returns lines in another order."""
    settings = Settings(num_candidates=3, keep=2)
    outcome = Outcome.of(Row(4, "a", "Hello."), 0, result(), settings)
    table = to_table([outcome], outcome_schema(settings)).take([1, 0])
    (found,) = from_table(table)
    assert [line["rank"] for line in found.lines] == [1, 2] and found.lines[0]["codes"].tolist() == [7]
