"""`log_mel`: what every backend is held to, and the reference against transformers' numpy spectrogram.

All is measured against the reference in float64; another implementation in float32 sets what float32 may miss it by.
"""

import warnings

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

import clvp_fast
from clvp_fast.ops.log_mel import log_mel
from tests.data import data_path
from tests.kit import assert_within_budget, random, strided
from tests.kit.backends import on
from tests.kit.device import EMULATED

RATE, FLOOR = 22050, 1e-5
# The logarithm of a power p is off by the spectrum's error over the root of p. Of many values the largest error is that
# of the few that are least heard, and whether it is twice another implementation's is a matter of luck. Above this
# floor, for budgets of the largest of many, thousands of values are about equally exact.
HEARD = 1e-3
PARAMETERS = ("window", "mel_filters", "mel_norms")


def over(*names):
    """Mark a case on these backends; its CPU's kernel on one instruction set, as CI runs all of them again.

    A GPU's kernel is interpreted where tests/ptx/plugin.py executes what nvcc makes of it.
    """
    interpreted = ("interpreted",) if "gpu" in names and EMULATED else ()
    return lambda case: on(*names, *interpreted, sets=False)(pytest.mark.usefixtures("cuda_part")(case))


EVERY = over("reference", "torch", "cpu", "gpu")


def doubles(backend):
    """Tell whether a backend computes in float64."""
    return backend.name not in ("interpreted", "gpu")


def to(device, options):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def run(backend, samples, **options):
    """Return the features, on the CPU, of samples anywhere; a view that is on the device already keeps its strides."""
    if samples.device.type != backend.device:
        samples = samples.to(backend.device)
    return log_mel(samples, **to(backend.device, options)).cpu()


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
    """Compute the reference in float64; on samples in float32, with exactly their values."""
    samples = samples.double() / 32768 if samples.dtype == torch.int16 else samples.double()
    wide = {
        name: value.double() if name in PARAMETERS and value is not None else value for name, value in options.items()
    }
    with clvp_fast.backend("reference"):
        return log_mel(samples, **wide | {"compute_dtype": torch.float64, "dtype": torch.float64})


def check(backend, samples, **options):
    """Check features within the budget of float32, or 1e-9 in float64."""
    got, expected = run(backend, samples, **options), exact(samples, **options)
    assert got.is_contiguous()
    if got.dtype == torch.float64:
        assert got.shape == expected.shape and not (~((got - expected).abs() <= 1e-9)).any()
        return got
    with clvp_fast.backend("reference" if backend.name == "torch" else "torch"):
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
    """Return frames that reach one of the places `bad`, found by padding a picture of them."""
    picture = np.zeros(length)
    picture[bad] = 1
    padded = np.pad(picture, n_fft // 2, mode="reflect")
    return torch.tensor(
        [padded[start : start + n_fft].any() for start in range(0, 1 + len(padded) - n_fft, hop_length)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("signal", SIGNALS)
@EVERY
def test_signals(backend, signal, dtype):
    if dtype == torch.float64 and not doubles(backend):
        pytest.skip("it computes in float32")
    samples = torch.from_numpy(SIGNALS[signal])[None].to(dtype)
    # Tiny values must stay above the floor.
    floor = 1e-16 if signal == "tiny" else FLOOR
    check(backend, samples, **settings(dtype=dtype, log_floor=floor))


@pytest.mark.parametrize("time", [1, 2, 3, 127, 128, 129, 255, 256, 257, 1021])
@EVERY
def test_short_clips_reflect_again_and_again(backend, time):
    for n_fft, hop_length in ((256, 60), (256, 128), (1024, 1), (512, 300)):
        # Between the lines of what repeats itself little is heard.
        options = settings(n_fft, hop_length if time > 9 else 2, log_floor=HEARD)
        check(backend, noise(3, time, seed=time), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@pytest.mark.parametrize("n_fft", [256, 512, 1024, 2048, 4096])
@EVERY
def test_a_clip_of_half_a_frame(backend, n_fft, dtype):
    """Reflect it at both ends, as long as it is and no further."""
    samples = noise(2, n_fft // 2)
    samples = (9000 * samples).short() if dtype == torch.int16 else samples
    check(backend, samples, **settings(n_fft, n_fft // 2, log_floor=HEARD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@pytest.mark.parametrize("n_fft", [256, 512, 1024, 2048, 4096])
@EVERY
def test_one_bin(backend, n_fft, dtype):
    """Let all that is asked for end with a bin; a kernel leaves out those behind, some at a time."""
    samples = (9000 * noise(2, n_fft)).short() if dtype == torch.int16 else noise(2, n_fft)
    for last in range(n_fft // 8, n_fft // 2 + 1, n_fft // 8):
        filters = torch.zeros(n_fft // 2 + 1, 1)
        filters[last] = 1.0
        check(backend, samples, **settings(n_fft, n_fft // 2, 1, mel_filters=filters, mel_norms=None))


@EVERY
def test_a_minute(backend):
    check(backend, noise(1, 60 * RATE), **settings(log_floor=HEARD))


@pytest.mark.parametrize("num_mels", [1, 80, 128, 256])
@pytest.mark.parametrize("n_fft", [256, 512, 1024, 2048, 4096])
@EVERY
def test_grid(backend, n_fft, num_mels):
    for hop_length, time in ((1, 20), (57, n_fft), (n_fft // 4, 2 * n_fft + 3), (n_fft + 13, 5 * n_fft)):
        options = settings(n_fft, hop_length, num_mels, log_floor=HEARD)
        check(backend, noise(3, time, seed=hop_length), **options)


@pytest.mark.parametrize("scale", ["htk", "slaney", "kaldi"])
@EVERY
def test_mel_scales_without_norms(backend, scale):
    options = settings(scale=scale)
    del options["mel_norms"]
    check(backend, noise(2, 5000), **options)


@EVERY
def test_dense_and_negative_filters(backend):
    """Use weights that are no triangles; a power that they make negative is below the floor."""
    filters = noise(513, 40, scale=1.0).abs()
    filters[:, 0] *= -1
    got = check(backend, noise(2, 5000), **settings(num_mels=40, mel_filters=filters, mel_norms=None))
    assert torch.equal(got[:, 0], torch.full_like(got[:, 0], FLOOR).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@EVERY
def test_unequal_rows_and_nothing_is_read_past_them(backend, dtype):
    lengths = torch.tensor([3000, 1, 128, 129, 2999, 700, 2, 1024])
    samples = noise(8, 3000)
    samples = (samples * 9000).short() if dtype == torch.int16 else samples
    poisoned = samples.clone()
    for row, length in zip(poisoned, lengths, strict=True):
        row[length:] = 32767 if dtype == torch.int16 else torch.nan
    for options in (settings(256, 60), settings(decibels=True, top_db=12.0)):
        for integers in (torch.int64, torch.int32):
            got = check(backend, poisoned, lengths=lengths.to(integers), **options)
        for row, length, mel in zip(samples, lengths.tolist(), got, strict=True):
            frames = 1 + length // options["hop_length"]
            alone = run(backend, row[None, :length], **options)[0]
            torch.testing.assert_close(mel[:, :frames], alone, rtol=1e-5, atol=1e-5)
            assert not mel[:, frames:].any()


@EVERY
def test_int16_is_scaled(backend):
    samples = (noise(3, 2000, scale=5000.0)).short()
    samples[0, :3] = torch.tensor([-32768, 32767, 0], dtype=torch.int16)
    for compute in (torch.float32, torch.float64)[: 1 + doubles(backend)]:
        check(backend, samples, compute_dtype=compute, **settings())


@EVERY
def test_strided_rows(backend):
    samples, options = noise(4, 1500), settings()
    expected = run(backend, samples, **options)
    turned = {name: strided(options[name][None])[0] for name in PARAMETERS}
    columns = {"mel_filters": options["mel_filters"].T.contiguous().T, "window": turned["window"]}
    for view in (strided(samples.to(backend.device)), strided(samples.T.contiguous().to(backend.device)).T):
        torch.testing.assert_close(run(backend, view, **options), expected, rtol=1e-6, atol=1e-6)
        for change in (turned, columns):
            torch.testing.assert_close(run(backend, view, **options | change), expected, rtol=1e-6, atol=1e-6)
    broadcast = run(backend, samples[1:2].to(backend.device).expand(4, -1), **options)
    torch.testing.assert_close(broadcast, expected[1:2].expand(4, -1, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_db", [None, 0.0, 7.5, 80.0])
@EVERY
def test_decibels(backend, top_db):
    samples = torch.stack([noise(4000), noise(4000, scale=0.001), torch.zeros(4000)])
    options = settings(decibels=True, top_db=top_db)
    for lengths in (None, torch.tensor([4000, 1700, 300])):
        got = check(backend, samples, lengths=lengths, **options)
        if top_db is not None:
            levels = got[0] * options["mel_norms"][:, None]
            assert (levels.max() - levels.min() - top_db).abs() < 1e-3 or top_db == 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
@EVERY
def test_a_loudest_value_of_0_db(backend, dtype):
    """Raise to a bound below it; an impulse at the begin of a frame has one power in all bins."""
    samples, filters = torch.zeros(1, 2048, dtype=dtype), torch.zeros(513, 2)
    samples[0, 512], filters[5, 0], filters[5, 1] = 16384 if dtype == torch.int16 else 0.5, 4.0, 4e-4
    options = dict(window=torch.ones(1024), mel_filters=filters, hop_length=1024, decibels=True, log_floor=FLOOR)
    got = run(backend, samples, top_db=20.0, **options)
    torch.testing.assert_close(got[0], torch.tensor([[0.0, 0.0, -20.0], [-20.0, -20.0, -20.0]]), rtol=0, atol=1e-4)


@EVERY
def test_the_loudest_frame_lies_within_the_row(backend):
    """Put a click where only frames past the row's end reach, as they reflect it."""
    samples = noise(2, 3000)
    samples[0, 150] = 1000.0
    options = settings(256, 300, decibels=True, top_db=5.0, lengths=torch.tensor([700, 3000]))
    got = check(backend, samples, **options)
    calm = samples.clone()
    calm[0, 150] = 0
    torch.testing.assert_close(got, run(backend, calm, **options))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@EVERY
def test_bad_samples_spoil_the_frames_that_reach_them_alone(backend, bad):
    samples, places = noise(3, 3000), {0: [0], 1: [1400, 1401], 2: [2999]}
    # A frame may be transformed with its neighbour, or with one that is a vector's length away.
    for options in (settings(), settings(256, 300), settings(256, 40), settings(decibels=True, top_db=10.0)):
        spoilt, finite = samples.clone(), exact(samples, **options)
        n_fft, hop_length = options["window"].numel(), options["hop_length"]
        spoils = torch.stack([bad_frames(3000, where, n_fft, hop_length) for where in places.values()])
        for row, where in places.items():
            spoilt[row, where] = bad
        got, expected = run(backend, spoilt, **options), exact(spoilt, **options)
        assert torch.equal(got.isnan(), spoils[:, None].expand_as(got)) and spoils.any(1).tolist()[0]
        assert torch.equal(expected.isnan(), got.isnan())
        kept = ~spoils[:, None].expand_as(got)
        assert (got[kept] - expected[kept]).abs().max() < 1e-3
        if "top_db" not in options:
            assert torch.equal(expected[kept], finite[kept])


@EVERY
def test_bad_rows_leave_the_others(backend):
    samples = noise(4, 1000)
    samples[1], samples[2, 500] = torch.nan, torch.inf
    for options in (settings(), settings(decibels=True, top_db=10.0)):
        got, clean = run(backend, samples, **options), run(backend, samples[[0, 3]], **options)
        assert got[1].isnan().all() and torch.equal(got[[0, 3]], clean)


@EVERY
def test_an_empty_band_is_at_the_floor(backend):
    options = settings()
    options["mel_filters"][:, [0, 17, 79]] = 0
    got = check(backend, noise(2, 3000), **options)
    level = (torch.tensor(FLOOR).log() / options["mel_norms"])[[0, 17, 79], None]
    torch.testing.assert_close(got[:, [0, 17, 79]], level.expand(2, -1, got.shape[2]))
    assert (got[:, 1] * options["mel_norms"][1] > -9).all()


@pytest.mark.parametrize("n_fft", [256, 512, 1024, 2048, 4096])
@EVERY
def test_energy_is_kept(backend, n_fft):
    """Check Parseval: the bins' power, those between first and last twice, is n_fft times the frame's energy."""
    samples, hop_length, window = noise(2, 3 * n_fft, scale=1.0), n_fft // 2, settings(n_fft)["window"]
    twice = torch.full((n_fft // 2 + 1,), 2.0)
    twice[[0, -1]] = 1
    frames = samples.unfold(1, n_fft, hop_length) * window
    energy = n_fft * frames.double().square().sum(-1)
    for filters in (twice[:, None], torch.diag(twice)[:, :256]):
        if filters.shape[1] not in (1, n_fft // 2 + 1):
            continue
        mel = run(backend, samples, window=window, mel_filters=filters, hop_length=hop_length, log_floor=1e-20)
        inner = mel[:, :, 1:-1].double().exp().sum(1)
        torch.testing.assert_close(inner, energy, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@EVERY
def test_result_dtypes(backend, dtype):
    for compute in (torch.float32, torch.float64)[: 1 + doubles(backend)]:
        assert check(backend, noise(2, 3000), dtype=dtype, compute_dtype=compute, **settings()).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@EVERY
def test_sample_dtypes(backend, dtype):
    """Get the same from values that float32 holds; parameters may be of other dtypes than the samples."""
    samples = noise(2, 3000).to(dtype)
    expected = run(backend, samples.float(), **settings())
    for parameters in (torch.float32, torch.float64):
        got = run(backend, samples, **settings(dtype=parameters) | {"compute_dtype": torch.float32})
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert run(backend, samples.float(), **settings()).dtype == torch.float32


@EVERY
def test_no_rows(backend):
    for options in ({}, {"lengths": torch.zeros(0, dtype=torch.long)}, {"dtype": torch.float16}):
        got = run(backend, torch.zeros(0, 1000), **settings(), **options)
        assert got.shape == (0, 80, 4) and got.dtype == options.get("dtype", torch.float32)


@EVERY
def test_autocast_changes_nothing(backend):
    samples = noise(2, 3000)
    expected = run(backend, samples, **settings())
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert torch.equal(run(backend, samples, **settings()), expected)


@pytest.mark.parametrize("name", ["audio/lj_voice_1.flac", "audio/1272-128104-0000.flac"])
@EVERY
def test_speech(backend, name):
    soundfile = pytest.importorskip("soundfile")
    samples, _ = soundfile.read(data_path(name), dtype="float32")
    check(backend, torch.from_numpy(samples)[None, : 6 * RATE], **settings())
    integers = torch.from_numpy(np.round(samples * 32767).astype(np.int16))[None, : 6 * RATE]
    check(backend, integers, **settings(decibels=True, top_db=80.0))


def numpy_spectrogram(row, options, **decibels):
    """Compute transformers' features, whose frames are of an even length."""
    power = spectrogram(
        row.double().numpy(),
        options["window"].numpy(),
        options["window"].numel(),
        options["hop_length"],
        power=2.0,
        mel_filters=options["mel_filters"].numpy(),
        mel_floor=FLOOR,
        log_mel="dB" if decibels else "log",
        min_value=FLOOR,
        dtype=np.float64,
        **decibels,
    )
    return power / options["mel_norms"].numpy()[:, None]


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("time", [1, 2, 5, 100, 999, 1000, 1021])
@pytest.mark.parametrize(("n_fft", "hop_length"), [(256, 60), (64, 64), (100, 7), (1024, 1), (128, 300)])
def test_reference_equals_the_numpy_spectrogram(time, n_fft, hop_length, scale):
    options = settings(n_fft, hop_length, 10, scale, dtype=torch.float64)
    samples = noise(2, time)
    for decibels in ({}, {"db_range": 200.0}, {"db_range": 10.0}):
        more = {"decibels": True, "top_db": decibels["db_range"]} if decibels else {}
        for row, mel in zip(samples, exact(samples, **options, **more), strict=True):
            expected = numpy_spectrogram(row, options, **decibels)
            assert mel.shape == expected.shape
            assert np.abs(mel.numpy() - expected).max() < 1e-5  # numpy's holds its spectrum in complex64


@pytest.mark.parametrize("n_fft", [2, 3, 101, 250])
@on("reference", "torch")
def test_frames_of_any_length(backend, n_fft):
    """Use lengths that no kernel serves, odd frames among them."""
    window, filters = noise(n_fft, scale=1.0).double(), noise(n_fft // 2 + 1, 4).double().abs()
    for time in (1, 50, 500):
        for lengths in (None, torch.tensor([time, (time + 1) // 2])):
            given = {"window": window, "mel_filters": filters, "hop_length": 7, "lengths": lengths}
            got, expected = run(backend, noise(2, time).double(), **given), exact(noise(2, time), **given)
            assert got.shape == (2, 4, 1 + (time - n_fft % 2) // 7)
            assert (got - expected).abs().max() < 1e-9
