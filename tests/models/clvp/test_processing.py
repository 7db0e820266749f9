"""`ClvpProcessor`: results, options, and directories exchanged with transformers."""

import numpy as np
import pytest
import torch
from transformers.models.clvp.feature_extraction_clvp import ClvpFeatureExtractor as StockExtractor
from transformers.models.clvp.processing_clvp import ClvpProcessor as StockProcessor
from transformers.models.clvp.tokenization_clvp import ClvpTokenizer as StockTokenizer

from clvp_fast import ClvpFeatureExtractor, ClvpProcessor, ClvpTokenizer
from tests.models.clvp.test_feature_extraction import noise
from tests.models.clvp.test_tokenization import small_vocabulary

RATE = 16000
OPTIONS = {"feature_size": 12, "n_fft": 256, "hop_length": 100, "default_audio_length": 1, "sampling_rate": RATE}
TEXTS = ["the bells", "one, 2 and 3rd none at all!"]
CLIPS = [noise(3000), noise(9000, seed=1)]


@pytest.fixture
def stock(tmp_path):
    return StockProcessor(StockExtractor(**OPTIONS), StockTokenizer(*small_vocabulary(tmp_path)))


@pytest.fixture
def processor(tmp_path):
    return ClvpProcessor(ClvpFeatureExtractor(**OPTIONS), ClvpTokenizer(*small_vocabulary(tmp_path)))


def assert_same(expected, got):
    assert type(got).__name__ == type(expected).__name__ and list(got) == list(expected)
    for name in expected:
        assert type(got[name]) is type(expected[name]), name
        for theirs, ours in zip(expected[name], got[name], strict=True):
            np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-5)


@pytest.mark.parametrize("audio_name", ["audio", "raw_speech"])
@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_text_and_audio_equal_transformers(stock, processor, audio_name, return_tensors):
    for text, clip in ((TEXTS[0], CLIPS[0]), ([TEXTS[0]], [CLIPS[0]]), (TEXTS[:1] * 2, CLIPS)):
        call = {"text": text, audio_name: clip, "sampling_rate": RATE, "return_tensors": return_tensors}
        got = processor(**call)
        assert_same(stock(**call), got)
        assert list(got) == ["input_ids", "attention_mask", "input_features"]
        assert np.shape(got["attention_mask"]) == np.shape(got["input_ids"])


def test_text_alone_and_audio_alone_equal_transformers(stock, processor):
    for call in (
        {"text": TEXTS, "padding": True, "return_tensors": "pt"},
        {"text": TEXTS, "padding": "max_length", "max_length": 12, "truncation": True},
        {"text": TEXTS[0], "return_attention_mask": False},
        {"text": TEXTS[0], "text_kwargs": {"return_special_tokens_mask": True}},
        {"audio": CLIPS, "sampling_rate": RATE, "return_tensors": "pt"},
        {"audio": CLIPS, "sampling_rate": RATE, "padding": True, "max_length": 5000},
        {"audio": CLIPS[0], "sampling_rate": RATE, "return_attention_mask": False},
        {"audio": CLIPS[0], "audio_kwargs": {"sampling_rate": RATE, "max_length": 900}},
    ):
        assert_same(stock(**call), processor(**call))


def test_padding_of_the_texts_leaves_the_audio(stock, processor):
    call = {"text": TEXTS, "audio": CLIPS, "sampling_rate": RATE, "return_tensors": "pt"}
    expected = processor(audio=CLIPS, sampling_rate=RATE, return_tensors="pt")["input_features"]
    for options in ({"padding": True}, {"padding": True, "truncation": True, "max_length": 8, "pad_to_multiple_of": 4}):
        got = processor(**call, **options)
        assert torch.equal(got["input_features"], expected) and expected.shape == (2, 12, 161)
        tokens = processor.tokenizer(TEXTS, return_tensors="pt", **options)
        assert torch.equal(got["input_ids"], tokens["input_ids"])
        assert torch.equal(got["attention_mask"], tokens["attention_mask"])
    one = {**call, "text": TEXTS[:1], "audio": CLIPS[:1]}
    assert stock(**one, padding=True)["input_features"].shape[-1] == 31  # 3000 samples, no longer one second
    got = processor(**one, padding=True, audio_kwargs={"max_length": 4000})
    assert got["input_features"].shape[-1] == 41


def test_inputs_by_position(stock, processor):
    expected = processor(text=TEXTS[0])
    assert dict(processor(TEXTS[0])) == dict(expected) and len(expected["input_ids"]) > 5
    assert not stock(TEXTS[0])
    assert dict(processor(TEXTS)) == dict(processor(text=TEXTS))
    both = processor(text=TEXTS[0], audio=CLIPS[0], sampling_rate=RATE)
    for inputs in ((TEXTS[0], CLIPS[0]), (CLIPS[0], TEXTS[0])):
        assert_same(both, processor(*inputs, sampling_rate=RATE))
    assert_same(both, processor(CLIPS[0], text=TEXTS[0], sampling_rate=RATE))
    assert_same(both, processor(TEXTS[0], audio=list(CLIPS[0]), sampling_rate=RATE))


def test_tokenizer_options_reach_the_tokenizer(processor):
    words = processor(text=[["the", "bells"], ["one"]], is_split_into_words=True)["input_ids"]
    assert words == processor(text=[" the bells", " one"])["input_ids"]
    assert processor(TEXTS[0], add_prefix_space=True)["input_ids"] == processor(" " + TEXTS[0])["input_ids"]


def test_device_reaches_the_features_alone(processor, monkeypatch):
    given = []
    extract = ClvpFeatureExtractor.__call__

    def spy(self, audio, **options):
        given.append(options.get("device"))
        return extract(self, audio, **options)

    monkeypatch.setattr(ClvpFeatureExtractor, "__call__", spy)
    for options in ({"device": "cpu"}, {"audio_kwargs": {"device": "cpu"}}):
        for text in (None, TEXTS[0]):
            got = processor(text=text, audio=CLIPS[0], sampling_rate=RATE, return_tensors="pt", **options)
            assert got["input_features"].shape == (1, 12, 161)
    assert given == ["cpu"] * 4


def test_audio_files_are_loaded_at_the_rate_of_the_features(processor, monkeypatch):
    def fetch_audio(self, path, sampling_rate=None):
        assert sampling_rate == RATE
        return CLIPS[0] if path == "a.wav" else [CLIPS[("a.wav", "b.wav").index(name)] for name in path]

    monkeypatch.setattr(ClvpFeatureExtractor, "fetch_audio", fetch_audio)
    assert_same(processor(audio=CLIPS[0], sampling_rate=RATE), processor(audio="a.wav"))
    assert_same(processor(audio=CLIPS, sampling_rate=RATE), processor(text=None, audio=["a.wav", "b.wav"]))


@pytest.mark.parametrize(
    ("inputs", "call", "error", "message"),
    [
        ((), {}, ValueError, "neither text nor audio was given"),
        ((), {"sampling_rate": RATE}, ValueError, "neither text nor audio was given"),
        (("a",), {"text": "b"}, ValueError, "text was given more than once"),
        (("a", "b"), {}, ValueError, "text was given more than once: pass several texts as one list"),
        ((), {"audio": CLIPS[0], "raw_speech": CLIPS[0]}, ValueError, "audio was given more than once"),
        ((CLIPS[0],), {"audio": CLIPS[0]}, ValueError, "audio was given more than once"),
        ((), {"text": 5}, TypeError, "text must be a string or a list of strings, not int '5'"),
        ((), {"text": ["a", None]}, TypeError, "text must be a string or a list of strings, not list"),
        ((), {"text": []}, TypeError, "text must be a string or a list of strings, not list"),
        ((), {"text": [["a", "b"], ["c"]]}, TypeError, "lists of words need is_split_into_words=True"),
        ((), {"audio": CLIPS[0], "sampling_rate": 7}, ValueError, "takes audio of 16000 Hz, but sampling_rate=7"),
        ((), {"text": "a", "padding": True, "text_kwargs": {"padding": True}}, ValueError, "padding was given twice"),
    ],
)
def test_bad_calls(processor, inputs, call, error, message):
    with pytest.raises(error, match=message):
        processor(*inputs, **call)


def test_decode(stock, processor):
    ids = processor(text=TEXTS)["input_ids"]
    assert processor.batch_decode(ids) == stock.batch_decode(ids)
    for options in ({}, {"skip_special_tokens": True, "clean_up_tokenization_spaces": True}):
        assert processor.decode(ids[0], **options) == stock.decode(ids[0], **options)
    assert processor.model_input_names == stock.model_input_names


def test_directories_load_both_ways(stock, processor, tmp_path):
    call = {"text": TEXTS[0], "audio": CLIPS[0], "sampling_rate": RATE, "return_tensors": "pt"}
    expected = stock(**call)
    for name, saver in (("stock", stock), ("ours", processor)):
        saver.save_pretrained(tmp_path / name)
        ours = ClvpProcessor.from_pretrained(tmp_path / name)
        assert type(ours) is ClvpProcessor
        assert type(ours.tokenizer) is ClvpTokenizer and type(ours.feature_extractor) is ClvpFeatureExtractor
        assert ours.feature_extractor.to_dict() == stock.feature_extractor.to_dict()
        assert_same(expected, ours(**call))
    theirs = StockProcessor.from_pretrained(tmp_path / "ours")
    assert type(theirs.tokenizer) is StockTokenizer and type(theirs.feature_extractor) is StockExtractor
    assert_same(expected, theirs(**call))
    saved = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("stock", "ours")]
    assert saved[0] == saved[1]


def test_directory_of_parts_saved_one_by_one(stock, tmp_path):
    """Read the layout of older checkpoints: preprocessor_config.json beside the tokenizer's files."""
    stock.tokenizer.save_pretrained(tmp_path / "parts")
    stock.feature_extractor.save_pretrained(tmp_path / "parts")
    loaded = ClvpProcessor.from_pretrained(str(tmp_path / "parts"))
    assert loaded.feature_extractor.to_dict() == stock.feature_extractor.to_dict()
    assert loaded(text="the")["input_ids"] == stock(text="the")["input_ids"]


def test_from_pretrained_options_go_where_they_belong(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    norms = list(np.linspace(-5, -3, 12))
    loaded = ClvpProcessor.from_pretrained(tmp_path / "saved", text_cleaning="tortoise", mel_norms=norms)
    assert loaded.tokenizer.text_cleaning == "tortoise" and loaded.feature_extractor.mel_norms == norms
    loaded.save_pretrained(tmp_path / "again")
    again = ClvpProcessor.from_pretrained(tmp_path / "again")
    assert again.tokenizer.text_cleaning == "tortoise" and again.feature_extractor.mel_norms == norms
    assert "mel_norms" not in (tmp_path / "again" / "tokenizer_config.json").read_text()


def test_missing_directory(tmp_path):
    with pytest.raises(OSError, match="absent"):
        ClvpProcessor.from_pretrained(tmp_path / "absent", local_files_only=True)
