"""Voices from files: which files they are, and what is used of them; and what is told of a text's characters."""

import random
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clvp_fast import ClvpFeatureExtractor, ClvpTokenizer
from clvp_fast.checkpoint import load_checkpoint, resolve_checkpoint
from clvp_fast.engine.voice_files import latent_voice, load_voice
from clvp_fast.engine.voices import VoiceCache
from clvp_fast.models.clvp.text_remarks import text_remarks

soundfile = pytest.importorskip("soundfile")  # which a GPU machine may lack

SIZES = 200_000, 100_000, 132_301  # samples; 132300 are 6 s


@pytest.fixture
def voices():
    """Replace an engine's cache: a voice is the features of its recordings."""
    return SimpleNamespace(feature_extractor=ClvpFeatureExtractor(), from_features=lambda mels: mels)


@pytest.mark.parametrize("seconds", [2, 6, 9])
def test_the_first_six_seconds_are_used(voices, tmp_path, seconds):
    """Compare with the features of the extractor, which cuts the whole recording."""
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
def test_other_files_are_read_as_recordings(voices, tmp_path, content):
    """Tell a saved voice by its name, or by a JSON header behind its length."""
    (tmp_path / "voice").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a recording"):
        load_voice(voices, tmp_path / "voice")


def test_remarks_on_a_text():
    tokenizer = ClvpTokenizer.from_pretrained(resolve_checkpoint("random"), text_cleaning="tortoise")
    assert text_remarks(tokenizer, "A café costs $5.") == ()
    assert text_remarks(tokenizer, "東京 is big.") == (
        "characters of other scripts were written in Latin letters: 東 京",
    )
    assert text_remarks(tokenizer, "He has ٣ of them.")[-1].endswith(": ٣")
    assert text_remarks(tokenizer, "He said quixotic things.") == ()  # of no closed domain
    assert text_remarks(tokenizer, " ...!") == ("the text has no letters or digits, so there is no word to speak",)
    many = "東京大阪名古屋札幌福岡仙"
    (remark,) = text_remarks(tokenizer, f"{many} is big.")
    assert remark.endswith(f": {' '.join(many[:10])} and 2 more")


@pytest.mark.parametrize("seed", range(4))
def test_pieces_from_random_places_are_those_of_the_original(voices, tmp_path, seed):
    """Draw a place for each longer clip, in their order, after `random.seed`, as `format_conditioning` does."""
    clips = [
        np.random.default_rng(index).normal(size=size).astype(np.float32) * 0.1 for index, size in enumerate(SIZES)
    ]
    for index, clip in enumerate(clips):
        soundfile.write(tmp_path / f"{index}.wav", clip, 22050, subtype="FLOAT")
    found = load_voice(voices, tmp_path, crop_seed=seed)
    random.seed(seed)
    for mel, clip in zip(found.voice, clips, strict=True):
        gap = len(clip) - 132300
        start = random.randint(0, gap) if gap > 0 else 0
        piece = clip[start : start + 132300]
        expected = voices.feature_extractor(piece, sampling_rate=22050, return_tensors="np")["input_features"][0]
        np.testing.assert_array_equal(mel, expected)
    assert found.remarks == ("2 of 3 recordings: 6 s from a random place on are used",)
    assert not np.array_equal(load_voice(voices, tmp_path, crop_seed=seed + 1).voice[0], found.voice[0])
    assert not np.array_equal(load_voice(voices, tmp_path).voice[0], found.voice[0])


@pytest.fixture(scope="module")
def cache():
    checkpoint = load_checkpoint("random")
    return VoiceCache(checkpoint.model, checkpoint.feature_extractor)


@pytest.mark.parametrize("form", ["pair", "list", "alone", "bare"])
def test_latents_of_a_file_are_a_voice(cache, tmp_path, form):
    width = len(cache.fingerprint)
    auto, diffusion = torch.randn(1, width), torch.randn(1, 2 * width)
    torch.save(
        {"pair": (auto, diffusion), "list": [auto[0], diffusion[0]], "alone": auto, "bare": auto[0]}[form],
        tmp_path / "voice.pth",
    )
    for place in (tmp_path / "voice.pth", tmp_path):  # a folder of Tortoise's may hold them alone
        found = load_voice(cache, place)
        assert torch.equal(found.voice.vector, auto[0]) and (found.mel, found.recordings) == (None, 0)
    assert torch.equal(latent_voice(cache, tmp_path / "voice.pth").vector, auto[0])


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a file has run')",)


def test_bad_latents(cache, tmp_path):
    width = len(cache.fingerprint)
    one, two = torch.zeros(1, width), torch.zeros(1, 2 * width)
    for content, message in (
        ((one, one), rf"the diffusion's latent must be \[1, {2 * width}\]"),
        ((two, two), rf"conditioning must be floats \[{width}\]|the diffusion's latent"),
        ((one, two, two), "3 parts came"),
        ((one, "two"), "2 parts came"),
        ((one * torch.nan, two), "NaN or infinite"),
        (one.long(), rf"must be floats \[{width}\], not torch.int64"),
        ({"auto": one}, "not dict"),
        (Evil(), "holds no latents of a voice, or more than tensors"),
        (torch.zeros(300_000), "has 12[0-9]{5} bytes, and a voice's latents at most 1000000: is it a model"),
    ):
        torch.save(content, tmp_path / "voice.pth")
        with pytest.raises(ValueError, match=message):
            load_voice(cache, tmp_path / "voice.pth")
    for content, message in (
        (one.to("meta"), "a meta tensor came"),
        ((one, two.to("meta")), "a meta tensor came"),
        (one.to_sparse(), "a sparse tensor came"),
        ((one.to_sparse_csr(), two), "a sparse tensor came"),
        (torch.nested.nested_tensor([one[0]]), "a nested tensor came"),
        (torch.quantize_per_tensor(one, 0.1, 0, torch.qint8), "a quantized tensor came|holds no latents"),
        ((one.double() + 1e300, two), "holds NaN or infinite values, as float32 cannot hold them"),
    ):
        torch.save(content, tmp_path / "voice.pth")
        with pytest.raises(ValueError, match=message) as told:
            load_voice(cache, tmp_path / "voice.pth")
        assert str(told.value).startswith(str(tmp_path / "voice.pth"))
    with pytest.raises(ValueError, match="a meta tensor came"):
        cache.from_vector(one.to("meta"))
    (tmp_path / "voice.pth").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="holds no latents of a voice"):
        load_voice(cache, tmp_path / "voice.pth")
    with pytest.raises(FileNotFoundError, match="there are no latents at"):
        load_voice(cache, tmp_path / "missing.pth")


def test_latents_that_unpack_to_megabytes_are_not_unpacked(cache, tmp_path, monkeypatch):
    torch.save(torch.zeros(1, 2_000_000), tmp_path / "large.pth")
    deflated = zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "large.pth") as large, deflated as bomb:
        for entry in large.infolist():
            bomb.writestr(entry.filename, large.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 20_000
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=r"bomb\.pth unpacks to 80[0-9]{5} bytes, and a voice's latents"):
        load_voice(cache, tmp_path / "bomb.pth")


def test_latents_with_a_negative_bit(cache):
    vector = torch.randn(len(cache.fingerprint))
    assert torch.equal(cache.from_vector(torch._neg_view(vector)).vector, -vector)


def test_folder_with_latents_of_several_voices(cache, tmp_path):
    for name in ("a.pth", "b.pth"):
        torch.save(torch.zeros(len(cache.fingerprint)), tmp_path / name)
    with pytest.raises(ValueError, match=r"2 files of latents, of which one must be given: a\.pth, b\.pth"):
        load_voice(cache, tmp_path)


def test_a_refusal_names_the_kinds_of_voice(cache, tmp_path):
    (tmp_path / "voice.txt").write_text("x")
    for place in (tmp_path, tmp_path / "voice.txt"):
        with pytest.raises(ValueError, match=r"a saved (voice|one) \(\.safetensors\) or latents \(\.pth\)"):
            load_voice(cache, place)


def test_words_outside_of_a_closed_domain_are_told(tmp_path):
    folder = resolve_checkpoint("random")
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
