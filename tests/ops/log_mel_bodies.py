"""What every path of `log_mel` is held to. A test module derives from `Bodies`; its fixture `path` says which it runs.

All is measured against the reference in float64; another implementation in float32 sets what float32 may miss it by.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, window_function

import clvp_fast
from clvp_fast.ops.log_mel import log_mel
from tests.data import data_path
from tests.kit import assert_within_budget, random, strided

RATE, FLOOR = 22050, 1e-5
PARAMETERS = ("window", "mel_filters", "mel_norms")


@dataclass(frozen=True)
class Path:
    """A backend on a device; `yardstick` is the backend whose errors on a CPU are the budget."""

    backend: str
    device: str
    yardstick: str
    doubles: bool = True

    def __call__(self, samples, **options):
        moved = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in options.items()
        }
        if samples.device.type != self.device:
            samples = samples.to(self.device)
        with clvp_fast.backend(self.backend):
            return log_mel(samples, **moved).cpu()


REFERENCE, TORCH = Path("reference", "cpu", "reference"), Path("torch", "cpu", "reference")


def filter_bank(n_fft, num_mels, scale="htk"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bands that are empty
        bank = mel_filter_bank(n_fft // 2 + 1, num_mels, 0.0, 8000.0, RATE, norm="slaney", mel_scale=scale)
    return torch.from_numpy(bank)


def settings(n_fft=1024, hop_length=256, num_mels=80, scale="htk", dtype=torch.float32, **changes):
    chosen = {
        "window": torch.from_numpy(window_function(n_fft, "hann")).to(dtype),
        "mel_filters": filter_bank(n_fft, num_mels, scale).to(dtype),
        "hop_length": hop_length,
        "mel_norms": random(num_mels, seed=9, dtype=dtype).abs() - 6,
        "log_floor": FLOOR,
    }
    return chosen | changes


def exact(samples, **options):
    """The reference in float64; on samples in float32, their values exactly."""
    samples = samples.double() / 32768 if samples.dtype == torch.int16 else samples.double()
    wide = {
        name: value.double() if name in PARAMETERS and value is not None else value for name, value in options.items()
    }
    return REFERENCE(samples, **wide | {"compute_dtype": torch.float64, "dtype": torch.float64})


def check(path, samples, **options):
    """Within the budget of float32, or 1e-9 in float64."""
    got, expected = path(samples, **options), exact(samples, **options)
    assert got.is_contiguous()
    if got.dtype == torch.float64:
        assert got.shape == expected.shape and not (~((got - expected).abs() <= 1e-9)).any()
        return got
    with clvp_fast.backend(path.yardstick):
        baseline = log_mel(samples.contiguous(), **options)
    assert_within_budget(got, expected, baseline.clone())
    return got


def noise(*shape, seed=0, scale=0.1):
    return random(*shape, seed=seed, scale=scale)


def tone(length, frequency):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(length) / RATE + 0.3)


BIN = RATE / 1024
SIGNALS = {
    "impulses": np.where(np.arange(6000) % 1009 == 7, 1.0, 0.0),
    "one impulse": np.where(np.arange(6000) == 3000, 1.0, 0.0),
    "sine at a bin": tone(6000, 50 * BIN),
    "sine between bins": tone(6000, 50.5 * BIN),
    "sine at the first bin": tone(6000, 0),
    "sine near the last bin": tone(6000, 371 * BIN),
    "chirp": 0.5 * np.sin(2 * np.pi * np.cumsum(np.linspace(50, 10000, 6000)) / RATE),
    "white noise": noise(6000).double().numpy(),
    "loud noise": noise(6000, scale=1000.0).double().numpy(),
    "silence": np.zeros(6000),
    "clipped": np.clip(5 * tone(6000, 441), -1, 1),
    "tiny": noise(6000, scale=1e-6).double().numpy(),
    "noise under a tone": tone(6000, 441) + noise(6000, scale=1e-3).double().numpy(),
}


def bad_frames(length, bad, n_fft, hop_length):
    """Frames that reach one of the places `bad`, found by padding a picture of them."""
    picture = np.zeros(length)
    picture[bad] = 1
    padded = np.pad(picture, n_fft // 2, mode="reflect")
    return torch.tensor(
        [padded[start : start + n_fft].any() for start in range(0, 1 + len(padded) - n_fft, hop_length)]
    )


class Bodies:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("signal", SIGNALS)
    def test_signals(self, path, signal, dtype):
        if dtype == torch.float64 and not path.doubles:
            pytest.skip("this path has no float64")
        samples = torch.from_numpy(SIGNALS[signal])[None].to(dtype)
        # What is tiny is not to be lost under the floor.
        floor = 1e-16 if signal == "tiny" else FLOOR
        check(path, samples, **settings(dtype=dtype, log_floor=floor))

    @pytest.mark.parametrize("time", [1, 2, 3, 127, 128, 129, 255, 256, 257, 1021])
    def test_short_clips_reflect_again_and_again(self, path, time):
        for n_fft, hop_length in ((256, 60), (256, 128), (1024, 1), (512, 300)):
            check(path, noise(3, time, seed=time), **settings(n_fft, hop_length if time > 9 else 2))

    def test_a_minute(self, path):
        check(path, noise(1, 60 * RATE), **settings())

    @pytest.mark.parametrize("num_mels", [1, 80, 128, 256])
    @pytest.mark.parametrize("n_fft", [256, 512, 1024, 2048, 4096])
    def test_grid(self, path, n_fft, num_mels):
        for hop_length, time in ((1, 20), (57, n_fft), (n_fft // 4, 2 * n_fft + 3), (n_fft + 13, 5 * n_fft)):
            # In a narrow band the largest error is a matter of luck where little is heard: the floor lies near.
            options = settings(n_fft, hop_length, num_mels, log_floor=1e-3)
            check(path, noise(3, time, seed=hop_length), **options)

    @pytest.mark.parametrize("scale", ["htk", "slaney", "kaldi"])
    def test_mel_scales_without_norms(self, path, scale):
        options = settings(scale=scale)
        del options["mel_norms"]
        check(path, noise(2, 5000), **options)

    def test_dense_and_negative_filters(self, path):
        """Weights that are no triangles; and a power that they make negative is under the floor."""
        filters = noise(513, 40, scale=1.0).abs()
        filters[:, 0] *= -1
        got = check(path, noise(2, 5000), **settings(num_mels=40, mel_filters=filters, mel_norms=None))
        assert torch.equal(got[:, 0], torch.full_like(got[:, 0], FLOOR).log())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
    def test_unequal_rows_and_nothing_is_read_past_them(self, path, dtype):
        lengths = torch.tensor([3000, 1, 128, 129, 2999, 700, 2, 1024])
        samples = noise(8, 3000)
        samples = (samples * 9000).short() if dtype == torch.int16 else samples
        poisoned = samples.clone()
        for row, length in zip(poisoned, lengths, strict=True):
            row[length:] = 32767 if dtype == torch.int16 else torch.nan
        for options in (settings(256, 60), settings(decibels=True, top_db=12.0)):
            for integers in (torch.int64, torch.int32):
                got = check(path, poisoned, lengths=lengths.to(integers), **options)
            for row, length, mel in zip(samples, lengths.tolist(), got, strict=True):
                frames = 1 + length // options["hop_length"]
                alone = path(row[None, :length], **options)[0]
                torch.testing.assert_close(mel[:, :frames], alone, rtol=1e-5, atol=1e-5)
                assert not mel[:, frames:].any()

    def test_int16_is_scaled(self, path):
        samples = (noise(3, 2000, scale=5000.0)).short()
        samples[0, :3] = torch.tensor([-32768, 32767, 0], dtype=torch.int16)
        for compute in (torch.float32, torch.float64)[: 1 + path.doubles]:
            check(path, samples, compute_dtype=compute, **settings())

    def test_strided_rows(self, path):
        samples, options = noise(4, 1500), settings()
        expected = path(samples, **options)
        turned = {name: strided(options[name][None])[0] for name in PARAMETERS}
        columns = {"mel_filters": options["mel_filters"].T.contiguous().T, "window": turned["window"]}
        for view in (strided(samples.to(path.device)), strided(samples.T.contiguous().to(path.device)).T):
            torch.testing.assert_close(path(view, **options), expected, rtol=1e-6, atol=1e-6)
            for change in (turned, columns):
                torch.testing.assert_close(path(view, **options | change), expected, rtol=1e-6, atol=1e-6)
        broadcast = path(samples[1:2].to(path.device).expand(4, -1), **options)
        torch.testing.assert_close(broadcast, expected[1:2].expand(4, -1, -1), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("top_db", [None, 0.0, 7.5, 80.0])
    def test_decibels(self, path, top_db):
        samples = torch.stack([noise(4000), noise(4000, scale=0.001), torch.zeros(4000)])
        options = settings(decibels=True, top_db=top_db)
        for lengths in (None, torch.tensor([4000, 1700, 300])):
            got = check(path, samples, lengths=lengths, **options)
            if top_db is not None:
                levels = got[0] * options["mel_norms"][:, None]
                assert (levels.max() - levels.min() - top_db).abs() < 1e-3 or top_db == 80

    def test_what_lies_past_a_row_is_not_its_loudest(self, path):
        """A click that only frames past the row's end reach, as they reflect it."""
        samples = noise(2, 3000)
        samples[0, 150] = 1000.0
        options = settings(256, 300, decibels=True, top_db=5.0, lengths=torch.tensor([700, 3000]))
        got = check(path, samples, **options)
        calm = samples.clone()
        calm[0, 150] = 0
        torch.testing.assert_close(got, path(calm, **options))

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_bad_samples_spoil_the_frames_that_reach_them_alone(self, path, bad):
        samples, places = noise(3, 3000), {0: [0], 1: [1400, 1401], 2: [2999]}
        # A frame may be transformed with its neighbour, or with one that is a vector's length away.
        for options in (settings(), settings(256, 300), settings(256, 40), settings(decibels=True, top_db=10.0)):
            spoilt, finite = samples.clone(), exact(samples, **options)
            n_fft, hop_length = options["window"].numel(), options["hop_length"]
            spoils = torch.stack([bad_frames(3000, where, n_fft, hop_length) for where in places.values()])
            for row, where in places.items():
                spoilt[row, where] = bad
            got, expected = path(spoilt, **options), exact(spoilt, **options)
            assert torch.equal(got.isnan(), spoils[:, None].expand_as(got)) and spoils.any(1).tolist()[0]
            assert torch.equal(expected.isnan(), got.isnan())
            kept = ~spoils[:, None].expand_as(got)
            assert (got[kept] - expected[kept]).abs().max() < 1e-3
            if "top_db" not in options:
                assert torch.equal(expected[kept], finite[kept])

    def test_bad_rows_leave_the_others(self, path):
        samples = noise(4, 1000)
        samples[1], samples[2, 500] = torch.nan, torch.inf
        for options in (settings(), settings(decibels=True, top_db=10.0)):
            got, clean = path(samples, **options), path(samples[[0, 3]], **options)
            assert got[1].isnan().all() and torch.equal(got[[0, 3]], clean)

    def test_an_empty_band_is_at_the_floor(self, path):
        options = settings()
        options["mel_filters"][:, [0, 17, 79]] = 0
        got = check(path, noise(2, 3000), **options)
        level = (torch.tensor(FLOOR).log() / options["mel_norms"])[[0, 17, 79], None]
        torch.testing.assert_close(got[:, [0, 17, 79]], level.expand(2, -1, got.shape[2]))
        assert (got[:, 1] * options["mel_norms"][1] > -9).all()

    @pytest.mark.parametrize("n_fft", [256, 512, 1024, 2048, 4096])
    def test_energy_is_kept(self, path, n_fft):
        """Parseval: the bins' power, those between first and last twice, is n_fft times the frame's energy."""
        samples, hop_length, window = noise(2, 3 * n_fft, scale=1.0), n_fft // 2, settings(n_fft)["window"]
        twice = torch.full((n_fft // 2 + 1,), 2.0)
        twice[[0, -1]] = 1
        frames = samples.unfold(1, n_fft, hop_length) * window
        energy = n_fft * frames.double().square().sum(-1)
        for filters in (twice[:, None], torch.diag(twice)[:, :256]):
            if filters.shape[1] not in (1, n_fft // 2 + 1):
                continue
            mel = path(samples, window=window, mel_filters=filters, hop_length=hop_length, log_floor=1e-20)
            inner = mel[:, :, 1:-1].double().exp().sum(1)
            torch.testing.assert_close(inner, energy, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_result_dtypes(self, path, dtype):
        for compute in (torch.float32, torch.float64)[: 1 + path.doubles]:
            assert check(path, noise(2, 3000), dtype=dtype, compute_dtype=compute, **settings()).dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_sample_dtypes(self, path, dtype):
        """What float32 holds is the same; parameters may be of other dtypes than the samples."""
        samples = noise(2, 3000).to(dtype)
        expected = path(samples.float(), **settings())
        for parameters in (torch.float32, torch.float64):
            got = path(samples, **settings(dtype=parameters) | {"compute_dtype": torch.float32})
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert path(samples.float(), **settings()).dtype == torch.float32

    def test_no_rows(self, path):
        for options in ({}, {"lengths": torch.zeros(0, dtype=torch.long)}, {"dtype": torch.float16}):
            got = path(torch.zeros(0, 1000), **settings(), **options)
            assert got.shape == (0, 80, 4) and got.dtype == options.get("dtype", torch.float32)

    def test_autocast_changes_nothing(self, path):
        samples = noise(2, 3000)
        expected = path(samples, **settings())
        with torch.autocast(path.device, dtype=torch.bfloat16):
            assert torch.equal(path(samples, **settings()), expected)

    @pytest.mark.parametrize("name", ["audio/lj_voice_1.flac", "audio/1272-128104-0000.flac"])
    def test_speech(self, path, name):
        soundfile = pytest.importorskip("soundfile")
        samples, _ = soundfile.read(data_path(name), dtype="float32")
        check(path, torch.from_numpy(samples)[None, : 6 * RATE], **settings())
        integers = torch.from_numpy(np.round(samples * 32767).astype(np.int16))[None, : 6 * RATE]
        check(path, integers, **settings(decibels=True, top_db=80.0))
