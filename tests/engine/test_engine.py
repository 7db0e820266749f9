"""The engine as a user meets it, on the random checkpoint: the same codes in every company, and nothing left behind."""

import asyncio
import copy
import pickle
import random as python_random

import numpy as np
import pytest
import torch

from clvp_fast.engine.engine import CandidateEngine
from clvp_fast.engine.requests import CandidateRequest
from clvp_fast.engine.sampling_params import SamplingParams
from tests.engine.small_engine import RATE, TEXTS, assert_empty, assert_same, clip, make, request, sampling


def test_a_result_holds_what_it_promises(parts, engine):
    asked = request(1)
    (result,) = engine.generate(asked, SamplingParams(num_candidates=5, max_new_tokens=20, seed=1), keep=3)
    assert result.request is asked and result.error is None
    assert result.codes.shape == (5, result.lengths.max()) and result.codes.dtype == np.int64
    stop = parts[0].config.decoder_config.eos_token_id
    for row, length, stopped in zip(result.codes, result.lengths, result.stopped, strict=True):
        assert stop not in row[:length] and (row[length:] == stop).all() and stopped == (length < 20)
    order = np.argsort(-result.scores, kind="stable")[:3]
    assert result.kept.tolist() == order.tolist()
    for (index, codes, score), expected in zip(result.best(3), order, strict=True):
        assert index == expected and score == result.scores[index]
        assert np.array_equal(codes, result.codes[index, : result.lengths[index]])
    assert len({row.tobytes() for row in result.codes}) == 5, "candidates differ"
    ids = torch.tensor(parts[1].tokenizer(asked.text)["input_ids"])
    codes = [row[:length] for row, length in zip(result.codes, result.lengths, strict=True)]
    again = engine.scorer.rank(ids, codes, pad_to=21)
    assert np.array_equal(again.scores.numpy(), result.scores)
    assert np.array_equal(again.speech_embeds.numpy(), result.speech_embeds)
    assert set(result.timings) == {"prepare", "queue", "decode", "rank"} and min(result.timings.values()) >= 0
    with pytest.raises(ValueError, match="1 to 3 candidates"):
        result.best(4)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.deepcopy, copy.copy])
def test_it_is_neither_copied_nor_pickled(engine, duplicate):
    with pytest.raises(TypeError, match=r"^an engine cannot be copied or pickled.*make one where it is needed"):
        duplicate(engine)


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_greedy_is_what_the_class_generates(parts, engine, penalty):
    model, processor = parts
    params = SamplingParams(do_sample=False, max_new_tokens=24, repetition_penalty=penalty, penalize_prompt=False)
    for index in range(2):
        (result,) = engine.generate(request(index), params)
        inputs = processor(text=TEXTS[index], audio=clip(index), sampling_rate=RATE, return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"],
            input_features=inputs["input_features"],
            do_sample=False,
            repetition_penalty=penalty,
            max_new_tokens=24,
            pad_to_max_mel_tokens=25,
            return_dict_in_generate=True,
            use_engine=False,
        )
        expected = output.sequences[0, 1:].tolist()
        stop = model.config.decoder_config.eos_token_id
        expected = expected[: expected.index(stop)] if stop in expected else expected
        assert result.codes[0, : result.lengths[0]].tolist() == expected
        np.testing.assert_allclose(result.scores, output.logits_per_text[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("pages", [None, 14], ids=["room", "preempted"])
def test_codes_are_the_same_in_every_company(parts, alone, lag, pages):
    """Random mixes of requests, in a batch that is too small for them, and on pages that run out."""
    engine = make(parts, lag=lag, **({} if pages is None else {"num_pages": pages}))
    random = python_random.Random(lag)
    for _ in range(3):
        order = random.sample(range(12), 7)
        by_request = {request(i, sampling=sampling(i)): i for i in order}
        seen = []
        for result in engine.generate(by_request):
            index = by_request[result.request]
            assert_same(result, alone[index])
            seen.append(index)
        assert sorted(seen) == sorted(order)
        assert_empty(engine)


def test_a_persistent_step_needs_a_gpu(parts):
    with pytest.raises(ValueError, match="no persistent decode step: "):
        make(parts, persistent=True)


def test_a_stopped_candidate_makes_room_for_the_next(parts, engine, monkeypatch):
    """Three candidates of very different lengths in two slots take fewer steps than two batches would."""
    small = make(parts, max_batch=2)
    steps = 0
    decode = small._work.loop.runner.decode

    def counted(slots):
        nonlocal steps
        steps += 1
        return decode(slots)

    monkeypatch.setattr(small._work.loop.runner, "decode", counted)
    lengths = (20, 4, 16)
    results = list(small.generate([request(0, sampling=sampling(num_candidates=1, max_new_tokens=n)) for n in lengths]))
    assert [result.lengths[0] for result in results] == [4, 20, 16] or results[0].stopped[0]
    assert steps <= 20


def test_seeds_reproduce_and_without_one_torch_s_own_decides(parts, engine):
    def codes(seed):
        (result,) = make(parts).generate(request(1), SamplingParams(num_candidates=2, max_new_tokens=8, seed=seed))
        return result.codes.tolist()

    assert codes(5) == codes(5) != codes(6)
    torch.manual_seed(0)
    first = codes(None)
    second = codes(None)
    torch.manual_seed(0)
    assert codes(None) == first != second


def test_one_bad_request_among_good_ones(engine, alone, tmp_path):
    long = "word " * 2000
    bad = {
        "NaN": CandidateRequest(text="x", audio=clip() * np.nan, sampling_rate=RATE),
        "16000": CandidateRequest(text="x", audio=clip(), sampling_rate=16000),
        "sampling_rate": CandidateRequest(text="x", audio=clip()),
        "the text is empty": CandidateRequest(text="  ", audio=clip(), sampling_rate=RATE),
        "split it up": CandidateRequest(text=long, audio=clip(), sampling_rate=RATE),
        "there is no voice": CandidateRequest(text="x", conditioning=str(tmp_path / "absent")),
        "max_new_tokens=25 is more than": request(0, sampling=SamplingParams(max_new_tokens=25)),
        "input_ids must lie": CandidateRequest(input_ids=[10**6], audio=clip(), sampling_rate=RATE),
        "a request must be": "hello",
    }
    requests = [request(3, sampling=sampling(3)), *bad.values(), request(4, sampling=sampling(4))]
    results = {id(result.request): result for result in engine.generate(requests)}
    assert_same(results[id(requests[0])], alone[3])
    assert_same(results[id(requests[-1])], alone[4])
    for message, asked in bad.items():
        result = results[id(asked)]
        assert message in str(result.error) and result.codes is None
        with pytest.raises(RuntimeError, match="the request failed"):
            result.best()
    assert_empty(engine)


def test_a_request_that_can_never_fit(parts):
    engine = make(parts, num_pages=3)
    (result,) = engine.generate(request(1), sampling(max_new_tokens=24))
    assert "pages" in str(result.error)
    (result,) = engine.generate(request(0), sampling(max_new_tokens=3, num_candidates=1))
    assert result.error is None


def test_iteration_stopped_midway_frees_everything(engine, alone):
    iterator = engine.generate(request(i, sampling=sampling(i)) for i in range(6))
    next(iterator)
    assert not engine._work.loop.idle
    iterator.close()
    assert_empty(engine)
    (result,) = engine.generate(request(5), sampling(5))
    assert_same(result, alone[5])


def test_requests_are_taken_as_there_is_room(engine):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield request(0, sampling=sampling(num_candidates=3, max_new_tokens=4))

    iterator = engine.generate(endless())
    for _ in range(4):
        next(iterator)
    assert taken < 14
    iterator.close()
    assert_empty(engine)


def test_cancelled_requests_give_no_result(engine, alone):
    requests = [request(i, sampling=sampling(i)) for i in (7, 3)]
    iterator = engine.generate(requests, on_token=lambda asked, *_: engine.cancel(requests[0]))
    (result,) = iterator
    assert result.request is requests[1]
    assert_same(result, alone[3])
    assert_empty(engine)


def test_a_timeout_fails_its_request_alone(engine, alone):
    requests = [request(0, sampling=sampling(7), timeout=1e-6), request(3, sampling=sampling(3))]
    results = list(engine.generate(requests))
    assert isinstance(results[0].error, TimeoutError) and "1e-06 s" in str(results[0].error)
    assert_same(results[1], alone[3])
    assert_empty(engine)


def test_streamed_tokens_are_the_result_s(engine, alone):
    *drawn, result = engine.stream(request(8), sampling(8))
    assert_same(result, alone[8])
    for candidate, length in enumerate(result.lengths):
        tokens = [token for index, token in drawn if index == candidate]
        assert tokens[:length] == result.codes[candidate, :length].tolist()
        assert len(tokens) == length + result.stopped[candidate]


def test_tasks_share_one_batch(engine, alone):
    async def one(index):
        return [result async for result in engine.generate_async(request(index), sampling(index))]

    async def all_of_them():
        return await asyncio.gather(*(one(index) for index in range(5)))

    for index, (result,) in enumerate(asyncio.run(all_of_them())):
        assert_same(result, alone[index])
    assert_empty(engine)


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(parts, alone, monkeypatch):
    engine = make(parts)
    decode, calls = type(engine._work.loop.runner).decode, []

    def failing(self, slots):
        calls.append(slots)
        if len(calls) in (5, 9):
            raise torch.OutOfMemoryError("no memory, says the test")
        return decode(self, slots)

    monkeypatch.setattr(type(engine._work.loop.runner), "decode", failing)
    by_request = {request(i, sampling=sampling(i)): i for i in range(8)}
    results = list(engine.generate(by_request))
    assert len(results) == 8 and engine.memory.max_batch == 1
    for result in results:
        assert_same(result, alone[by_request[result.request]])
    assert_empty(engine)


def test_ranking_that_runs_out_of_memory_takes_smaller_parts(parts, alone, monkeypatch):
    engine = make(parts)
    rank, most = engine.scorer.rank, engine.scorer.max_tokens

    def failing(*args, **kwargs):
        if engine.scorer.max_tokens > most // 4:
            raise torch.OutOfMemoryError("no memory, says the test")
        return rank(*args, **kwargs)

    monkeypatch.setattr(engine.scorer, "rank", failing)
    (result,) = engine.generate(request(2), sampling(2))
    assert_same(result, alone[2])


def test_a_saved_voice_stands_for_its_clips(engine, alone, tmp_path):
    asked = request(3)
    engine.voice(asked).save(tmp_path / "voice.safetensors")
    for conditioning in (str(tmp_path / "voice.safetensors"), engine.voice(asked)):
        (result,) = engine.generate(CandidateRequest(text=asked.text, conditioning=conditioning), sampling(3))
        assert_same(result, alone[3])


def test_from_pretrained_takes_names_of_dtypes():
    engine = CandidateEngine.from_pretrained("random", device="cpu", dtype="bfloat16", max_batch=2, max_new_tokens=8)
    (result,) = engine.generate(request(0), sampling(num_candidates=2, max_new_tokens=6))
    assert result.error is None and np.isfinite(result.scores).all()
