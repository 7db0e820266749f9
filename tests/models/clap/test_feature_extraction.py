"""`ClapFeatureExtractor`: transformers' features, its random draws, and what a seed and bad input do."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers.models.clap.feature_extraction_clap import ClapFeatureExtractor as StockExtractor

import clvp_fast
from clvp_fast import ClapFeatureExtractor, ClvpFeatureExtractor
from tests.data import data_path

RATE = 8000
# transformers shrinks to 64 mel channels, however many there are.
SMALL = dict(
    feature_size=64, sampling_rate=RATE, hop_length=80, max_length_s=1, fft_window_size=512, frequency_max=3500
)
# Shorter than the second that is the maximum, as long, a little longer (as many frames), longer, three times as long.
LENGTHS = (700, 3000, 8000, 8050, 8100, 8700, 25000)
MODES = [(t, p) for t in ("fusion", "rand_trunc") for p in ("repeatpad", "repeat", "pad")]


def clip(length: int, seed: int = 0) -> np.ndarray:
    """Return a rising tone in noise, which differs at any two places."""
    place = np.arange(length) / RATE
    noise = np.random.default_rng(seed).standard_normal(length)
    return (0.3 * np.sin(2 * np.pi * 200 * place * (1 + place)) + 0.02 * noise).astype(np.float32)


CLIPS = [clip(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.fixture
def stock():
    return StockExtractor(**SMALL)


@pytest.fixture
def ours():
    return ClapFeatureExtractor(**SMALL)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert type(found[name]) is type(expected[name]), name
    mine, theirs = np.asarray(found["is_longer"]), np.asarray(expected["is_longer"])
    assert mine.dtype == theirs.dtype == bool and np.array_equal(mine, theirs)
    mine, theirs = np.asarray(found["input_features"]), np.asarray(expected["input_features"])
    assert mine.dtype == theirs.dtype == np.float32 and mine.shape == theirs.shape
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("return_tensors", ["np", "pt", None])
@pytest.mark.parametrize(("truncation", "padding"), MODES)
def test_equal_transformers(stock, ours, truncation, padding, return_tensors):
    call = dict(truncation=truncation, padding=padding, sampling_rate=RATE, return_tensors=return_tensors)
    found = []
    for extractor in (stock, ours):
        np.random.seed(5)
        found.append(extractor(CLIPS, **call))
    assert_same(found[1], found[0])


def test_as_many_draws_as_transformers(stock, ours):
    """Compare the caller's next draw from numpy's generator."""
    for truncation, _ in MODES[::3]:
        for batch in (CLIPS, CLIPS[:3]):
            following = []
            for extractor in (stock, ours):
                np.random.seed(7)
                extractor(batch, truncation=truncation, sampling_rate=RATE)
                following.append(np.random.random())
            assert following[0] == following[1]


@pytest.mark.parametrize(("truncation", "norm"), [("fusion", None), ("rand_trunc", "slaney")])
def test_the_mel_scale_goes_with_the_truncation(ours, truncation, norm):
    """Find a tone in one filter of each scale: HTK without norm for fusion, slaney's with its norm for rand_trunc."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    filters = mel_filter_bank(257, 64, 0, 3500, RATE, norm=norm, mel_scale=norm or "htk")
    options = dict(frame_length=512, hop_length=80, power=2.0, mel_filters=filters, log_mel="dB")
    expected = spectrogram(CLIPS[2], window_function(512, "hann"), **options).T
    found = ours(CLIPS[2], truncation=truncation, sampling_rate=RATE)["input_features"][0]
    assert len(found) == {"fusion": 4, "rand_trunc": 1}[truncation]
    for mel in found:
        np.testing.assert_allclose(mel, expected, atol=1e-3)


@pytest.mark.parametrize("limit", [500, 8080, 20000])
def test_max_length(stock, ours, limit):
    for truncation, padding in MODES[::2]:
        found = []
        for extractor in (stock, ours):
            np.random.seed(1)
            found.append(extractor(CLIPS, truncation, padding, limit, RATE, "np"))
        assert_same(found[1], found[0])


def test_forms_of_audio(ours):
    """Get the same features from arrays, lists of floats, tensors, a 2-D batch, other types and strides."""
    expected = ours([CLIPS[1], CLIPS[1][::-1]], sampling_rate=RATE, return_tensors="np", seed=0)["input_features"]
    backwards = CLIPS[1][::-1]
    frozen = CLIPS[1].copy()
    frozen.flags.writeable = False
    for batch in (
        [CLIPS[1].tolist(), backwards.tolist()],
        np.stack([CLIPS[1], backwards]),
        torch.tensor(np.stack([CLIPS[1], backwards])),
        [frozen.astype(np.float64), torch.tensor(backwards.copy())],
        [frozen, backwards],
    ):
        np.testing.assert_array_equal(
            ours(batch, sampling_rate=RATE, return_tensors="np", seed=0)["input_features"], expected
        )
    whole = (CLIPS[1] * 32768).round().astype(np.int16)
    found = ours(whole, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    np.testing.assert_allclose(found, ours(whole / 32768, sampling_rate=RATE)["input_features"][0], atol=1e-4)


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
def test_with_a_seed_each_clip_gives_what_it_gives_alone(stock, ours, truncation):
    state = np.random.get_state()[1].tolist()
    together = ours(CLIPS, truncation, sampling_rate=RATE, return_tensors="np", seed=11)
    turned = ours(CLIPS[::-1], truncation, sampling_rate=RATE, return_tensors="np", seed=11)
    assert np.random.get_state()[1].tolist() == state  # the global generator is left alone
    for place, samples in enumerate(CLIPS):
        np.random.seed(11)
        alone = stock([samples], truncation, sampling_rate=RATE, return_tensors="np")
        row = {name: value[place : place + 1] for name, value in together.items()}
        assert_same(row, {**alone})
        np.testing.assert_array_equal(turned["input_features"][-1 - place], together["input_features"][place])
    other = ours(CLIPS, truncation, sampling_rate=RATE, return_tensors="np", seed=12)["input_features"]
    assert not np.array_equal(other[-1], together["input_features"][-1])
    np.testing.assert_array_equal(other[0], together["input_features"][0])  # nothing is drawn of a short clip


def test_without_a_seed_draws_differ(ours):
    first, second = (ours(CLIPS[-1], sampling_rate=RATE)["input_features"][0] for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert not np.array_equal(first[1:], second[1:])


def test_one_of_short_clips_is_called_longer(ours):
    flags = np.array([ours(CLIPS[:3], sampling_rate=RATE)["is_longer"] for _ in range(40)])[..., 0]
    assert (flags.sum(1) == 1).all() and flags.any(0).all()
    assert not np.array(ours(CLIPS[:3], "rand_trunc", sampling_rate=RATE)["is_longer"]).any()


def test_padding_as_calls_give_it(ours):
    def features(padding):
        return ours(CLIPS[1], padding=padding, sampling_rate=RATE)["input_features"][0]

    for same in (None, True):
        np.testing.assert_array_equal(features(same), features("repeatpad"))
    np.testing.assert_array_equal(features(False), features("pad"))
    assert not np.array_equal(features("pad"), features("repeat"))
    ours.padding = "repeat"
    np.testing.assert_array_equal(features(None), features("repeat"))


def test_any_number_of_mel_channels():
    """Use a long clip and other than 64 channels, where transformers fails."""
    found = ClapFeatureExtractor(**SMALL | dict(feature_size=20))(CLIPS, sampling_rate=RATE, return_tensors="np")
    assert found["input_features"].shape == (len(CLIPS), 4, 101, 20)
    whole, crops = found["input_features"][-1, 0], found["input_features"][-1, 1:]
    assert abs(whole.mean() - crops.mean()) < 1 and np.ptp(whole) > 20


def test_many_clips_in_groups(ours, monkeypatch):
    expected = ours(CLIPS, sampling_rate=RATE, return_tensors="pt", seed=0)["input_features"]
    monkeypatch.setattr("clvp_fast.models.clap.feature_extraction._GROUP", 2)
    assert torch.equal(ours(CLIPS, sampling_rate=RATE, return_tensors="pt", seed=0)["input_features"], expected)


def test_saved_files_are_the_same(tmp_path, stock, ours):
    assert ours.to_dict() == stock.to_dict() and ours.to_json_string() == stock.to_json_string()
    assert ClapFeatureExtractor().to_dict() == StockExtractor().to_dict()
    for writer, reader in ((stock, ClapFeatureExtractor), (ours, StockExtractor), (ours, ClapFeatureExtractor)):
        writer.save_pretrained(tmp_path)
        read = reader.from_pretrained(tmp_path)
        assert json.loads(read.to_json_string()) == json.loads(stock.to_json_string())
        np.testing.assert_array_equal(read.mel_filters_slaney, stock.mel_filters_slaney)


def test_changed_filters_are_used(ours):
    before = ours(CLIPS[2], sampling_rate=RATE)["input_features"][0]
    ours.mel_filters = ours.mel_filters * 2
    louder = ours(CLIPS[2], sampling_rate=RATE)["input_features"][0]
    heard = before > -100
    np.testing.assert_allclose(louder[heard], before[heard] + 10 * np.log10(2), atol=1e-4)


def test_the_torch_path_gives_the_same(ours):
    expected = ours(CLIPS, sampling_rate=RATE, return_tensors="pt", seed=0)["input_features"]
    with clvp_fast.backend("torch"):
        found = ours(CLIPS, sampling_rate=RATE, return_tensors="pt", seed=0)["input_features"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_real_speech_at_full_size():
    from clvp_fast.audio import load_audio

    samples, _ = load_audio(sorted(data_path("audio").glob("*.flac"))[0], 48000)
    samples = np.tile(samples, 1 + 600_000 // len(samples))[:600_000]  # 12.5 s
    for truncation in ("fusion", "rand_trunc"):
        found = []
        for extractor in (StockExtractor(), ClapFeatureExtractor()):
            np.random.seed(0)
            batch = [samples, samples[:100_000]]
            found.append(extractor(batch, truncation, sampling_rate=48000, return_tensors="np"))
        assert found[0]["input_features"].shape[2:] == (1001, 64)
        assert_same(found[1], found[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(sampling_rate=16000), ValueError, r"takes audio of 8000 Hz, but sampling_rate=16000 was given: resample"),
        (dict(truncation="middle"), ValueError, "truncation must be one of 'fusion', 'rand_trunc', not 'middle'"),
        (dict(truncation=True), ValueError, "truncation must be one of"),
        (dict(padding="short"), ValueError, "padding must be one of 'repeatpad', 'repeat', 'pad', not 'short'"),
        (dict(max_length=-1), ValueError, "max_length must be at least 1 sample, not -1"),
        (dict(raw_speech=[]), ValueError, "no audio was given"),
        (dict(raw_speech=[CLIPS[0], []]), ValueError, "clip 1 is empty"),
        (dict(raw_speech=np.zeros((2, 2, 5))), ValueError, "audio must be mono"),
        (dict(raw_speech=[CLIPS[0], np.zeros((2, 50))]), ValueError, "clip 1 must be mono"),
        (dict(raw_speech=np.array([0.1, np.nan])), ValueError, "the audio has samples that are NaN or infinite"),
        (dict(raw_speech=np.arange(50)), TypeError, "samples of type int64, whose scale is not known"),
        (dict(raw_speech="a.wav"), TypeError, "not str: load it first"),
    ],
)
def test_bad_input(ours, changes, error, message):
    with pytest.raises(error, match=message):
        ours(**dict(raw_speech=CLIPS[0], sampling_rate=RATE) | changes)


def test_warnings(ours, caplog):
    with caplog.at_level(logging.WARNING):
        ours(CLIPS[0], do_dance=True)
    assert "Pass `sampling_rate`" in caplog.text and "8000 Hz" in caplog.text
    assert "does not know and ignores: do_dance." in caplog.text


@pytest.mark.parametrize("padding", ["max_length", "longest", "do_not_pad", False])
@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
def test_paddings_of_other_extractors_mean_silence(stock, ours, padding, truncation):
    found = []
    for extractor in (stock, ours):
        np.random.seed(5)
        found.append(extractor(CLIPS, padding=padding, truncation=truncation, sampling_rate=RATE, return_tensors="np"))
    # transformers 5.17 knew no booleans here, and took False for the extractor's own.
    if padding is not False or "bool" in str(type(stock).__call__.__annotations__["padding"]):
        assert_same(found[1], found[0])
    repeated = ours(CLIPS, seed=1, sampling_rate=RATE, return_tensors="np")["input_features"]
    silent = ours(CLIPS, seed=1, padding=padding, sampling_rate=RATE, return_tensors="np")["input_features"]
    assert np.abs(repeated - silent).max() > 1
    kept = ClapFeatureExtractor(**SMALL | dict(padding="max_length"))  # as a setting of the extractor too
    assert np.array_equal(silent, kept(CLIPS, seed=1, sampling_rate=RATE, return_tensors="np")["input_features"])


@pytest.fixture(params=["bfloat16", "float16", "float64", "meta"])
def another_default(request):
    """Set another default dtype, or another default device, of torch."""
    if request.param == "meta":
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)
    else:
        torch.set_default_dtype(getattr(torch, request.param))
        yield
        torch.set_default_dtype(torch.float32)


# Made before any default is changed.
AS_INT16 = [(clip * 32767).astype(np.int16) for clip in CLIPS]
HEARD = {
    f"{name} of {kind}": (make, clips)
    for name, make in {"clap": lambda: ClapFeatureExtractor(**SMALL), "clvp": ClvpFeatureExtractor}.items()
    for kind, clips in {"floats": CLIPS, "int16": AS_INT16, "lists": [CLIPS[0].tolist()]}.items()
}


def heard(case: str) -> np.ndarray:
    make, clips = HEARD[case]
    extractor = make()
    options = dict(seed=1) if case.startswith("clap") else {}
    rate = extractor.sampling_rate
    return extractor(clips, sampling_rate=rate, return_tensors="pt", **options)["input_features"].numpy()


EXPECTED = {case: heard(case) for case in HEARD}


@pytest.mark.usefixtures("another_default")
@pytest.mark.parametrize("case", HEARD)
def test_defaults_of_torch_change_nothing(case):
    assert EXPECTED[case].std() > 0.1
    assert np.array_equal(heard(case), EXPECTED[case])
