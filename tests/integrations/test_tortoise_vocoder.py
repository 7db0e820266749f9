"""Tortoise's diffusion and vocoder behind our latents: the sound of its own `tts()`, and `clvp-fast speak`."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from clvp_fast.cli import main
from clvp_fast.integrations.tortoise_vocoder import TortoiseVocoder, voice_for_diffusion
from tests.integrations.oracle import off
from tests.integrations.package import DIFFUSION, tiny_tts
from tests.integrations.test_tortoise import TEXT, latents

VOICE = Path(__file__).resolve().parents[2] / "examples/voice.flac"


@pytest.fixture(scope="module")
def tts(tortoise_api):
    return tiny_tts(tortoise_api)


def test_sound_of_given_latents_is_that_of_tts(tts, tortoise_api, monkeypatch):
    """Start the generator as `tts()` has it where its diffusion begins."""
    seen, own = [], tts.diffusion.timestep_independent

    def watched(found, *args):
        seen.append((found.clone(), torch.get_rng_state()))
        return own(found, *args)

    monkeypatch.setattr(tts.diffusion, "timestep_independent", watched)
    codes = torch.randint(0, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(tts.autoregressive, "inference_speech", lambda *args, **options: codes.clone())
    settings = dict(verbose=False, num_autoregressive_samples=4, max_mel_tokens=20, diffusion_iterations=3)
    expected = tts.tts(TEXT, conditioning_latents=latents(), **settings)
    ((found, state),) = seen
    before = torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: torch.set_rng_state(state))
    vocoder = TortoiseVocoder(tts.diffusion, tts.vocoder, latents()[1], iterations=3)
    sound, again = (vocoder.speak([codes[0].numpy()], torch.zeros(0), [found])[0] for _ in range(2))
    assert off(sound, expected.flatten()) < 1e-5 and np.array_equal(sound, again)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="needs the latents of candidates"):
        vocoder.speak([codes[0].numpy()], torch.zeros(0))
    with pytest.raises(ValueError, match="from 2 iterations up, not 1"):
        TortoiseVocoder(tts.diffusion, tts.vocoder, latents()[1], iterations=1)


def test_the_voice_is_told_as_tortoise_tells_it(tts, tmp_path):
    samples = 0.1 * torch.randn(1, 150_000, generator=torch.Generator().manual_seed(3))
    clips = [samples, samples[:, :60_000].flip(1)]
    (tmp_path / "voice").mkdir()
    for number, clip in enumerate(clips):
        soundfile.write(tmp_path / f"voice/{number}.wav", clip[0].numpy(), 22050, "FLOAT")
    _, expected = tts.get_conditioning_latents(clips)
    assert off(voice_for_diffusion(tts.diffusion, tmp_path / "voice"), expected) < 1e-5
    torch.save(latents(), tmp_path / "pair.pth")
    assert torch.equal(voice_for_diffusion(tts.diffusion, tmp_path / "pair.pth"), latents()[1])
    torch.save(latents()[0], tmp_path / "one.pth")
    with pytest.raises(ValueError, match=r"latents for the decoder alone: give the pair"):
        voice_for_diffusion(tts.diffusion, tmp_path / "one.pth")
    with pytest.raises(ValueError, match="a saved voice, which tells the diffusion nothing"):
        voice_for_diffusion(tts.diffusion, tmp_path / "voice.safetensors")


def test_speak_over_tortoises_own_files(tts, tortoise_api, tmp_path, monkeypatch, capsys):
    """Files of tiny models in the original layout, in a folder as the hub's cache has it."""
    folder = tmp_path / "models--Manmay--tortoise-tts/snapshots/1"
    folder.mkdir(parents=True)
    for name, module in (
        ("autoregressive", tts.autoregressive),
        ("clvp2", tts.clvp),
        ("diffusion_decoder", tts.diffusion),
    ):
        torch.save(module.state_dict(), folder / f"{name}.pth")
    diffusion, vocoder = partial(tortoise_api.DiffusionTts, **DIFFUSION), tortoise_api.UnivNetGenerator
    torch.save({"model_g": vocoder(channel_size=8).state_dict()}, folder / "vocoder.pth")
    monkeypatch.setattr(tortoise_api, "DiffusionTts", lambda **sizes: diffusion())
    monkeypatch.setattr(tortoise_api, "UnivNetGenerator", lambda: vocoder(channel_size=8))
    common = ["speak", TEXT, "--voice", str(VOICE), "--tortoise", str(tmp_path), "--num-candidates", "4"]
    common += ["--max-new-tokens", "20", "--iterations", "3", "--device", "cpu"]

    def spoken(name, *options):
        assert main([*common, "--out", str(tmp_path / name), *options]) == 0, capsys.readouterr().err
        return soundfile.read(tmp_path / name)

    (sound, rate), (again, _), (other, _) = spoken("1.wav"), spoken("2.wav"), spoken("3.wav", "--seed", "1")
    assert rate == 24000 and len(sound) % 256 == 0 and 0 < np.abs(sound).max() <= 1
    assert np.array_equal(sound, again) and not np.array_equal(sound, other)
    torch.save({"other": torch.zeros(3)}, folder / "vocoder.pth")
    assert main([*common, "--out", str(tmp_path / "4.wav")]) == 1
    assert "is not Tortoise's vocoder.pth, or is damaged" in capsys.readouterr().err
    assert not (tmp_path / "4.wav").exists()
