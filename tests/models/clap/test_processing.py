"""`ClapProcessor`: results, options, and directories exchanged with transformers."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import RobertaTokenizerFast
from transformers.models.clap.feature_extraction_clap import ClapFeatureExtractor as StockExtractor
from transformers.models.clap.processing_clap import ClapProcessor as StockProcessor

import clvp_fast
from clvp_fast import ClapFeatureExtractor, ClapModel, ClapProcessor
from tests.models.clap.builders import composite_config
from tests.models.clap.test_feature_extraction import CLIPS, RATE, SMALL

TEXTS = ["a dog barks", "the sound of rain on a roof"]


def tokenizer(folder):
    """Give a byte-level tokenizer of RoBERTa's kind, with 300 tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    trained.model.save(str(folder))
    return RobertaTokenizerFast.from_pretrained(folder)


@pytest.fixture
def stock(tmp_path):
    return StockProcessor(StockExtractor(**SMALL), tokenizer(tmp_path))


@pytest.fixture
def ours(tmp_path):
    return ClapProcessor(ClapFeatureExtractor(**SMALL), tokenizer(tmp_path))


def assert_same(found, expected):
    assert type(found).__name__ == type(expected).__name__ and list(found) == list(expected)
    for name in expected:
        assert type(found[name]) is type(expected[name]), name
        for mine, theirs in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(np.asarray(mine, np.float64), np.asarray(theirs, np.float64), atol=1e-3)


@pytest.mark.parametrize(
    "call",
    [
        dict(text=TEXTS, audio=CLIPS, sampling_rate=RATE, return_tensors="pt", text_kwargs=dict(padding=True)),
        dict(text=TEXTS[0], audio=CLIPS[0], sampling_rate=RATE, return_tensors="np"),
        dict(text=TEXTS, audio=CLIPS, audio_kwargs=dict(sampling_rate=RATE, truncation="rand_trunc", padding="pad")),
        dict(text=TEXTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"),
        dict(text=TEXTS[0], return_special_tokens_mask=True),
        dict(audio=CLIPS, sampling_rate=RATE, truncation="rand_trunc", padding="repeat", return_tensors="pt"),
        dict(audio=CLIPS, sampling_rate=RATE, max_length=3000, return_tensors="pt"),
    ],
)
def test_equal_transformers(stock, ours, call):
    found = []
    for processor in (stock, ours):
        np.random.seed(3)
        found.append(processor(**call))
    if "text" in call and "audio" not in call:  # the tokenizer's own class of result
        found = [dict(result) for result in found]
    assert_same(found[1], found[0])


def test_padding_of_the_texts_leaves_the_audio(ours):
    """Do as transformers 5.23; 5.17 fills up the audio with silence."""
    found = ours(text=TEXTS, audio=CLIPS[0], sampling_rate=RATE, padding=True)
    expected = ours.feature_extractor(CLIPS[0], padding="repeatpad", sampling_rate=RATE)
    np.testing.assert_array_equal(found["input_features"], expected["input_features"])
    assert len({len(ids) for ids in found["input_ids"]}) == 1


def test_options_go_where_they_belong(ours):
    """Give the extractor its own options and the seed, which transformers passes to the tokenizer."""
    call = dict(text=TEXTS, audio=CLIPS, sampling_rate=RATE, seed=4, return_tensors="pt")
    found = ours(**call, truncation="rand_trunc", padding="repeat", text_kwargs=dict(padding=True))
    expected = ours.feature_extractor(CLIPS, "rand_trunc", "repeat", None, RATE, "pt", seed=4)
    assert torch.equal(found["input_features"], expected["input_features"])
    assert found["attention_mask"].sum(1).tolist() == [len(ids) for ids in ours(text=TEXTS)["input_ids"]]
    cut = ours(text=TEXTS, audio=CLIPS, sampling_rate=RATE, truncation=True, max_length=4)
    assert max(map(len, cut["input_ids"])) == 4 and len(cut["input_features"][0][0]) == 101


def test_audio_files(ours):
    from tests.test_readme import ROOT

    path = str(ROOT / "examples/voice.flac")
    ours.feature_extractor.fetch_audio = lambda paths, sampling_rate: CLIPS[0] if isinstance(paths, str) else CLIPS[:2]
    expected = ours(audio=CLIPS[:2], sampling_rate=RATE, seed=0)["input_features"]
    np.testing.assert_array_equal(ours(audio=[path, path], seed=0)["input_features"], expected)
    np.testing.assert_array_equal(ours(audio=path, seed=0)["input_features"], expected[:1])


def test_directories_both_ways(tmp_path, stock, ours):
    for writer, reader in ((stock, ClapProcessor), (ours, StockProcessor), (ours, ClapProcessor)):
        folder = tmp_path / f"{type(writer).__module__}-{reader.__module__}"
        writer.save_pretrained(folder)
        read = reader.from_pretrained(folder)
        assert read.tokenizer(TEXTS)["input_ids"] == ours.tokenizer(TEXTS)["input_ids"]
        assert read.feature_extractor.to_dict() == ours.feature_extractor.to_dict()
    assert type(read.feature_extractor) is ClapFeatureExtractor
    assert ClapProcessor.from_pretrained(folder, truncation="rand_trunc").feature_extractor.truncation == "rand_trunc"


def test_decoding_is_the_tokenizers(ours):
    ids = ours(text=TEXTS)["input_ids"]
    assert ours.batch_decode(ids, skip_special_tokens=True) == TEXTS
    assert ours.decode(ids[1], skip_special_tokens=True) == TEXTS[1]


@torch.no_grad()
def test_texts_and_clips_to_similarities(ours):
    model = ClapModel(composite_config(clvp_fast, "fused", vocab_size=300)).eval()
    ours.feature_extractor = ClapFeatureExtractor(**SMALL | dict(feature_size=16))
    inputs = ours(text=TEXTS, audio=CLIPS, sampling_rate=RATE, padding=True, return_tensors="pt", seed=0)
    logits = model(**inputs).logits_per_audio
    assert logits.shape == (len(CLIPS), 2) and logits.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({}, ValueError, "neither text nor audio was given"),
        (dict(text=5), TypeError, "text must be a string or a list of strings, not int"),
        (dict(text=[]), TypeError, "text must be a string or a list of strings, not list"),
        (dict(audio=CLIPS[0], sampling_rate=RATE, audio_kwargs=dict(sampling_rate=RATE)), ValueError, "given twice"),
        (dict(text="a", audio=CLIPS[0], sampling_rate=44100), ValueError, "sampling_rate=44100 was given: resample"),
    ],
)
def test_bad_input(ours, call, error, message):
    with pytest.raises(error, match=message):
        ours(**call)


@pytest.mark.parametrize("name", ["audios", "raw_speech", "images"])
def test_inputs_by_other_names_are_not_dropped(stock, ours, name):
    """Refuse inputs of which transformers refuses the first, and drops the others."""
    if name == "audios":
        with pytest.raises(ValueError, match="`audio` instead"):
            stock(text=TEXTS[0], audios=CLIPS[0])
    with pytest.raises(ValueError, match=f"ClapProcessor takes text and audio, and nothing called {name}: "):
        ours(text=TEXTS[0], **{name: CLIPS[0]})
