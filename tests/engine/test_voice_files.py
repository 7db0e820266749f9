"""Voices from files: which files they are, and what is used of them; and what is told of a text's characters."""

from types import SimpleNamespace

import numpy as np
import pytest

from clvp_fast import ClvpFeatureExtractor, ClvpTokenizer
from clvp_fast.checkpoint import resolve_checkpoint
from clvp_fast.engine.voice_files import load_voice
from clvp_fast.models.clvp.text_remarks import text_remarks

soundfile = pytest.importorskip("soundfile")  # which a GPU machine may lack


@pytest.fixture
def voices():
    """In place of an engine's cache: a voice is the features of its recordings."""
    return SimpleNamespace(feature_extractor=ClvpFeatureExtractor(), from_features=lambda mels: mels)


@pytest.mark.parametrize("seconds", [2, 6, 9])
def test_the_first_six_seconds_are_used(voices, tmp_path, seconds):
    """All of them, and the features are those of the extractor, which cuts the whole."""
    for index in range(2):
        samples = np.random.default_rng(index).normal(size=seconds * 22050).astype(np.float32) * 0.1
        soundfile.write(tmp_path / f"{index}.wav", samples, 22050, subtype="FLOAT")
    found = load_voice(voices, tmp_path)
    assert found.recordings == len(found.voice) == 2
    assert found.remarks == (("2 of 2 recordings: only the first 6 s are used",) if seconds > 6 else ())
    for index, mel in enumerate(found.voice):
        samples, _ = soundfile.read(tmp_path / f"{index}.wav", dtype="float32")
        expected = voices.feature_extractor(samples, sampling_rate=22050, return_tensors="np")["input_features"][0]
        np.testing.assert_array_equal(mel, expected)


@pytest.mark.parametrize("content", [bytes(100), b"\1" + bytes(7) + b"x" * 100, b"", b"{"])
def test_what_is_no_saved_voice_is_a_recording(voices, tmp_path, content):
    """A file is a saved voice by its name, or by a header of JSON behind its length."""
    (tmp_path / "voice").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a recording"):
        load_voice(voices, tmp_path / "voice")


def test_remarks_on_a_text():
    tokenizer = ClvpTokenizer.from_pretrained(resolve_checkpoint("demo"), text_cleaning="tortoise")
    assert text_remarks(tokenizer, "A café costs $5.") == ()
    assert text_remarks(tokenizer, "東京 is big.") == (
        "characters of other scripts were written in Latin letters: 東 京",
    )
    assert text_remarks(tokenizer, "He has ٣ of them.")[-1].endswith(": ٣")
    assert text_remarks(tokenizer, "He said quixotic things.") == ()  # of no closed domain
    many = "東京大阪名古屋札幌福岡仙"
    (remark,) = text_remarks(tokenizer, f"{many} is big.")
    assert remark.endswith(f": {' '.join(many[:10])} and 2 more")


def test_words_outside_of_a_closed_domain_are_told(tmp_path):
    folder = resolve_checkpoint("demo")
    words = ["the", "doctor", "paid", "twenty", "five", "dollars", "didn't"]
    ClvpTokenizer.from_pretrained(folder, domain_words=words).save_pretrained(tmp_path)
    tokenizer = ClvpTokenizer.from_pretrained(tmp_path, text_cleaning="tortoise")
    assert tokenizer.domain_words == sorted(words)
    assert text_remarks(tokenizer, "The DOCTOR paid $25, didn't the doctor?") == ()
    assert text_remarks(tokenizer, "The painter paid; the painter ran.") == (
        "words that the checkpoint was not trained on, and may say wrongly: painter ran",
    )
    (remark,) = text_remarks(tokenizer, "a" * 1000)
    assert len(remark) < 120
