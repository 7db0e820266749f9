"""The CUDA kernel's blocks, run on the CPU by `log_mel_emulator.cpp`, against the float64 reference."""

import ctypes
import math

import numpy as np
import pytest
import torch

import clvp_fast
from clvp_fast import native
from clvp_fast.ops.log_mel import log_mel
from tests.csrc import compiled
from tests.kit import assert_within_budget, random

SIZES = (256, 512, 1024, 2048, 4096)
DTYPES = {
    torch.float32: native.FLOAT32,
    torch.int16: native.INT16,
    torch.float16: native.FLOAT16,
    torch.bfloat16: native.BFLOAT16,
}
GUARD = 64
# The order of all, how many blocks there are at most, and whether a tile is dealt to several of them.
ORDER = {"seed": 0, "most_blocks": 65535, "in_parts": False}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    library = ctypes.CDLL(str(compiled.emulator("log_mel_emulator.cpp", tmp_path_factory)))
    library.emulate_log_mel.argtypes = [
        ctypes.POINTER(native.LogMelCall),
        ctypes.c_uint32,
        ctypes.c_int64,
        ctypes.c_int32,
    ]
    library.bank_passes.argtypes = [ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)]
    library.bank_passes.restype = None
    return library


def triangles(n_fft, num_mels, seed=0):
    """Make filters `[num_mels, bins]` float32 and bands `[num_mels, 2]` int32; bins beyond a band hold NaN.

    The widths grow with the channel, as those of mel filters do; every fifth band of more than four is empty.
    """
    bins = n_fft // 2 + 1
    edges = (np.linspace(0, 1, num_mels + 2) ** 2 * (bins - 1)).astype(int)
    filters, bands = torch.full((num_mels, bins), math.nan), torch.zeros(num_mels, 2, dtype=torch.int32)
    for m in range(num_mels):
        first, last = edges[m], max(edges[m + 2], edges[m] + 1) + (m == num_mels - 1)
        if m % 5 == 4:
            last = first
        bands[m] = torch.tensor([first, last])
        filters[m, first:last] = random(last - first, seed=seed + m).abs() / n_fft
    return filters, bands


def run(emulator, samples, *, window, filters, bands, hop, lengths=None, norms=None, floor=1e-5, **options):
    """Return features `[batch, num_mels, frames]` of the emulated kernel; the output starts as NaN, between guards."""
    features_dtype = options.get("features_dtype", torch.float32)
    (batch, time), n_fft, num_mels = samples.shape, len(window), len(filters)
    frames = 1 + time // hop
    angle = torch.arange(n_fft, dtype=torch.float64) * (2 * math.pi / n_fft)
    twiddles = torch.stack((angle.cos(), -angle.sin()), 1).float()
    size = batch * num_mels * frames
    buffer = torch.full((size + 2 * GUARD,), math.nan, dtype=features_dtype)
    maxima = torch.zeros(batch, 2, dtype=torch.int32)
    top_db = options.get("top_db", -1.0)
    call = native.LogMelCall(
        samples=samples.data_ptr(),
        lengths=None if lengths is None else lengths.data_ptr(),
        window=window.data_ptr(),
        twiddles=twiddles.data_ptr(),
        mel_filters=filters.data_ptr(),
        bands=bands.data_ptr(),
        mel_norms=None if norms is None else norms.data_ptr(),
        features=buffer[GUARD:].data_ptr(),
        clip_maxima=maxima.data_ptr() if top_db >= 0 else None,
        batch=batch,
        time=time,
        samples_stride=samples.stride(0),
        hop_length=hop,
        frames=frames,
        n_fft=n_fft,
        num_mels=num_mels,
        samples_dtype=DTYPES[samples.dtype],
        compute_dtype=native.FLOAT32,
        features_dtype=DTYPES[features_dtype],
        decibels=options.get("decibels", 0),
        log_floor=floor,
        top_db=top_db,
    )
    assert emulator.emulate_log_mel(call, *(options.get(name, value) for name, value in ORDER.items())) == 0
    assert buffer[:GUARD].isnan().all() and buffer[GUARD + size :].isnan().all(), "written outside the features"
    return buffer[GUARD : GUARD + size].view(batch, num_mels, frames).clone()


def expected(backend, dtype, samples, *, window, filters, bands, hop, lengths=None, norms=None, floor=1e-5, **options):
    """Compute the same by the operator in `dtype`: features, and which frames are true `[batch, 1, frames]`."""
    samples = samples.to(dtype) / 32768 if samples.dtype == torch.int16 else samples.to(dtype)
    if lengths is None:
        lengths = torch.full((len(samples),), samples.shape[1])
    named = {"window": window.to(dtype), "mel_filters": filters.nan_to_num(0).to(dtype).T, "hop_length": hop}
    with clvp_fast.backend(backend):
        mel = log_mel(samples, lengths=lengths, log_floor=floor, **named)
    true = (torch.arange(mel.shape[2]) <= (lengths // hop)[:, None])[:, None]
    if options.get("decibels"):
        mel = mel * (10 / math.log(10))
    if options.get("top_db", -1) >= 0:
        loudest = torch.where(true & ~mel.isnan(), mel, -math.inf).amax((1, 2), keepdim=True)
        mel = torch.where(mel < loudest - options["top_db"], loudest - options["top_db"], mel)
    if norms is not None:
        mel = mel / norms.to(dtype)[:, None]
    return torch.where(true, mel, 0), true


def compare(emulator, samples, **arguments):
    got = run(emulator, samples, **arguments)
    reference, true = expected("reference", torch.float64, samples, **arguments)
    baseline, _ = expected("torch", torch.float32, samples, **arguments)
    baseline = baseline.to(got.dtype)
    assert torch.equal(got.isnan(), reference.isnan())
    assert not got[~true.expand_as(got)].any(), "frames past a row's last are 0"
    finite = ~got.isnan()
    assert_within_budget(got[finite], reference[finite], baseline[finite])
    return got


def arguments(n_fft, num_mels=20, seed=0, window=None):
    filters, bands = triangles(n_fft, num_mels, seed)
    window = torch.hann_window(n_fft) if window is None else window
    return {"window": window, "filters": filters, "bands": bands, "norms": random(num_mels, seed=seed + 1) - 3}


@pytest.mark.parametrize("n_fft", SIZES)
@pytest.mark.parametrize("hop", ["n_fft / 4", 161, "n_fft + 7"])
def test_every_size_and_hop(emulator, n_fft, hop):
    hop = {"n_fft / 4": n_fft // 4, "n_fft + 7": n_fft + 7}.get(hop, hop)
    samples = random(2, 37 * hop + 5, seed=n_fft + hop, scale=0.1)
    compare(emulator, samples, hop=hop, seed=n_fft + hop, **arguments(n_fft, window=random(n_fft, seed=3)))


@pytest.mark.parametrize("n_fft", SIZES)
def test_lengths_shorter_than_the_padding(emulator, n_fft):
    lengths = torch.tensor([1, 2, 3, n_fft // 2, n_fft // 2 + 1, n_fft + 1, 99, 100, 101, 3 * n_fft])
    samples = random(len(lengths), int(lengths.max()), seed=5, scale=0.1)
    for row, length in zip(samples, lengths, strict=True):
        row[length:] = math.nan
    compare(emulator, samples, hop=100, lengths=lengths, most_blocks=3, **arguments(n_fft))


@pytest.mark.parametrize("n_fft", SIZES)
def test_a_frame_that_ends_at_the_last_sample_or_one_beside_it(emulator, n_fft):
    hop = n_fft // 4
    lengths = 7 * hop + n_fft // 2 + torch.tensor([-1, 0, 1])  # frame 7, the second of its pair
    samples = random(3, int(lengths.max()) + n_fft, seed=4, scale=0.1)
    for row, length in zip(samples, lengths, strict=True):
        row[length:] = math.nan
    compare(emulator, samples, hop=hop, lengths=lengths, **arguments(n_fft))


@pytest.mark.parametrize("n_fft", SIZES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_sample_spoils_the_frames_that_reach_it_and_no_other(emulator, n_fft, bad):
    hop = n_fft + 3  # each sample belongs to one frame, or to none
    samples = random(1, 40 * hop, seed=6, scale=0.1)
    spoilt = samples.clone()
    frames = [0, 3, 8, 10, 11, 17, 34, 40]
    for i, frame in enumerate(frames):
        place = frame * hop + (37 * i) % (n_fft // 2 - 2) - (n_fft // 2 - 1 if frame == 40 else 0)
        spoilt[0, place] = bad
    got = run(emulator, spoilt, hop=hop, **arguments(n_fft))
    assert got[0].isnan().all(0).nonzero().flatten().tolist() == frames
    assert got[0].isnan().any(0).nonzero().flatten().tolist() == frames
    clean = [frame for frame in range(41) if frame not in frames]
    reference, _ = expected("reference", torch.float64, samples, hop=hop, **arguments(n_fft))
    assert (got[:, :, clean] - reference[:, :, clean]).abs().max() < 1e-3


@pytest.mark.parametrize("n_fft", SIZES)
def test_int16(emulator, n_fft):
    samples = (random(3, 5000, seed=7, scale=0.3).clamp(-1, 1) * 32767).to(torch.int16)
    compare(emulator, samples, hop=n_fft // 3, lengths=torch.tensor([5000, 4999, 77]), **arguments(n_fft, 80))


@pytest.mark.parametrize("num_mels", [1, 2, 33, 80, 256])
@pytest.mark.parametrize("n_fft", [256, 4096])
def test_channels(emulator, n_fft, num_mels):
    compare(emulator, random(2, 20 * n_fft, seed=8), hop=n_fft // 2, **arguments(n_fft, num_mels))


@pytest.mark.parametrize("n_fft", [2048, 4096])
def test_a_wide_band_is_summed_in_short_chains(emulator, n_fft):
    """Put all bins into one band whose power is about 1.

    The error of its logarithm is then the relative one of the sum, about an ulp: four sums over the whole band have 1.2
    to 1.5, torch 1.1 to 1.4, and short chains less than one.
    """
    bins = n_fft // 2 + 1
    filters, bands = random(1, bins, seed=1).abs(), torch.tensor([[0, bins]], dtype=torch.int32)
    given = {"window": torch.hann_window(n_fft), "bands": bands, "hop": n_fft // 8}
    samples = random(4, 8 * n_fft, seed=2)
    filters /= expected("reference", torch.float64, samples, filters=filters, **given)[0].mean().exp().float()
    reference, _ = expected("reference", torch.float64, samples, filters=filters, **given)
    error = run(emulator, samples, filters=filters, **given) - reference
    assert reference.abs().max() < 0.5 and error.square().mean().sqrt() < 1.1 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize("top_db", [-1.0, 0.0, 30.0])
def test_decibels(emulator, features_dtype, with_norms, top_db):
    named = arguments(1024)
    named["norms"] = random(20, seed=9) if with_norms else None  # of both signs
    samples = random(3, 9000, seed=10) * torch.logspace(0, -5, 9000)
    lengths = torch.tensor([9000, 300, 8191])
    options = {"decibels": 1, "top_db": top_db, "features_dtype": features_dtype, "floor": 1e-10}
    compare(emulator, samples, hop=256, lengths=lengths, most_blocks=2, **named, **options)


def test_top_db_leaves_bad_frames_out(emulator):
    samples = random(2, 9000, seed=11) * torch.logspace(0, -5, 9000)
    samples[0, 700], samples[1] = math.inf, math.nan
    got = compare(emulator, samples, hop=256, decibels=1, top_db=20.0, floor=1e-10, **arguments(1024))
    assert got[1].isnan().all() and got[0].isnan().any() and not got[0].isnan().all()


def test_order_of_threads_and_number_of_blocks_do_not_matter(emulator):
    for n_fft in SIZES:
        named = arguments(n_fft) | {"hop": n_fft // 4, "top_db": 40.0, "decibels": 1}
        samples = random(2, 11 * n_fft, seed=12)
        samples[1, 2000] = math.nan
        first = run(emulator, samples, **named)
        for seed in range(1, 5):
            again = run(emulator, samples, seed=1000 * seed, most_blocks=1 + seed % 3, in_parts=seed > 2, **named)
            assert torch.equal(first.view(torch.int32), again.view(torch.int32))


def test_rows_any_stride_apart(emulator):
    samples = random(4, 3000, seed=13)
    named = arguments(512) | {"hop": 128}
    straight = run(emulator, samples, **named)
    assert torch.equal(run(emulator, samples[::2], **named), straight[::2])
    assert torch.equal(run(emulator, samples[1:2].expand(3, -1), **named), straight[1:2].expand(3, -1, -1))


@pytest.mark.parametrize("n_fft", SIZES)
def test_energy(emulator, n_fft):
    """Parseval: bins weighted 1, 2, ..., 2, 1 sum to n_fft times the energy of the windowed frame."""
    weights = torch.full((1, n_fft // 2 + 1), 2.0)
    weights[0, [0, -1]] = 1
    bands = torch.tensor([[0, n_fft // 2 + 1]], dtype=torch.int32)
    samples, window = random(1, 6 * n_fft, seed=14), random(n_fft, seed=15)
    got = run(emulator, samples, window=window, filters=weights, bands=bands, hop=n_fft // 2)[0, 0, 1:-1]
    frames = samples[0].double().unfold(0, n_fft, n_fft // 2)[: len(got)]
    energy = (frames * window.double()).square().sum(1) * n_fft
    assert (got.double() - energy.log()).abs().max() < 3e-6


@pytest.mark.parametrize("n_fft", SIZES)
def test_the_exchange_meets_every_bank_once(emulator, n_fft):
    most = (ctypes.c_int32 * 3)()
    emulator.bank_passes(n_fft, most)
    # Powers of a folded frame lie FOLD rows apart.
    assert list(most) == [1, 1, {2048: 2, 4096: 4}.get(n_fft, 1)]
