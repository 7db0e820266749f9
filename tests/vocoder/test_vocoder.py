"""Codes to sound: the codec's arithmetic, the way back from log-mel, and the files of a checkpoint folder."""

import json

import numpy as np
import pytest
import torch

from clvp_fast import ClvpFeatureExtractor
from clvp_fast.checkpoint import load_checkpoint
from clvp_fast.demo import build_random
from clvp_fast.vocoder import CodecVocoder, load_vocoder, save_vocoder
from clvp_fast.vocoder.codec import FLOOR, Codec, voice_of
from clvp_fast.vocoder.griffin_lim import GriffinLim

EXTRACTOR = ClvpFeatureExtractor()


def a_codec(**changes) -> Codec:
    torch.manual_seed(3)
    return Codec(**{"levels": (4, 3, 2), "stride": 4, "width": 16, **changes}).eval()


def a_voice() -> torch.Tensor:
    return torch.randn(80, 60, generator=torch.Generator().manual_seed(0)) - 5


def features(samples: np.ndarray) -> torch.Tensor:
    found = EXTRACTOR(samples, sampling_rate=22050, padding=False, max_length=len(samples), return_tensors="pt")
    return found["input_features"][0]


def test_every_code_has_its_own_levels():
    codec = a_codec()
    codes = torch.arange(codec.num_codes)[None]
    levels = codec.levels_of(codes)[0]
    assert codec.num_codes == 24 and len(levels.unique(dim=0)) == 24
    assert levels.amin(0).tolist() == [0, 0, 0] and levels.amax(0).tolist() == [3, 2, 1]
    assert (levels.long() * codec.places).sum(-1).tolist() == codes[0].tolist()


def test_codes_are_those_of_the_rounded_numbers():
    codec = a_codec()
    mel = torch.randn(2, 80, 24) * 3 - 5
    grid = codec.grid_of(mel)
    codes = codec.codes_of(mel)
    assert codes.shape == (2, 6) and len(codes.unique()) > 2
    assert torch.equal(codec.levels_of(codes), grid.detach().round())
    # The last code is filled up with copies of the last frame.
    short = mel[..., :21]
    assert torch.equal(codec.codes_of(short), codec.codes_of(torch.cat([short, short[..., -1:].expand(2, 80, 3)], 2)))


def test_gradient_passes_the_rounding():
    codec = a_codec()
    codec.log_mel_of(codec.grid_of(torch.randn(1, 80, 16)), torch.randn(1, 160)).square().mean().backward()
    assert codec.enter.weight.grad.abs().max() > 0 and codec.voice[0].weight.grad.abs().max() > 0


def test_silence_around_a_clip_changes_no_voice():
    mel = a_voice()
    padded = torch.cat([mel, torch.full((80, 40), FLOOR)], 1)
    assert torch.equal(voice_of(padded), voice_of(mel))
    assert not torch.allclose(voice_of(mel), voice_of(mel + 1))
    with pytest.raises(ValueError, match="silent"):
        voice_of(torch.full((80, 40), FLOOR))


@pytest.mark.parametrize("norms", [None, [2.0] * 80])
def test_sound_that_is_inverted_has_its_log_mel(norms):
    """Take a chord through features and back: its features stay nearly the same, up to loudness."""
    extractor = ClvpFeatureExtractor(mel_norms=norms)
    time = np.arange(22050) / 22050
    samples = sum(np.sin(2 * np.pi * f * time) for f in (220, 660, 1700)).astype(np.float32) * 0.1
    mel = torch.as_tensor(extractor(samples, sampling_rate=22050, max_length=22050, return_tensors="pt").input_features)
    sound = GriffinLim(extractor)(mel[0]).numpy()
    assert sound.dtype == np.float32 and len(sound) == 22050 // 256 * 256
    assert np.sqrt(np.square(sound).mean()) == pytest.approx(0.08, rel=0.05)
    wanted, found = features(samples)[:, 4:-4], features(sound)[:, 4:-4]
    loud = wanted > wanted.max() - 6
    off = (found - wanted)[:, : found.shape[1]][loud[:, : found.shape[1]]]
    assert (off - off.mean()).abs().mean() < 0.5


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_short_sounds_have_their_length(frames):
    sound = GriffinLim(EXTRACTOR, iterations=2)(torch.full((80, frames), -4.0))
    assert sound.shape == ((frames - 1) * 256,) and sound.isfinite().all()


def test_vocoder_speaks_each_candidate():
    codec = a_codec()
    vocoder = CodecVocoder(codec, EXTRACTOR, iterations=2)
    rows = [np.arange(10), np.zeros(0, dtype=np.int64), np.arange(5, 24)]
    sounds = vocoder.speak(rows, a_voice())
    assert [len(sound) for sound in sounds] == [39 * 256, 0, 75 * 256] and vocoder.sampling_rate == 22050
    assert all(np.isfinite(sound).all() and (np.abs(sound) <= 1).all() for sound in sounds)
    assert np.array_equal(sounds[2], vocoder.speak(rows[2:], a_voice())[0])
    with pytest.raises(ValueError, match="knows codes from 0 to 23, and these are 3 to 24"):
        vocoder.speak([np.array([3, 24])], a_voice())
    with pytest.raises(ValueError, match=r"a voice must be \[80, frames\]"):
        vocoder.speak([np.array([3])], a_voice()[None])


def test_files_give_the_same_sound(tmp_path):
    codec = a_codec()
    save_vocoder(tmp_path, codec)
    again = load_vocoder(tmp_path, EXTRACTOR)
    assert again is not None and again.codec.settings == codec.settings
    mel = CodecVocoder(codec, EXTRACTOR).log_mel(np.arange(24), a_voice())
    torch.testing.assert_close(again.log_mel(np.arange(24), a_voice()), mel, rtol=0.01, atol=0.02)
    assert load_vocoder(tmp_path / "none", EXTRACTOR) is None


def test_a_damaged_vocoder_is_one_sentence(tmp_path):
    save_vocoder(tmp_path, a_codec())
    settings = tmp_path / "vocoder.json"
    whole = json.loads(settings.read_text())
    for change, message in (
        ({"kind": "other"}, "its kind is 'other'"),
        ({"levels": [4, 3]}, r"for expand\.weight the shape \[16, 3\], and vocoder\.json asks for \[16, 2\]"),
        ({"height": 3}, "unexpected keyword argument 'height'"),
        ({"decoder_blocks": 20_000}, r"says decoder_blocks 20000, and vocoder\.safetensors has 4"),
        ({"width": 10**9}, r"for decoder\.0\.narrow\.bias the shape \[16\], and vocoder\.json asks for"),
        *(
            ({"levels": levels}, "levels must be whole numbers from 2 up")
            for levels in (
                [0, 3, 2],
                [1, 3, 2],
                [-4, -3, 2],
                [4, 3, 2.0],
                [4, 3, None],
                [True] * 3,
                [],
                "432",
                24,
                {"a": 4},
            )
        ),
        ({"levels": [2**40] * 3}, "make more than"),
        ({"stride": 0}, "stride must be a whole number from 1 up, not 0"),
        ({"width": "a"}, "width must be a whole number from 1 up, not 'a'"),
        ({"encoder_blocks": -1}, "encoder_blocks must be a whole number from 0 up"),
    ):
        settings.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=message) as told:
            load_vocoder(tmp_path, EXTRACTOR)
        assert "\n" not in str(told.value)
    for content in ("null", "3", "[]"):
        settings.write_text(content)
        with pytest.raises(ValueError, match=r"vocoder\.json must hold settings by name, not "):
            load_vocoder(tmp_path, EXTRACTOR)
    settings.write_text("[1")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_vocoder(tmp_path, EXTRACTOR)
    settings.write_text(json.dumps(whole))
    weights = (tmp_path / "vocoder.safetensors").read_bytes()
    (tmp_path / "vocoder.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_vocoder(tmp_path, EXTRACTOR)
    (tmp_path / "vocoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"half a vocoder: vocoder\.safetensors is missing"):
        load_vocoder(tmp_path, EXTRACTOR)


def test_a_checkpoint_folder_brings_its_vocoder(tmp_path):
    build_random(tmp_path)
    assert load_checkpoint(tmp_path).vocoder is None
    save_vocoder(tmp_path, a_codec())
    assert isinstance(load_checkpoint(tmp_path).vocoder, CodecVocoder)
