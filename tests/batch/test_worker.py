"""The worker on the random checkpoint: what rows give, what each depends on, and what it is known by."""

import itertools
import os
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from clvp_fast import CandidateEngine, CandidateRequest, CandidateResult, Voice
from clvp_fast.audio import load_audio
from clvp_fast.batch import worker as of_worker
from clvp_fast.batch.outcomes import Outcome
from clvp_fast.batch.rows import Row
from clvp_fast.batch.settings import Settings
from clvp_fast.batch.worker import Worker, _digest_of
from clvp_fast.checkpoint import Checkpoint
from clvp_fast.engine.voice_files import LoadedVoice
from tests.batch.jobs import QUICK, VOICE, records
from tests.kit import isa


@pytest.fixture(scope="module")
def worker():
    return Worker(Settings(**QUICK, keep=None))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return [Row.read(index, record, folder) for index, record in enumerate(records(24))]


def lines(outcomes):
    """Return outcomes by row, without their timings."""
    return {
        outcome.row: outcome.error
        or [
            {name: value.tolist() if name == "codes" else value for name, value in line.items() if name != "timings"}
            for line in outcome.lines
        ]
        for outcome in outcomes
    }


@pytest.fixture(scope="module")
def together(worker, rows):
    return lines(worker.outcomes(rows))


def test_as_the_bare_engine(worker, rows, together):
    """Compare with the engine's results for the same requests, candidate by candidate."""
    engine = CandidateEngine.from_pretrained("random", device="cpu", max_batch=4, max_new_tokens=5)
    audio, _ = load_audio(VOICE)
    for row in rows[:4]:
        sampling = worker.settings.sampling(**row.sampling, seed=row.seed(0))
        request = CandidateRequest(text=row.text, audio=audio, sampling_rate=22050, sampling=sampling)
        (result,) = engine.generate(request, keep=sampling.num_candidates)
        assert len(together[row.index]) == sampling.num_candidates == (3 if row.index == 3 else 2)
        for line, (candidate, codes, score) in zip(together[row.index], result.best(len(result.kept)), strict=True):
            assert (line["candidate"], line["codes"]) == (candidate, codes.tolist())
            assert line["score"] == pytest.approx(score, abs=1e-5)


def test_rows_do_not_depend_on_each_other(worker, rows, together):
    assert sorted(together) == list(range(24))
    assert lines(worker.outcomes(reversed(rows))) == together
    assert lines(worker.outcomes([rows[9]])) == {9: together[9]}


@isa.needs("paged_attention_decode", torch.bfloat16)
def test_half_types_do_not_either(rows):
    worker = Worker(Settings(**QUICK, dtype="bfloat16"))
    assert worker.engine._work.loop.runner.deterministic
    assert lines(worker.outcomes([rows[9]])) == {9: lines(worker.outcomes(rows))[9]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which has kernels of every type")
def test_half_types_that_would_are_refused():
    with pytest.raises(ValueError, match="needs each row to give the same in every batch, which float16 does not here"):
        Worker(Settings(**QUICK, dtype="float16"))


def test_seeds(worker, rows, together):
    """Another job's seed gives other tokens, another id too, and a row's own seed the same everywhere."""
    row = rows[0]

    def codes(row, seed=0):
        other = Worker.__new__(Worker)
        other.__dict__ = worker.__dict__ | {"settings": Settings(**worker.settings.as_dict() | {"seed": seed})}
        (found,) = lines(other.outcomes([row])).values()
        return [line["codes"] for line in found]

    first = codes(row)
    assert first == [line["codes"] for line in together[0]]
    assert codes(row, 1) != first
    assert codes(Row(0, "other", row.text)) != first
    own = Row(0, "other", row.text, sampling={"seed": row.seed(0)})
    assert codes(own) == codes(own, 1) == first


def test_failures_do_not_wait_for_the_end(worker):
    bad, good = Row(0, "a", error="no"), Row(1, "b", "Hello.")
    assert [outcome.row for outcome in worker.outcomes([bad, good])] == [0, 1]


def test_failures(worker, rows, together, tmp_path):
    assert together[7] == f"there is no recording at {rows[7].voice}"
    samples = np.zeros(22050, dtype=np.float32)
    soundfile.write(tmp_path / "silent.wav", samples, 22050)
    samples[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 22050, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no recording")
    (tmp_path / "none").mkdir()
    bad = {
        "the row has an error": Row(0, "a", error="the row has an error"),
        "the text is empty": Row(1, "b", " "),
        "the text is too long": Row(2, "c", "word " * 5000),
        "nothing of the text": Row(3, "d", "\U0001f642"),
        "is silent": Row(4, "e", "Hello.", str(tmp_path / "silent.wav")),
        "NaN or infinite": Row(5, "f", "Hello.", str(tmp_path / "nan.wav")),
        "cannot be read as a recording": Row(6, "g", "Hello.", str(tmp_path / "text.wav")),
        "has no recordings in it": Row(7, "h", "Hello.", str(tmp_path / "none")),
        "top_p must be above 0": Row(8, "i", "Hello.", sampling={"top_p": 0.0}),
        "would all be equal": Row(9, "j", "Hello.", sampling={"do_sample": False}),
        "max_new_tokens": Row(10, "k", "Hello.", sampling={"max_new_tokens": 6}),
    }
    found = lines(worker.outcomes([*bad.values(), Row(11, "l", "Hello.")]))
    for said, row in bad.items():
        assert said in found[row.index]
    assert len(found[11]) == 2


def test_voices(worker, tmp_path):
    """Take a saved voice and a folder like recordings, and read each place once."""
    Voice.save(worker.voice(str(VOICE))[0], tmp_path / "saved.safetensors")
    (tmp_path / "speaker").mkdir()
    (tmp_path / "speaker/one.flac").write_bytes(VOICE.read_bytes())
    places = [None, str(tmp_path / "saved.safetensors"), str(tmp_path / "speaker")]
    rows = [Row(index, "same", "Hello.", place) for index, place in enumerate(places)]
    found = [[line["codes"] for line in found] for found in lines(worker.outcomes(rows)).values()]
    assert found[0] == found[1] == found[2]
    (tmp_path / "speaker/one.flac").unlink()
    assert isinstance(lines(worker.outcomes(rows))[2], list)


def test_recordings_are_cropped_by_the_job_s_seed(worker, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, 22050 * 9), 22050)

    def voice(seed):
        found = Worker(Settings(**QUICK, crop_seed=seed)).voice(str(tmp_path / "long.wav"))
        return found[0].vector, found[1]

    (first, remarks), (again, _), (other, _) = voice(1), voice(1), voice(2)
    whole = worker.voice(str(tmp_path / "long.wav"))[0].vector
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, whole)
    assert remarks == ("6 s from a random place on are used",)
    for bad in (-1, 1.0, True, "1"):
        with pytest.raises(ValueError, match="crop_seed must be a whole number from 0 up, or None"):
            Settings(crop_seed=bad)


def test_voices_that_are_kept(worker, monkeypatch):
    """Keep only the voices that were used last."""
    loaded = []

    def load(voices, place, crop_seed):
        loaded.append(place)
        return LoadedVoice(place, place.upper(), None, 1)

    monkeypatch.setattr(of_worker, "load_voice", load)
    kept: OrderedDict = OrderedDict()
    monkeypatch.setattr(worker.engine.voices, "capacity", 2)
    monkeypatch.setattr(worker.engine.voices, "_kept", kept)
    found = [worker.voice(place)[0] for place in ("a", "b", "a", "c", "a", "b")]
    assert found == ["A", "B", "A", "C", "A", "B"]
    assert loaded == ["a", "b", "c", "b"] and list(kept) == ["a", "b"]


def test_a_voice_that_is_none_is_looked_for_once(worker, monkeypatch):
    asked = []

    def load(voices, place, crop_seed):
        asked.append(place)
        raise FileNotFoundError(f"there is no recording at {place}")

    monkeypatch.setattr(of_worker, "load_voice", load)
    found = lines(worker.outcomes([Row(index, f"{index}", "Hello.", "/nowhere.wav") for index in range(3)]))
    assert set(found.values()) == {"there is no recording at /nowhere.wav"} and asked == ["/nowhere.wav"]


def test_voices_that_a_job_cannot_read_again(worker, tmp_path):
    """Refuse a pipe without waiting for its writer."""
    os.mkfifo(tmp_path / "pipe.wav")
    rows = [Row(0, "a", "Hello.", str(tmp_path / "pipe.wav")), Row(1, "b", "Hello.", "/dev/zero")]
    for outcome in worker.outcomes(rows):
        assert "voice must be the path of a file or folder, and" in outcome.error
        assert outcome.error.endswith("is a pipe or a device")


def test_remarks(worker, tmp_path):
    """Tell changes to a voice and a text with each result."""
    samples, rate = soundfile.read(VOICE)
    long = np.tile(samples, 7 * rate // len(samples) + 1)
    soundfile.write(tmp_path / "two.wav", np.stack([long, long], axis=1), rate)
    rows = [Row(0, "a", "Hello \U0001f642 東京.", str(tmp_path / "two.wav")), Row(1, "b", "Hello.")]
    found = lines(worker.outcomes(rows))
    assert found[0][0]["remarks"] == [
        "2 channels mixed down to one",
        "only the first 6 s are used",
        "characters that the checkpoint does not know were left out: \U0001f642",
        "characters of other scripts were written in Latin letters: 東 京",
    ]
    assert "channels" not in str(found[1][0]["remarks"]) and "characters" not in str(found[1][0]["remarks"])


@pytest.mark.parametrize("strange", [OverflowError("x"), MemoryError("x"), RuntimeError("x"), RecursionError("x")])
def test_any_exception_of_a_row_fails_it_alone(worker, monkeypatch, strange):
    worker.voice(str(VOICE))

    def load(voices, place, crop_seed):
        raise strange

    with monkeypatch.context() as patched:
        patched.setattr(of_worker, "load_voice", load)
        known = worker.engine.voices._kept[str(VOICE)]
        patched.setattr(worker.engine.voices, "_kept", OrderedDict({str(VOICE): known}))
        rows = [Row(0, "a", "Hello.", "/bad.wav"), Row(1, "b", "Hello."), Row(2, "c", "Hello.", "/bad.wav")]
        found = lines(worker.outcomes(rows))
    said = f"{type(strange).__name__}: x"
    assert found[0] == found[2] == said and len(found[1]) == 2

    def request(**given):
        if given["id"][0].id == "a":
            raise strange
        return CandidateRequest(**given)

    with monkeypatch.context() as patched:
        patched.setattr(of_worker, "CandidateRequest", request)
        found = lines(worker.outcomes([Row(0, "a", "Hello."), Row(1, "b", "Hello.")]))
    assert found[0] == said and len(found[1]) == 2

    original = Outcome.of.__func__

    def of(cls, row, *arguments):
        if row.id == "a":
            raise strange
        return original(cls, row, *arguments)

    monkeypatch.setattr(Outcome, "of", classmethod(of))
    found = lines(worker.outcomes([Row(0, "a", "Hello."), Row(1, "b", "Hello.")]))
    assert found[0] == said and len(found[1]) == 2


def test_numbers_beyond_all_bounds(worker):
    """They fail their rows, and take neither memory nor the job."""
    beyond = [{"num_candidates": 10**12}, {"top_k": 10**22}, {"seed": 2**64}, {"max_new_tokens": 2**63}]
    rows = [Row(index, f"{index}", "Hello.", sampling=sampling) for index, sampling in enumerate(beyond)]
    found = lines(worker.outcomes([*rows, Row(9, "good", "Hello.")]))
    assert all(isinstance(found[row.index], str) for row in rows) and len(found[9]) == 2


def test_latents(rows):
    """Compare the latents of each kept candidate with the bare engine's."""
    settings = Settings(**QUICK, keep=2, latents=True)
    worker = Worker(settings)
    engine = CandidateEngine.from_pretrained("random", device="cpu", max_batch=4, max_new_tokens=5, latents=True)
    for outcome in worker.outcomes(rows[:3]):
        row = rows[outcome.row]
        voice, _ = worker.voice(row.voice)
        sampling = worker.settings.sampling(**row.sampling, seed=row.seed(0))
        request = CandidateRequest(text=row.text, conditioning=voice, sampling=sampling)
        (result,) = engine.generate(request, keep=2)
        assert [line["candidate"] for line in outcome.lines] == list(result.kept) and len(outcome.lines) == 2
        for line in outcome.lines:
            expected = result.latents[line["candidate"]][0]
            assert len(expected) and expected.std() > 0.1
            np.testing.assert_allclose(np.array(line["latents"]), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_no_voice():
    worker = Worker(Settings(**QUICK | {"voice": None}))
    (outcome,) = worker.outcomes([Row(0, "a", "Hello.")])
    assert outcome.error == "the row names no voice, and the job has none for such rows"


def test_a_worker_determines_its_open_settings(worker):
    found = Worker(Settings(checkpoint="random", device="cpu")).settings
    assert (found.max_new_tokens, found.device, found.batch_size) == (500, "cpu", 16)
    assert found.threads == torch.get_num_threads()
    asked = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "set_num_threads", asked.append)
        Worker(Settings(device="cpu", threads=3))
    assert asked == [3]
    assert worker.description()["settings"] == worker.settings.as_dict()
    assert "torch" in worker.description()["versions"]


def test_digest_of_a_checkpoint(worker, tmp_path):
    digest = worker.checkpoint_digest
    assert Worker(Settings(**QUICK, keep=3)).checkpoint_digest == digest and len(digest) == 32
    model, parts = worker.engine.model, worker.engine.processor
    checkpoint = Checkpoint("demo", model, parts.tokenizer, parts.feature_extractor)
    changes = (
        lambda numbers: numbers[1].add_(1e-6),  # a row
        lambda numbers: numbers[-1, -1].copy_(torch.nextafter(numbers[-1, -1], numbers[-1, -1] + 1)),  # a bit
        lambda numbers: numbers[:2].copy_(numbers[:2].flip(0)),  # the places of two rows
    )
    matrices = model.speech_decoder_model.lm_head.weight, next(model.text_encoder_model.parameters())
    for matrix, change in itertools.product(matrices, changes):
        before = matrix.detach().clone()
        with torch.no_grad():
            change(matrix)
            assert _digest_of(checkpoint) != digest
            matrix.copy_(before)
    assert _digest_of(checkpoint) == digest


def test_the_digest_covers_settings_words_and_shapes(worker):
    """Change a setting of the model, a word of the vocabulary, a feature, and swap or reshape tensors."""
    model, parts = worker.engine.model, worker.engine.processor
    tokenizer, extractor = parts.tokenizer, parts.feature_extractor
    config, vocabulary, state = model.config.to_dict(), tokenizer.get_vocab(), model.state_dict()
    features = extractor.to_dict()

    def digest(config=config, vocabulary=vocabulary, features=features, state=state):
        return _digest_of(
            Checkpoint(
                "demo",
                SimpleNamespace(config=SimpleNamespace(to_dict=lambda: config), state_dict=lambda: state),
                SimpleNamespace(get_vocab=lambda: vocabulary),
                SimpleNamespace(to_dict=lambda: features),
            )
        )

    one, other, *_ = [name for name, tensor in state.items() if tensor.ndim == 2]
    first, second, *_ = vocabulary
    swapped = state | {one: state[other], other: state[one]}
    changed = [
        digest(config=config | {"logit_scale_init_value": 0.5}),
        digest(config=config | {"decoder_config": config["decoder_config"] | {"layer_norm_epsilon": 0.5}}),
        digest(vocabulary=vocabulary | {first: vocabulary[second], second: vocabulary[first]}),
        digest(features=features | {"hop_length": 128}),
        digest(state={swapped_name(name, one, other): tensor for name, tensor in state.items()}),
        digest(state=swapped),
        digest(state=state | {one: state[one].reshape(-1)}),
    ]
    assert digest() == worker.checkpoint_digest and len({digest(), *changed}) == 1 + len(changed)
    passing = ("_name_or_path", "transformers_version", "dtype")
    assert digest(config=config | dict.fromkeys(passing, "other")) == digest()


def swapped_name(name, one, other):
    return {one: other, other: one}.get(name, name)


def test_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch sees no CUDA device here"):
        Worker(Settings(device="cuda"))


def test_too_little_memory(worker, rows, monkeypatch):
    def none(*_, **__):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(worker.engine, "generate", none)
    with pytest.raises(ValueError, match="too little memory for a single candidate"):
        list(worker.outcomes(rows))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), OSError(28, "No space left on device")])
def test_faults_of_the_job_are_no_rows(worker, rows, monkeypatch, error):
    """Count neither a result's nor a voice's system error as a row's failure."""
    failed = CandidateResult(worker._request(rows[0]), error=error)
    with monkeypatch.context() as patched:
        patched.setattr(worker.engine, "generate", lambda requests, keep: iter([failed]))
        with pytest.raises((ValueError, OSError), match=r"too little memory for a single candidate|No space left"):
            list(worker.outcomes(rows))

    def load(voices, place, crop_seed):
        raise error

    monkeypatch.setattr(of_worker, "load_voice", load)
    with pytest.raises((ValueError, OSError), match=r"too little memory for a single candidate|No space left"):
        list(worker.outcomes([Row(0, "a", "Hello.", "/bad.wav")]))
    assert "/bad.wav" not in worker.engine.voices._kept
