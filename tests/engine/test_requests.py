"""Requests say in one sentence what is wrong with them; results give their best candidates."""

import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from clvp_fast.engine.requests import CandidateRequest, CandidateResult
from clvp_fast.engine.sampling_params import SamplingParams

CLIP = np.zeros(100, dtype=np.float32)


def result(**changes):
    fields = dict(
        codes=np.array([[5, 6, 9, 9], [1, 2, 3, 4], [9, 9, 9, 9], [7, 7, 7, 9]]),
        lengths=np.array([2, 4, 0, 3]),
        stopped=np.array([True, False, True, True]),
        scores=np.array([0.25, 0.5, -1.0, 0.75], dtype=np.float32),
        kept=np.array([3, 1, 0]),
    )
    return CandidateResult(CandidateRequest(text="a", audio=CLIP), **fields | changes)


@pytest.mark.parametrize("text", [{"text": "hello"}, {"text": ""}, {"input_ids": np.array([1, 2])}])
@pytest.mark.parametrize(
    "voice",
    [
        {"audio": CLIP, "sampling_rate": 22050},
        {"audio": [CLIP, CLIP]},
        {"input_features": np.zeros((1, 80, 4))},
        {"conditioning": object()},
    ],
)
def test_one_text_and_one_voice(text, voice):
    request = CandidateRequest(**text, **voice)
    assert all(getattr(request, name) is value for name, value in (text | voice).items())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "a request needs exactly one of text, input_ids, and none of them came"),
        ({"audio": CLIP}, "a request needs exactly one of text, input_ids, and none of them came"),
        (
            {"text": "a", "input_ids": [1], "audio": CLIP},
            "a request needs exactly one of text, input_ids, and text and input_ids came",
        ),
        ({"text": "a"}, "a request needs exactly one of audio, input_features, conditioning, and none of them came"),
        (
            {"text": "a", "audio": CLIP, "conditioning": CLIP},
            "a request needs exactly one of audio, input_features, conditioning, and audio and conditioning came",
        ),
        ({"text": ["a", "b"], "audio": CLIP}, "text must be one string, not list: give a request for each text"),
        (
            {"text": "a", "conditioning": CLIP, "sampling_rate": 22050},
            "sampling_rate is that of audio, which is not given: leave it out",
        ),
        (
            {"text": "a", "audio": CLIP, "sampling_rate": 22050.5},
            "sampling_rate must be a positive whole number of Hz, not 22050.5",
        ),
        (
            {"text": "a", "audio": CLIP, "sampling_rate": 0},
            "sampling_rate must be a positive whole number of Hz, not 0",
        ),
        ({"text": "a", "audio": CLIP, "sampling": 16}, "sampling must be SamplingParams, not int"),
    ],
)
def test_a_wrong_request_is_refused_in_a_sentence(given, sentence):
    with pytest.raises(ValueError) as refusal:
        CandidateRequest(**given)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    "timeout", [0, -1.0, float("nan"), float("inf"), True, "5", 10**400, Fraction(1, 10**400)], ids=lambda x: str(x)[:9]
)
def test_a_timeout_is_seconds(timeout):
    with pytest.raises(ValueError, match="timeout must be a number of seconds above 0, or None to wait, not "):
        CandidateRequest(text="a", audio=CLIP, timeout=timeout)
    taken = CandidateRequest(text="a", audio=CLIP, timeout=Fraction(1, 2)).timeout
    assert taken == 0.5 and type(taken) is float  # of the clock's kind, so that no step has to convert it


def test_a_request_is_itself_alone():
    first, second = (CandidateRequest(text="a", audio=CLIP, id=7) for _ in range(2))
    assert first != second and first == first and len({first, second}) == 2
    assert len(repr(CandidateRequest(text="a", audio=[0.0] * 1000))) < 200


def test_the_best_come_first_and_without_padding():
    best = result().best(3)
    assert [(index, codes.tolist(), score) for index, codes, score in best] == [
        (3, [7, 7, 7], 0.75),
        (1, [1, 2, 3, 4], 0.5),
        (0, [5, 6], 0.25),
    ]
    assert [index for index, *_ in result().best()] == [3]
    assert [type(x) for x in best[0]] == [int, np.ndarray, float]
    assert result(kept=np.array([2])).best()[0][1].size == 0


@pytest.mark.parametrize("k", [0, -1, 4])
def test_more_than_were_kept_cannot_be_had(k):
    with pytest.raises(ValueError, match=rf"1 to 3 candidates, as many as were kept, not {k}$"):
        result().best(k)


def test_a_failed_request_has_no_best():
    failed = CandidateResult(CandidateRequest(text="a", audio=CLIP), error=ValueError("the clip is silent"))
    assert failed.codes is failed.scores is failed.latents is None and failed.timings == {}
    with pytest.raises(RuntimeError, match="the request failed and has no candidates: the clip is silent") as raised:
        failed.best()
    assert raised.value.__cause__ is failed.error


def test_both_survive_pickling():
    request = CandidateRequest(text="a", audio=CLIP, sampling=SamplingParams(seed=3), timeout=2, id=("x", 1))
    copy = pickle.loads(pickle.dumps(request))
    assert (copy.text, copy.sampling, copy.timeout, copy.id) == ("a", request.sampling, 2, ("x", 1))
    copied = pickle.loads(pickle.dumps(result(error=None, latents={3: CLIP}, timings={"queue": 0.1})))
    assert copied.best()[0][0] == 3 and copied.latents[3].shape == CLIP.shape and copied.timings == {"queue": 0.1}


def test_the_control_plane_needs_no_torch():
    modules = "clvp_fast.engine.requests, clvp_fast.engine.scheduler"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
