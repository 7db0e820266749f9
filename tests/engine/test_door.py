"""The door checks a request's content once: it takes it, or refuses it in a sentence; the others finish."""

import numpy as np
import pytest
import torch

from clvp_fast.checkpoint import text_limit
from clvp_fast.engine.requests import CandidateRequest
from tests.engine.small_engine import RATE, assert_empty, assert_same, clip, request, sampling

IDS = [5, 6, 7]


def spoken(engine, **fields):
    """Return the result of a request beside another one, which must finish."""
    good = request(3, sampling=sampling(3))
    bad = CandidateRequest(**{"audio": clip(), "sampling_rate": RATE, **fields}, sampling=sampling(1))
    results = {result.request: result for result in engine.generate([good, bad])}
    assert results[good].error is None and len(results) == 2
    assert_empty(engine)
    return results[bad]


@pytest.mark.parametrize(
    "ids",
    [np.array(IDS, dtype) for dtype in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")]
    + [torch.tensor(IDS, dtype=dtype) for dtype in (torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.int32)]
    + [tuple(IDS)],
    ids=lambda ids: str(getattr(ids, "dtype", "tuple")),
)
def test_ids_of_every_integer_dtype(engine, ids):
    assert_same(spoken(engine, input_ids=ids), spoken(engine, input_ids=IDS))


@pytest.mark.parametrize(
    "ids",
    [
        {"input_ids": IDS},
        [None, 1],
        [1.0, 2.0],
        [True, False],
        [IDS],
        [[1], [2, 3]],
        "5 6",
        7,
        {5, 6},
        [2**70],
        [2**63],
    ],
    ids=repr,
)
def test_ids_that_are_none(engine, ids):
    error = spoken(engine, input_ids=ids).error
    assert isinstance(error, ValueError) and str(error).startswith("input_ids must be ")


def test_ids_of_exactly_the_limit_and_one_more(parts, engine):
    limit = text_limit(parts[0])
    assert spoken(engine, input_ids=[5] * limit).error is None
    assert f"takes 1 to {limit}" in str(spoken(engine, input_ids=[5] * (limit + 1)).error)
    assert f"takes 1 to {limit}" in str(spoken(engine, input_ids=[]).error)


def test_a_bare_latent_is_a_voice(engine, alone):
    vector = engine.voice(request(3)).vector
    for latent in (vector, vector.numpy(), vector[None]):
        asked = CandidateRequest(text=request(3).text, conditioning=latent)
        (result,) = engine.generate(asked, sampling(3))
        assert_same(result, alone[3])
    for other in (
        vector[:5],
        vector.long(),
        vector * torch.nan,
        (vector, vector),
        7,
        {"a": 1},
        np.array([None] * len(vector)),
    ):
        (result,) = engine.generate(CandidateRequest(text="x", conditioning=other), sampling(3))
        assert "conditioning" in str(result.error)
    assert_empty(engine)


def test_audio_is_a_path_or_a_dict_of_datasets(engine, alone, tmp_path):
    samples = clip(3 % 2)
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    of_datasets = {"array": samples, "sampling_rate": RATE, "path": None}
    for audio in (tmp_path / "a.wav", str(tmp_path / "a.wav"), of_datasets, [of_datasets]):
        (result,) = engine.generate(CandidateRequest(text=request(3).text, audio=audio), sampling(3))
        assert_same(result, alone[3])
    refused = {
        "there is no": tmp_path / "absent.wav",
        "audio must be samples, a path": b"RIFF",
        "needs 'array' and 'sampling_rate'": {"bytes": b""},
        "one sampling_rate": [of_datasets, of_datasets | {"sampling_rate": 16000}],
        "audio needs its sampling_rate": samples,
        "sampling_rate must be a positive whole number": of_datasets | {"sampling_rate": [RATE]},
        "not '22050'": [of_datasets, of_datasets | {"sampling_rate": "22050"}],
    }
    conflict = CandidateRequest(text="x", audio=of_datasets, sampling_rate=16000)
    (result,) = engine.generate(conflict, sampling(3))
    assert "sampling_rate=16000 is not the 22050 Hz that the clip says" in str(result.error)
    for message, audio in refused.items():
        (result,) = engine.generate(CandidateRequest(text="x", audio=audio), sampling(3))
        assert message in str(result.error)


def test_features_are_floats(engine):
    for features in ("mel", object(), np.zeros((1, 80, 4), complex), [np.array(["a"])]):
        error = spoken(engine, text="x", audio=None, sampling_rate=None, input_features=features).error
        assert isinstance(error, TypeError) and str(error).startswith("input_features must be floats [bins, frames]")


def test_arguments_of_a_call_are_looked_at_before_its_first_request(engine):
    for keep in (0, 1.5, True, "2", float("nan"), None):
        with pytest.raises(ValueError, match="keep must be a whole number from 1 up, not "):
            engine.generate(request(0), keep=keep)
    with pytest.raises(TypeError, match="sampling must be SamplingParams, not dict"):
        engine.generate(request(0), {"top_k": 3})
    with pytest.raises(TypeError, match="on_token must be callable, and is 5"):
        engine.generate(request(0), on_token=5)


def test_none_among_requests_is_an_error_with_its_place(engine, alone):
    first, last = request(3, sampling=sampling(3)), request(4, sampling=sampling(4))
    results = {result.request: result for result in engine.generate([first, None, last])}
    assert isinstance(results[None].error, TypeError) and "number 1 (from 0) is NoneType" in str(results[None].error)
    assert_same(results[first], alone[3])
    assert_same(results[last], alone[4])


def test_a_listener_that_cancels_its_own_request_and_then_raises(engine, alone):
    cancelled, other = request(7, sampling=sampling(7)), request(3, sampling=sampling(3))

    def on_token(asked, candidate, token):
        if asked is cancelled:
            engine.cancel(cancelled)
            raise RuntimeError("and then some")

    (result,) = engine.generate([cancelled, other], on_token=on_token)
    assert result.request is other
    assert_same(result, alone[3])
    assert_empty(engine)


def test_a_decoder_without_a_stop_token(engine, monkeypatch):
    monkeypatch.setattr(engine.model.config.decoder_config, "eos_token_id", None)
    (refused,) = engine.generate(request(sampling=sampling()))
    assert isinstance(refused.error, ValueError) and "is None: set it, or give a stop_token" in str(refused.error)
    (given,) = engine.generate(request(sampling=sampling(stop_token=7)))
    assert given.error is None and (given.stopped == (given.lengths < sampling().max_new_tokens)).all()
