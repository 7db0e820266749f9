"""Voices are computed once, kept by content, averaged, saved and loaded; prompts are today's, bit for bit."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clvp_fast import ClvpFeatureExtractor
from clvp_fast.engine.voices import Voice, VoiceCache
from clvp_fast.io.files import UnwritableError
from tests.models.clvp.builders import SHAPES, assert_same, clips, pair, texts

RATE = 16000
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def extractor(**settings) -> ClvpFeatureExtractor:
    """Make an extractor for the tiny models: 20 bins; clips of one second at a low rate."""
    settings = {"feature_size": 20, "sampling_rate": RATE, "default_audio_length": 1, "n_fft": 512} | settings
    return ClvpFeatureExtractor(**settings)


def sound(seed: int = 0, samples: int = 6000) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=samples).astype(np.float32) * 0.1


def cache_of(shape: str = "heads64", dtype: torch.dtype = torch.float32, seed: int = 0, **settings) -> VoiceCache:
    return VoiceCache(pair(shape=shape, dtype=dtype, seed=seed)[1], extractor(), **settings)


@pytest.fixture
def encoded(monkeypatch):
    """Count the clips that went through the encoder of voices, without the fixed input for fingerprints."""
    frames = []
    encode = VoiceCache._encode

    def counted(self, features):
        frames.append(features.shape[-1])
        return encode(self, features)

    monkeypatch.setattr(VoiceCache, "_encode", counted)
    return lambda: sum(count != 8 for count in frames)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_prompts_are_bitwise_those_of_today(shape, dtype):
    """Join a voice with texts of any number and padding, and compare with `prompt` of the clip itself."""
    cache = cache_of(shape, dtype)
    encoder = cache.model.conditioning_encoder
    features = extractor()(sound(), sampling_rate=RATE, return_tensors="pt")["input_features"]
    voice = cache.from_clips(sound(), RATE)
    assert voice.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 0] + [1] * 5])
    for inputs in (
        dict(input_ids=texts(1)),
        dict(input_ids=texts(3), attention_mask=mask),
        dict(input_ids=texts(2), num_ends=1),
        dict(inputs_embeds=encoder.text_token_embedding(texts(1))),
    ):
        expected, expected_mask = encoder.prompt(features.to(dtype), **inputs)
        found, found_mask = encoder.join_prompt(cache.conditioning(voice), *encoder.prompt_text(**inputs))
        assert found.dtype == dtype and torch.equal(found, expected) and torch.equal(found_mask, expected_mask)
    assert expected[:, 0].std() > 0.01
    again = cache.from_features(features)
    assert again is not voice and torch.equal(again.vector, voice.vector)


@torch.no_grad()
def test_several_clips_are_averaged():
    cache = cache_of()
    features = clips(3, frames=13)
    vectors = torch.stack([cache.model.conditioning_encoder.encode_voice(clip[None])[0] for clip in features])
    expected = vectors.mean(0)
    assert vectors.std(0).min() > 1e-3
    assert torch.equal(cache.from_features(features).vector, expected)
    assert torch.equal(cache.from_features(list(features)).vector, expected)
    ragged = [features[0], features[1, :, :5]]
    short = cache.model.conditioning_encoder.encode_voice(features[1:2, :, :5])[0]
    assert_same(cache.from_features(ragged).vector, (vectors[0] + short) / 2)
    both = cache.from_clips([sound(1), sound(2, 3000)], RATE).vector
    assert_same(both, (cache.from_clips(sound(1), RATE).vector + cache.from_clips([sound(2, 3000)], RATE).vector) / 2)


def test_kept_by_content(encoded):
    cache = cache_of()
    voice = cache.from_clips(sound(), RATE)
    assert cache.from_clips([sound().copy()], RATE) is voice
    assert cache.from_clips(torch.from_numpy(sound()), RATE) is voice
    assert encoded() == 1
    # Beyond the seconds that are used nothing counts.
    long = sound(samples=2 * RATE)
    first = cache.from_clips(long, RATE)
    assert cache.from_clips(long[: RATE + 1], RATE) is first and encoded() == 2
    others = [
        sound(1),
        sound()[:-1],
        np.append(sound()[:-1], np.float32(0)),
        (sound() * 32767).astype(np.int16),
        [sound(), sound()],
    ]
    found = [cache.from_clips(other, RATE) for other in others]
    assert encoded() == 2 + 6 and len({id(voice) for voice in found}) == 5
    half = sound().astype(np.float16)  # the same bytes as another type
    assert cache.from_clips(half, RATE) is not cache.from_clips(half.view(np.int16), RATE)
    cache.feature_extractor.hop_length = 128
    assert cache.from_clips(sound(), RATE) is not voice
    assert cache.from_features(clips(1)) is cache.from_features(clips(1)[0])
    assert cache.from_features(clips(1)) is not cache.from_features(clips(1, frames=20))
    assert cache.from_clips([sound(1), sound(2)], RATE) is not cache.from_clips([sound(2), sound(1)], RATE)


def test_least_recently_used_goes(encoded):
    cache = cache_of(capacity=2)
    one, two = (cache.from_features(clips(1, seed=seed)) for seed in (1, 2))
    assert cache.from_features(clips(1, seed=1)) is one
    cache.from_features(clips(1, seed=3))
    assert len(cache) == 2 and encoded() == 3
    assert cache.from_features(clips(1, seed=1)) is one and encoded() == 3
    assert cache.from_features(clips(1, seed=2)) is not two and encoded() == 4
    cache.clear()
    assert len(cache) == 0 and torch.equal(cache.from_features(clips(1, seed=1)).vector, one.vector)


def test_placed_once():
    cache = cache_of(dtype=torch.bfloat16)
    voice = cache.from_features(clips(1))
    placed = cache.conditioning(voice)
    assert placed.shape == (1, 128) and placed.dtype == torch.bfloat16
    assert cache.conditioning(voice) is placed
    assert voice.on("cpu", torch.float32) is not placed


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.where(np.arange(6000) == 17, np.nan, sound()).astype(np.float32), "NaN or infinite"),
        (np.zeros(6000, np.float32), "silent"),
        (np.ones(6000, np.int16), "silent"),
        (np.zeros(0, np.float32), "empty"),
        (np.zeros((2, 600), np.float32), "mono"),
        (np.arange(600), "floats in .* or int16"),
    ],
)
def test_a_bad_clip_is_refused_alone(bad, message):
    """Keep the other voices of the cache, and nothing of the bad clip."""
    cache = cache_of()
    good = cache.from_clips(sound(), RATE)
    for recordings in (bad, [sound(), bad]):
        for _ in range(2):
            with pytest.raises((ValueError, TypeError), match=message):
                cache.from_clips(recordings, RATE)
    with pytest.raises((ValueError, TypeError), match="clip 1"):
        cache.from_clips([sound(), bad], RATE)
    assert len(cache) == 1 and cache.from_clips(sound(), RATE) is good
    assert good.vector.isfinite().all()


def test_quiet_int16_is_no_silence():
    assert cache_of().from_clips((sound() * 3276).astype(np.int16), RATE).vector.isfinite().all()


def test_bad_input():
    cache = cache_of()
    features = clips(2)
    features[1, 3, 4] = torch.inf
    for wrong, message in (
        (features, "clip 1 hold NaN or infinite"),
        (clips(1)[:, :19], "clips, 20, frames"),
        (clips(1)[..., :0], "clips, 20, frames"),
        ([], "at least one clip"),
        (clips(1)[:0], "at least one clip"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.from_features(wrong)
    with pytest.raises(ValueError, match="at least one clip"):
        cache.from_clips([], RATE)
    cache.from_clips(sound(), RATE)
    with pytest.raises(ValueError, match="16000 Hz, but sampling_rate=32000"):
        cache.from_clips(sound(), 2 * RATE)
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        VoiceCache(cache.model, cache.feature_extractor, capacity=0)


@torch.no_grad()
def test_a_vector_that_overflowed_is_not_kept():
    cache = cache_of(dtype=torch.float16)
    with pytest.raises(ValueError, match="wider dtype"):
        cache.from_features(clips(1) * 1e5)
    assert len(cache) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_and_loaded(tmp_path, dtype):
    cache = cache_of(dtype=dtype)
    voice = cache.from_features(clips(2))
    voice.save(tmp_path / "deep" / "anna.safetensors")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["anna.safetensors"]
    loaded = Voice.load(tmp_path / "deep" / "anna.safetensors")
    assert torch.equal(loaded.vector, voice.vector) and loaded.vector.dtype == voice.vector.dtype
    assert torch.equal(cache.conditioning(loaded), cache.conditioning(voice))
    for other in DTYPES:  # the checkpoint is the same in every dtype
        assert cache_of(dtype=other).conditioning(loaded).dtype == other


def test_of_another_checkpoint(tmp_path):
    voice = cache_of().from_features(clips(1))
    voice.save(tmp_path / "voice")
    for given in (voice, Voice.load(tmp_path / "voice")):
        with pytest.raises(ValueError, match="made by another checkpoint"):
            cache_of(seed=1).conditioning(given)
        with pytest.raises(ValueError, match="has 128 numbers, and this checkpoint's have 96"):
            cache_of("heads32").conditioning(given)


def test_damaged_files(tmp_path):
    voice = cache_of().from_features(clips(1))
    path = tmp_path / "voice"
    voice.save(path)
    whole = path.read_bytes()
    metadata = {"format": "clvp_fast.voice.1"}
    mark = torch.zeros(4)
    for content, message in (
        (whole[:-1], "damaged or no voice"),
        (b"", "damaged or no voice"),
        (b"no voice at all", "damaged or no voice"),
        (({"vector": mark, "fingerprint": mark + 0}, {}), "is no voice"),
        (({"vector": mark}, metadata), "damaged or no voice"),
        (({"vector": mark, "fingerprint": torch.zeros(3)}, metadata), r"fingerprint is torch.float32 \[3\]"),
        (({"vector": mark.int(), "fingerprint": mark}, metadata), "vector is torch.int32"),
        (({"vector": mark / 0, "fingerprint": mark}, metadata), "vector holds NaN"),
        (({"vector": mark, "fingerprint": mark / 0}, metadata), "fingerprint holds NaN"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content[0], path, metadata=content[1])
        with pytest.raises(ValueError, match=message):
            Voice.load(path)
    with pytest.raises(FileNotFoundError, match="no voice at"):
        Voice.load(tmp_path)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    voice = cache_of().from_features(clips(1))
    voice.save(tmp_path / "voice")
    before = (tmp_path / "voice").read_bytes()

    def fails(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("clvp_fast.engine.voices.save_file", fails)
    with pytest.raises(UnwritableError, match="the disk is full"):
        voice.save(tmp_path / "voice")
    assert (tmp_path / "voice").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="is a folder"):
        voice.save(tmp_path)
