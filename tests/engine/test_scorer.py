"""A scorer of the caller's own in the engine: what it is told, what its scores do, and what its failures cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clvp_fast import CLVPModel, Ranker, Ranking, SamplingParams, Scorer
from tests.engine.small_engine import assert_empty, assert_same, make, request, sampling


class Judge:
    """Gives each candidate the score that `judged` makes of the request and the codes."""

    def __init__(self, judged):
        self.judged, self.told = judged, []

    def score(self, request, text_ids, codes, max_codes):
        assert torch.is_inference_mode_enabled()
        self.told.append((request, text_ids, codes, max_codes))
        return self.judged(request, codes)


def shortest_first(request, codes):
    return Ranking(torch.tensor([-float(len(row)) for row in codes], dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def unequal(engine):
    """Request 1 and how to sample five candidates of it that end at different places."""
    params = SamplingParams(num_candidates=5, max_new_tokens=20, seed=1)
    (result,) = engine.generate(request(1), params)
    return request(1, id="mine"), replace(params, stop_token=int(result.codes[3, 6]))


def test_it_is_told_all_and_ranks(parts, unequal):
    asked, params = unequal
    judge: Scorer = Judge(shortest_first)
    (result,) = make(parts, scorer=judge).generate(asked, params, keep=3)
    ((told, text_ids, codes, max_codes),) = judge.told
    assert told is asked and max_codes == 20
    assert text_ids.tolist() == parts[1].tokenizer(asked.text)["input_ids"]
    assert result.lengths.min() <= 6 and len(set(result.lengths.tolist())) > 1
    for row, of_result, length in zip(codes, result.codes, result.lengths, strict=True):
        assert row.dtype == np.int64 and row.tolist() == of_result[:length].tolist()
    assert result.scores.dtype == np.float32 and result.scores.tolist() == (-result.lengths).tolist()
    assert result.kept.tolist() == np.argsort(result.lengths, kind="stable")[:3].tolist()
    assert result.best(1)[0][2] == -result.lengths.min()
    assert result.text_embeds is None and result.speech_embeds is None and "rank" in result.timings


def test_the_codes_do_not_depend_on_it(parts, alone):
    (result,) = make(parts, scorer=Judge(shortest_first)).generate(request(2), sampling(2))
    assert np.array_equal(result.codes, alone[2].codes)


def test_clvps_own_ranker_is_one(parts, unequal):
    results = []
    for mode in ("padded", "trimmed"):
        (result,) = make(parts, scorer=Ranker(parts[0], mode=mode)).generate(*unequal)
        (expected,) = make(parts, scoring=mode).generate(*unequal)
        assert_same(result, expected)
        assert np.array_equal(result.speech_embeds, expected.speech_embeds)
        results.append(result)
    assert np.abs(results[0].scores - results[1].scores).max() > 1e-3


def test_a_scorers_error_fails_its_request_alone(parts):
    """Fail it for any error of the scorer, also where two requests finish in the same step."""

    def judged(request, codes):
        if request.id == "bad":
            raise RuntimeError("the judge is out")
        return shortest_first(request, codes)

    engine = make(parts, scorer=Judge(judged))
    params = SamplingParams(do_sample=False, max_new_tokens=3)
    results = list(engine.generate([request(0, id="bad"), request(0, id="good")], params))
    assert sorted(str(result.error) for result in results) == ["None", "the judge is out"]
    (failed,) = (result for result in results if result.error)
    assert failed.request.id == "bad" and failed.codes is None
    with pytest.raises(RuntimeError, match="the request failed and has no candidates: the judge is out"):
        failed.best()
    assert_empty(engine)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2), r"Judge.score\(\) must return a clvp_fast.Ranking, not Tensor"),
        (None, "must return a clvp_fast.Ranking, not NoneType"),
        (Ranking(torch.zeros(3)), r"floating point scores \[2\], one a candidate, not torch.float32 \[3\]"),
        (Ranking(torch.zeros(2, 1)), r"not torch.float32 \[2, 1\]"),
        (Ranking(torch.zeros(2, dtype=torch.long)), r"not torch.int64 \[2\]"),
        (Ranking([1.0, 2.0]), "one a candidate, not list"),
    ],
)
def test_bad_rankings(parts, given, message):
    engine = make(parts, scorer=Judge(lambda request, codes: given))
    (result,) = engine.generate(request(0), SamplingParams(num_candidates=2, max_new_tokens=3, seed=0))
    with pytest.raises((TypeError, ValueError), match=message):
        raise result.error


def test_bad_scorers(parts):
    with pytest.raises(TypeError, match=r"a method score\(request, text_ids, codes, max_codes\), and type has none"):
        make(parts, scorer=CLVPModel)
    with pytest.raises(TypeError, match="and str has none"):
        make(parts, scorer="clap")
    with pytest.raises(ValueError, match="scoring='trimmed' is how the model's own encoders score"):
        make(parts, scorer=Judge(shortest_first), scoring="trimmed")
