"""Recordings in every format and rate come out as one channel at the wanted rate, or as a clear refusal."""

import io
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from clvp_fast import audio
from clvp_fast.audio import load_audio, read_audio, require_sound
from tests.data import data_path


def tone(rate: int, seconds: float = 0.5, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def loudest_frequency(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * rate / len(samples))


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_formats_and_rates(tmp_path, suffix, rate):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tone(rate), rate)
    samples, note = load_audio(path)
    assert samples.dtype == np.float32 and samples.ndim == 1 and samples.flags.c_contiguous
    assert len(samples) / 22050 == pytest.approx(0.5, abs=0.06)  # lossy formats pad
    assert loudest_frequency(samples, 22050) == pytest.approx(440, abs=4)
    assert np.abs(samples[2000:-2000]).max() == pytest.approx(0.5, abs=0.05)
    assert note == (None if rate == 22050 else f"resampled from {rate} Hz to 22050 Hz")


def test_same_rate_is_bit_exact(tmp_path):
    written = np.random.default_rng(0).integers(-(2**15), 2**15, 5000).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", written, 22050, subtype="PCM_16")
    samples, note = load_audio(tmp_path / "a.flac")
    assert note is None
    np.testing.assert_array_equal(samples, written.astype(np.float32) / 2**15)


def test_stereo_is_mixed_down_with_a_note(tmp_path):
    left, right = tone(22050), 0.5 * tone(22050, frequency=880)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 22050, subtype="FLOAT")
    samples, note = load_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(samples, (left + right) / 2, atol=1e-7)
    assert note == "2 channels mixed down to one"


def test_open_file_and_other_rate():
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(16000), 16000, format="WAV")
    buffer.seek(0)
    samples, note = load_audio(buffer, sampling_rate=48000)
    assert len(samples) == 24000
    assert note == "resampled from 16000 Hz to 48000 Hz"


def test_resampled_speech_keeps_what_the_model_hears():
    """Real speech at 16 kHz against soxr's best quality."""
    path = data_path("audio/1272-128104-0000.flac")
    original, rate = soundfile.read(path)
    samples, _ = load_audio(path)
    reference = soxr.resample(original, rate, 22050, quality="VHQ")
    assert len(samples) == len(reference) == 129103
    difference = samples - reference
    assert np.abs(difference).max() < 3e-3  # both cut off near 8 kHz, each in its own way
    assert np.sqrt(np.mean(difference**2)) < 4e-3 * np.sqrt(np.mean(reference**2))


@pytest.mark.parametrize("rate", [0, -1, 22050.5, "22050", None, True])
def test_impossible_rates(tmp_path, rate):
    with pytest.raises(ValueError, match="sampling_rate must be a positive whole number"):
        load_audio(tmp_path / "a.wav", sampling_rate=rate)


def test_missing_folder_and_unreadable(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recording at"):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="is a folder"):
        load_audio(tmp_path)
    (tmp_path / "a.wav").write_text("this is no sound")
    with pytest.raises(ValueError, match=r"a\.wav cannot be read as a recording \(WAV, FLAC, MP3 or OGG\)"):
        load_audio(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as a recording"):
        load_audio(tmp_path / "b.wav")


def test_truncated_flac(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(size=22050) * 0.1, 22050)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[:60])
    with pytest.raises(ValueError, match=r"cannot be read as a recording|is empty"):
        load_audio(tmp_path / "a.flac")


@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_torn_recordings_are_told(tmp_path, suffix):
    """Half of a file is half of a recording, of which its header names the whole."""
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(22050, 4.0) + np.random.default_rng(0).normal(size=4 * 22050) * 0.1, 22050)
    assert load_audio(path)[1] is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = read_audio(path)
    assert found.seconds == len(found.samples) / 22050 < 2.5
    assert found.changes == (f"torn off after {found.seconds:.2f} s of the 4.00 s that its header names",)
    assert read_audio(path, seconds=6).changes == found.changes and not read_audio(path, seconds=6).cut
    # The missing part is not asked for here.
    assert read_audio(path, seconds=0.5).changes == ("only the first 0.5 s are used",)


@pytest.mark.parametrize("named", [0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000])
def test_a_length_that_was_not_known(tmp_path, named):
    """Read the header of a program that wrote into a pipe."""
    soundfile.write(tmp_path / "a.wav", tone(22050), 22050)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = named.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    found = read_audio(tmp_path / "a.wav")
    assert len(found.samples) == 11025 and found.seconds == 0.5 and not found.changes


@pytest.mark.parametrize("samples", [np.full(22050, 0.5), np.full((44100, 2), -0.2), np.array([0.5])])
@pytest.mark.parametrize("rate", [22050, 48000])
def test_a_constant_level_is_no_sound(tmp_path, samples, rate):
    soundfile.write(tmp_path / "a.wav", samples, rate)
    with pytest.raises(ValueError, match=r"a\.wav holds nothing but a constant level \((0.5|-0.2)\)"):
        load_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.wav", tone(rate) * 0.5 + 0.4, rate)
    load_audio(tmp_path / "a.wav")


def test_junk_by_the_name_of_mp3(tmp_path):
    """libsndfile says that it is not there, which it is."""
    (tmp_path / "a.mp3").write_bytes(np.random.default_rng(0).bytes(50_000))
    with pytest.raises(ValueError, match=r"a\.mp3 cannot be read as a recording .*: Format not recognised"):
        load_audio(tmp_path / "a.mp3")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(tmp_path, bad):
    samples = tone(22050)
    samples[100] = bad
    soundfile.write(tmp_path / "a.wav", samples, 22050, subtype="FLOAT")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_audio(tmp_path / "a.wav")


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 22050)
    with pytest.raises(ValueError, match="is empty"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize("rate", [8000, 22050, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_beginning_is_that_of_the_whole(tmp_path, suffix, rate, channels):
    """Bit for bit, and no more is read than a second beyond it."""
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).normal(size=(9 * rate, channels)) * 0.1
    soundfile.write(path, noise, rate)
    whole = read_audio(path)
    part = read_audio(path, seconds=6)
    assert np.array_equal(part.samples, whole.samples[: 6 * 22050]) and len(part.samples) == 6 * 22050
    assert part.cut and not whole.cut and not read_audio(path, seconds=60).cut
    assert part.seconds == whole.seconds == pytest.approx(9, abs=0.2)
    assert np.array_equal(read_audio(path, seconds=60).samples, whole.samples)


def test_an_hour_is_not_read(tmp_path, monkeypatch):
    read = []
    original = soundfile.SoundFile.read

    def counted(self, frames=-1, **options):
        block = original(self, frames, **options)
        read.append(len(block))
        return block

    with soundfile.SoundFile(tmp_path / "a.flac", "w", 16000, 2) as file:
        for _ in range(60):
            file.write(np.random.default_rng(0).normal(size=(60 * 16000, 2)) * 0.1)
    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    found = read_audio(tmp_path / "a.flac", seconds=6)
    assert sum(read) == 7 * 16000 and max(read) <= 1 << 16
    assert found.seconds == 3600 and found.cut


def test_samples_after_the_limit_are_not_read(tmp_path):
    samples = tone(22050, 20.0)
    samples[10 * 22050 :] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 22050, subtype="FLOAT")
    assert len(read_audio(tmp_path / "a.wav", seconds=6).samples) == 6 * 22050
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_audio(tmp_path / "a.wav")


def test_channels_that_cancel(tmp_path):
    for left in (0.0, 1e-5):
        soundfile.write(tmp_path / "a.wav", np.stack([tone(22050), (left - 1) * tone(22050)], axis=1), 22050)
        with pytest.raises(ValueError, match=r"a\.wav cannot be mixed down .*: its channels cancel each other"):
            load_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.wav", np.stack([tone(22050), -0.9 * tone(22050)], axis=1), 22050)
    assert np.abs(load_audio(tmp_path / "a.wav")[0]).max() == pytest.approx(0.025, rel=0.01)
    soundfile.write(tmp_path / "a.wav", np.zeros((22050, 2)), 22050)
    load_audio(tmp_path / "a.wav")  # silent, which is another matter
    soundfile.write(tmp_path / "a.wav", np.stack([tone(22050), -tone(22050)], axis=1) * 1e-4, 22050, subtype="FLOAT")
    load_audio(tmp_path / "a.wav")  # and so is this


@pytest.mark.parametrize("scale", [2**15, 2**31, 127])
def test_floats_of_another_scale(tmp_path, scale):
    soundfile.write(tmp_path / "a.wav", tone(22050) * np.float32(scale), 22050, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav has floats up to .*, and full scale is 1: divide them by"):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="the audio has floats up to"):
        require_sound(tone(22050) * np.float32(scale), "the audio")


def test_floats_somewhat_over_full_scale(tmp_path):
    """Read floats as studios write them."""
    soundfile.write(tmp_path / "a.wav", tone(22050) * 8, 22050, subtype="FLOAT")
    assert np.abs(load_audio(tmp_path / "a.wav")[0]).max() == pytest.approx(4, rel=0.01)


def test_a_name_that_is_no_utf_8(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.wav")
    soundfile.write(os.fsencode(path), tone(22050), 22050, format="WAV")
    assert len(load_audio(path)[0]) == 11025
    path.write_text("no sound")
    with pytest.raises(ValueError, match="cannot be read as a recording"):
        load_audio(path)


def test_a_pipe(tmp_path, monkeypatch):
    """Read a pipe like a file, up to a bound."""
    soundfile.write(tmp_path / "a.wav", tone(22050, 20.0), 22050)
    content = (tmp_path / "a.wav").read_bytes()
    os.mkfifo(tmp_path / "pipe")

    def read(**options):
        writer = threading.Thread(target=lambda: _write(tmp_path / "pipe", content))
        writer.start()
        try:
            return read_audio(tmp_path / "pipe", **options)
        finally:
            writer.join()

    assert np.array_equal(read(seconds=6).samples, read_audio(tmp_path / "a.wav", seconds=6).samples)
    assert read().seconds == 20
    monkeypatch.setattr(audio, "_PIPE", 1 << 20)
    with pytest.raises(ValueError, match="is a pipe, and gives more than 1 MiB"):
        read_audio(Path("/dev/zero"))


def _write(path, content):
    with suppress(BrokenPipeError), open(path, "wb") as pipe:
        pipe.write(content)


def test_silence_at_the_beginning(tmp_path):
    samples = np.concatenate([np.zeros(7 * 22050), tone(22050)])
    with pytest.raises(ValueError, match=r"^a\.wav: its first 6 s are silent \(peak 0.0e\+00"):
        require_sound(samples[: 6 * 22050], "a.wav", 6)


def test_silence_is_refused_by_name(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(22050), 22050)
    samples, _ = load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match=r"a\.wav is silent"):
        require_sound(samples, tmp_path / "a.wav")
    require_sound(tone(22050), "tone")
