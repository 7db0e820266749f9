"""`ClvpFeatureExtractor` against transformers', and on input that stock refuses or mistakes."""

import copy
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from transformers.models.clvp.feature_extraction_clvp import ClvpFeatureExtractor as StockExtractor

from clvp_fast import ClvpFeatureExtractor, backend
from clvp_fast.models.clvp import feature_extraction
from clvp_fast.models.common import clips
from tests.data import data_path

RATE = 22050
NORMS = list(np.random.default_rng(0).uniform(-7, -2, 80))
SMALL = {"feature_size": 12, "n_fft": 256, "hop_length": 100, "default_audio_length": 1, "sampling_rate": 16000}


def noise(length, seed=0, loudness=0.1):
    return (np.random.default_rng(seed).standard_normal(length) * loudness).astype(np.float32)


def tone_over_silence(length):
    """Return a loud tone, whose spectrum far away from it is ten decades lower."""
    return (0.9 * np.sin(2 * np.pi * 440 * np.arange(length) / RATE)).astype(np.float32)


def both(clip, options=None, **call):
    options = {"mel_norms": NORMS} if options is None else options
    rate = options.get("sampling_rate", RATE)
    expected = StockExtractor(**options)(clip, sampling_rate=rate, **call)
    return expected, ClvpFeatureExtractor(**options)(clip, sampling_rate=rate, **call)


def assert_same(expected, got, atol=1e-5):
    assert list(got) == list(expected)
    assert type(got["input_features"]) is type(expected["input_features"])
    assert len(got["input_features"]) == len(expected["input_features"])
    for theirs, ours in zip(expected["input_features"], got["input_features"], strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
        assert error <= atol, error
    if "attention_mask" in expected:
        assert got["attention_mask"].dtype == expected["attention_mask"].dtype
        assert np.array_equal(got["attention_mask"], expected["attention_mask"])


CLIPS = {
    "noise": noise(40000),
    "long noise": noise(140001),
    "silence": np.zeros(30000, dtype=np.float32),
    "tone": tone_over_silence(50000),
    "quiet": noise(5000, loudness=1e-5),
    "clicks": np.where(np.arange(20011) % 1009 == 0, 1, 0).astype(np.float32),
    "float64": noise(3001).astype(np.float64),
    "short": noise(3),
    "one sample": noise(1),
}


@pytest.mark.parametrize("name", CLIPS)
def test_synthetic_clips_equal_transformers(name):
    assert_same(*both(CLIPS[name]))


@pytest.mark.parametrize("name", ["audio/1272-128104-0000.flac", "audio/lj_voice_1.flac", "audio/rain.flac"])
def test_recordings_equal_transformers(name):
    soundfile, soxr = pytest.importorskip("soundfile"), pytest.importorskip("soxr")
    norms = json.loads(data_path("clvp_tokenizer/mel_norms.json").read_text())
    samples, rate = soundfile.read(data_path(name))
    clip = soxr.resample(samples, rate, RATE)
    expected, got = both(clip, {"mel_norms": norms}, return_tensors="pt")
    assert got["input_features"].shape == (1, 80, 517)
    assert_same(expected, got)
    assert_same(*both(clip, {"mel_norms": norms}, padding=True, truncation=False))


def test_documented_values():
    """Expect the values that transformers' own test has for this recording."""
    soundfile, soxr = pytest.importorskip("soundfile"), pytest.importorskip("soxr")
    norms = json.loads(data_path("clvp_tokenizer/mel_norms.json").read_text())
    samples, rate = soundfile.read(data_path("audio/1272-128104-0000.flac"))
    extractor = ClvpFeatureExtractor(mel_norms=norms)
    got = extractor(soxr.resample(samples, rate, RATE), sampling_rate=RATE, return_tensors="pt")["input_features"]
    # fmt: off
    expected = [
        0.9271, 1.1405, 1.4419, 1.2470, 1.2438, 1.1787, 1.0595, 1.0570, 1.1070, 1.2205, 1.2376, 1.2997, 1.1131, 1.0843,
        1.0459, 1.1858, 1.2323, 1.3582, 1.3401, 1.3770, 1.4173, 1.3381, 1.2291, 1.0854, 1.2116, 1.1873, 1.2178, 1.2137,
        1.3001, 1.4274,
    ]
    # fmt: on
    assert got.shape == (1, 80, 517)
    assert np.abs(got[0, 0, :30].numpy() - expected).max() <= 1e-4


BATCH = [noise(length, seed=length) for length in (4000, 9001, 8000, 700)]


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"padding": True},
        {"padding": "longest", "pad_to_multiple_of": 300},
        {"padding": "longest", "max_length": 5000},
        {"padding": "longest", "max_length": 5000, "truncation": False},
        {"max_length": 5000},
        {"max_length": 5001, "pad_to_multiple_of": 128},
        {"max_length": 10000, "truncation": False},
        {"max_length": 600, "padding": False},
        {"return_attention_mask": False},
        {"return_attention_mask": None},
        {"return_tensors": "np"},
        {"return_tensors": "pt"},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_truncation_of_a_batch_equal_transformers(call, side):
    assert_same(*both(BATCH, SMALL | {"padding_side": side}, **call))


def test_padding_value_fills_up():
    options = SMALL | {"padding_value": 0.3}
    expected, got = both(BATCH, options)
    assert_same(expected, got)
    again = ClvpFeatureExtractor(**SMALL)(BATCH, sampling_rate=16000, padding_value=0.3)
    assert_same(expected, again)


@pytest.mark.parametrize("n_fft", [250, 256, 301])
def test_other_transforms_equal_transformers(n_fft):
    assert_same(*both(BATCH, SMALL | {"n_fft": n_fft, "hop_length": 33}))


def test_clips_of_several_lengths_without_padding_come_as_a_list():
    """Stock fails: it makes one array of them."""
    extractor = ClvpFeatureExtractor(**SMALL)
    got = extractor(BATCH, sampling_rate=16000, padding=False, truncation=False)
    for clip, features, mask in zip(BATCH, got["input_features"], got["attention_mask"], strict=True):
        alone = StockExtractor(**SMALL)(clip, sampling_rate=16000, padding=False, truncation=False)
        assert features.shape == (12, 1 + len(clip) // 100) and mask.shape == clip.shape
        assert np.abs(features - alone["input_features"][0]).max() <= 1e-5
    with pytest.raises(ValueError, match="clips of 700 to 9001 samples do not fit into one tensor: pass padding=True"):
        extractor(BATCH, sampling_rate=16000, padding=False, truncation=False, return_tensors="pt")


@pytest.mark.parametrize("convert", [list, torch.tensor, lambda clip: torch.tensor(clip, dtype=torch.float64)])
def test_kinds_of_input_give_the_same(convert):
    clip = noise(900)
    extractor = ClvpFeatureExtractor(**SMALL)
    expected = StockExtractor(**SMALL)([clip, clip[::-1]], sampling_rate=16000)
    ours = convert(clip), convert(clip[::-1].copy())
    for batch in (ours, list(ours), torch.stack(ours) if isinstance(ours[0], torch.Tensor) else np.array(ours)):
        assert_same(expected, extractor(batch, sampling_rate=16000))
    single = extractor(ours[0], sampling_rate=16000)["input_features"]
    assert len(single) == 1 and np.abs(single[0] - expected["input_features"][0]).max() <= 1e-5
    assert np.array_equal(extractor([ours[0]], sampling_rate=16000)["input_features"][0], single[0])


def test_half_precision_tensors_are_taken():
    clip = torch.tensor(noise(900)).bfloat16()
    extractor = ClvpFeatureExtractor(**SMALL)
    got, expected = (extractor(x, sampling_rate=16000)["input_features"][0] for x in (clip, clip.float()))
    assert np.array_equal(got, expected)


def test_int16_is_scaled():
    clip = noise(900)
    ints = np.round(clip * 32767).astype(np.int16)
    extractor = ClvpFeatureExtractor(**SMALL)
    expected = StockExtractor(**SMALL)(ints / 32768, sampling_rate=16000)
    for samples in (ints, torch.tensor(ints), [ints], torch.tensor(ints)[None]):
        assert_same(expected, extractor(samples, sampling_rate=16000))


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_int16_among_floats_and_with_padding(return_tensors):
    """Stay with int16 only where that loses nothing."""
    ints = [np.round(clip * 32767).astype(np.int16) for clip in BATCH]
    extractor = ClvpFeatureExtractor(**SMALL)
    floats = [clip / np.float32(32768) for clip in ints]
    for mixed in (ints, [ints[0], *floats[1:]], [floats[0], *ints[1:]]):
        for options in ({}, {"padding_value": 0.3}, {"padding": True}):
            got, expected = (
                extractor(batch, sampling_rate=16000, return_tensors=return_tensors, **options)
                for batch in (mixed, floats)
            )
            assert_same(expected, got, atol=1e-6)


def test_lengths_far_apart_are_not_filled_up_to_the_longest():
    lengths = [100000, 90000] + [200, 300, 1, 255] * 8
    groups = clips.similar_lengths(lengths)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert sum(len(group) * max(lengths[place] for place in group) for group in groups) < 2 * sum(lengths)
    assert clips.similar_lengths([5, 4, 3]) == [[0, 1, 2]]
    batch = [noise(length, seed=place) for place, length in enumerate(lengths)]
    extractor = ClvpFeatureExtractor(**SMALL, mel_norms=list(range(1, 13)))
    got = extractor(batch, sampling_rate=16000, padding=False, truncation=False)
    for clip, features, mask in zip(batch, got["input_features"], got["attention_mask"], strict=True):
        alone = extractor(clip, sampling_rate=16000, padding=False, truncation=False)
        assert features.flags.c_contiguous and np.array_equal(features, alone["input_features"][0])
        assert mask.all() and mask.dtype == np.int32 and mask.shape == clip.shape


def test_without_the_kernel_the_same():
    for call in ({}, {"padding": False, "truncation": False}):
        extractor = ClvpFeatureExtractor(**SMALL)
        got = extractor(BATCH, sampling_rate=16000, **call)["input_features"]
        with backend("torch"):
            expected = extractor(BATCH, sampling_rate=16000, **call)["input_features"]
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_changed_attributes_change_the_features():
    """Follow changes of attributes, also writes to an array or a list, though tables are kept."""
    extractor = ClvpFeatureExtractor(**SMALL, mel_norms=[2.0] * 12)

    def features(of):
        return of(BATCH[1], sampling_rate=16000, return_tensors="pt")["input_features"]

    first = features(extractor)
    assert torch.equal(features(extractor), first)
    extractor.mel_norms[0] = 4.0
    assert torch.equal(features(extractor)[:, 0], first[:, 0] / 2)
    extractor.mel_norms = None
    torch.testing.assert_close(features(extractor), first * 2)
    extractor.mel_filters[:] = 0
    assert torch.equal(features(extractor), torch.full_like(first, 1e-5).log())
    assert not torch.equal(features(ClvpFeatureExtractor(**SMALL)), features(extractor))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_after_use(again):
    extractor = ClvpFeatureExtractor(**SMALL)
    with torch.inference_mode():
        expected = extractor(BATCH, sampling_rate=16000)["input_features"]
    kept = feature_extraction._PARAMETERS[extractor][torch.device("cpu")][1]
    assert not any(isinstance(value, torch.Tensor) and value.is_inference() for value in kept.values())
    attributes = vars(extractor).keys()
    other = again(extractor)
    assert vars(other).keys() == attributes and other.to_dict() == extractor.to_dict()
    assert np.array_equal(other(BATCH, sampling_rate=16000)["input_features"], expected)


@pytest.fixture
def elsewhere(monkeypatch):
    """CPU tensors are taken as those of another device: what is done on a GPU is done with them."""
    monkeypatch.setattr(clips, "HOST", torch.device("meta"))


def as_int16(clip):
    return torch.from_numpy((clip * 32767).astype(np.int16))


ON_DEVICE = {
    "one clip": lambda batch: torch.from_numpy(batch[0]),
    "list": lambda batch: [torch.from_numpy(clip) for clip in batch],
    "list of float64": lambda batch: [torch.from_numpy(clip).double() for clip in batch],
    "rows": lambda batch: torch.from_numpy(np.stack([clip[:700] for clip in batch])),
    "int16": lambda batch: [as_int16(clip) for clip in batch],
    "rows of int16": lambda batch: torch.from_numpy(
        np.stack([(clip[:700] * 32767).astype(np.int16) for clip in batch])
    ),
    "mixed": lambda batch: [as_int16(batch[0]), torch.from_numpy(batch[1])],
}


@pytest.mark.parametrize(
    "call", [{}, {"padding": True}, {"padding_value": 0.3}, {"max_length": 500}, {"max_length": 800}], ids=str
)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ON_DEVICE)
def test_tensors_of_a_device_equal_the_host(request, kind, side, call):
    extractor = ClvpFeatureExtractor(**SMALL, padding_side=side)
    audio = ON_DEVICE[kind](BATCH)
    expected = extractor(audio, sampling_rate=16000, return_tensors="pt", **call)
    request.getfixturevalue("elsewhere")
    got = extractor(audio, sampling_rate=16000, return_tensors="pt", **call)
    assert_same(expected, got, atol=1e-4)


@pytest.mark.parametrize(
    ("audio", "error", "message"),
    [
        (
            [torch.ones(900), torch.tensor([0.0, np.nan] * 50)],
            ValueError,
            "clip 1 has samples that are NaN or infinite",
        ),
        (torch.tensor([0.0, -np.inf] * 50), ValueError, "^the audio has samples that are NaN or infinite"),
        (torch.tensor([[0.0] * 9, [0.0] * 9, [1e39] * 9], dtype=torch.float64), ValueError, "clip 2 has .* infinite"),
        ([torch.ones(5), torch.zeros(0)], ValueError, "clip 1 is empty"),
        (torch.zeros(2, 0), ValueError, "clip 0 is empty"),
        (torch.zeros(0, 5), ValueError, "no audio was given"),
        ([torch.zeros(1, 50)], ValueError, r"the audio must be mono, but has shape \(1, 50\)"),
        (torch.zeros(1, 2, 50), ValueError, r"audio must be mono, .*\(1, 2, 50\)"),
        (torch.tensor(1.0), ValueError, "the audio must be a sequence of samples, but has 0 dimensions"),
        (torch.zeros(2, 50, dtype=torch.int64), TypeError, "clip 0 has samples of type int64"),
        ([torch.zeros(50).bool()], TypeError, "the audio has samples of type bool"),
        (torch.zeros(50, dtype=torch.complex64), TypeError, "the audio has samples of type complex64"),
        ([torch.zeros(50), np.zeros(50)], ValueError, "clips lie on several devices, cpu, meta: pass `device`"),
    ],
    ids=str,
)
def test_bad_tensors_of_a_device(audio, error, message, elsewhere):
    with pytest.raises(error, match=message):
        ClvpFeatureExtractor(**SMALL)(audio, sampling_rate=16000, return_tensors="pt")


def test_a_bad_clip_of_a_device_is_named_by_its_place(elsewhere):
    """Also where clips are computed in groups."""
    batch = [torch.ones(90000), *[torch.ones(200)] * 8, torch.full((201,), torch.nan), torch.ones(202)]
    with pytest.raises(ValueError, match="clip 9 has samples that are NaN or infinite"):
        ClvpFeatureExtractor(**SMALL)(batch, sampling_rate=16000, padding=False, truncation=False)


def test_device_by_name():
    extractor = ClvpFeatureExtractor(**SMALL)
    expected = extractor(BATCH, sampling_rate=16000)
    for device in ("cpu", torch.device("cpu"), "cpu:0"):
        assert_same(expected, extractor(BATCH, sampling_rate=16000, device=device), atol=0)


def test_wrong_sampling_rate():
    with pytest.raises(ValueError, match="takes audio of 22050 Hz, but sampling_rate=16000 was given: resample"):
        ClvpFeatureExtractor()(noise(100), sampling_rate=16000)


def test_missing_sampling_rate_warns(caplog):
    with caplog.at_level(logging.WARNING):
        ClvpFeatureExtractor(**SMALL)(noise(100))
    assert "Pass `sampling_rate`" in caplog.text and "16000 Hz" in caplog.text


def test_unknown_options_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        ClvpFeatureExtractor(**SMALL)(noise(100), sampling_rate=16000, do_dance=True)
    assert "does not know and ignores: do_dance." in caplog.text


@pytest.mark.parametrize(
    ("audio", "error", "message"),
    [
        ([], ValueError, "no audio was given"),
        (np.zeros((0, 5)), ValueError, "no audio was given"),
        (np.zeros(0), ValueError, "the audio is empty"),
        ([noise(5), np.zeros(0)], ValueError, "clip 1 is empty"),
        ([noise(5), np.array([0, np.nan])], ValueError, "clip 1 has samples that are NaN or infinite"),
        (torch.tensor([0.0, np.inf]), ValueError, "the audio has samples that are NaN or infinite"),
        ([np.zeros((2, 50))], ValueError, r"the audio must be mono, but has shape \(2, 50\): mix the channels down"),
        ([noise(5), torch.zeros(1, 50)], ValueError, r"clip 1 must be mono, but has shape \(1, 50\)"),
        (np.zeros((1, 2, 50)), ValueError, r"audio must be mono, \[time\] or \[batch, time\], .*\(1, 2, 50\)"),
        (np.array(1.0), ValueError, "the audio must be a sequence of samples, but has 0 dimensions"),
        (np.zeros(50, dtype=np.int32), TypeError, "the audio has samples of type int32, .* pass floats in .* or int16"),
        (np.zeros(50, dtype=np.uint8), TypeError, "samples of type uint8"),
        (torch.zeros(2, 50, dtype=torch.int64), TypeError, "clip 0 has samples of type int64"),
        ([1, 2, 3], TypeError, "samples of type int64"),
        (np.zeros(50, dtype=np.complex64), TypeError, "samples of type complex64"),
        (np.zeros(50, dtype=bool), TypeError, "samples of type bool"),
        ([[0.0, [1.0]]], ValueError, "the audio is no plain sequence of samples"),
        ("a.wav", TypeError, "audio must be an array, a tensor or a list of samples, not str"),
        (None, TypeError, "not NoneType"),
    ],
    ids=str,
)
def test_bad_audio(audio, error, message):
    with pytest.raises(error, match=message):
        ClvpFeatureExtractor(**SMALL)(audio, sampling_rate=16000)


def test_bad_options():
    with pytest.raises(ValueError, match="max_length must be at least 1 sample, not 0"):
        ClvpFeatureExtractor(**SMALL)(noise(50), sampling_rate=16000, max_length=0)
    with pytest.raises(ValueError, match="mel_norms has 3 values, but feature_size is 80"):
        ClvpFeatureExtractor(mel_norms=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "options", [{}, {"mel_norms": NORMS}, SMALL | {"padding_side": "left"}], ids=["", "norms", "small"]
)
def test_attributes_and_saved_json_equal_transformers(options, tmp_path):
    stock, ours = StockExtractor(**options), ClvpFeatureExtractor(**options)
    assert ours.to_dict() == stock.to_dict()
    assert vars(ours).keys() == vars(stock).keys()
    assert np.array_equal(ours.mel_filters, stock.mel_filters)
    for saved, saver in (("stock", stock), ("ours", ours)):
        saver.save_pretrained(tmp_path / saved)
        for cls in (StockExtractor, ClvpFeatureExtractor):
            loaded = cls.from_pretrained(tmp_path / saved)
            assert type(loaded) is cls and loaded.to_dict() == stock.to_dict()
    files = [(tmp_path / saved / "preprocessor_config.json").read_text() for saved in ("stock", "ours")]
    assert files[0] == files[1]
