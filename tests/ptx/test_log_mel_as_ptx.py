"""Cases that the tests of the operator cannot reach on a CPU's tensors: the log-mel kernel's results in half types."""

import pytest
import torch

from clvp_fast import native
from clvp_fast.ops.log_mel_tables import filters_and_bands, twiddles
from tests.ops.test_log_mel import noise, settings
from tests.ptx.mutants import mutants
from tests.ptx.regions import Fault

CODES = {torch.float32: native.FLOAT32, torch.float16: native.FLOAT16, torch.bfloat16: native.BFLOAT16}


def features(launcher, samples, dtype, n_fft, hop_length, top_db, multiprocessors=1):
    """Return the kernel's features, its launcher called as for tensors on a GPU; poisoned before."""
    options = settings(n_fft, hop_length)
    filters, bands = filters_and_bands(options["mel_filters"], torch.float32)
    circle = twiddles(n_fft, torch.float32, torch.device("cpu"))
    (batch, time), frames = samples.shape, 1 + samples.shape[1] // hop_length
    result, maxima = torch.full((batch, 80, frames), torch.nan, dtype=dtype), torch.zeros(batch, 2, dtype=torch.int32)
    integers = samples.dtype == torch.int16
    call = native.LogMelCall(
        samples=samples.data_ptr(), window=options["window"].data_ptr(), twiddles=circle.data_ptr(),
        mel_filters=filters.data_ptr(), bands=bands.data_ptr(), mel_norms=options["mel_norms"].data_ptr(),
        features=result.data_ptr(), clip_maxima=maxima.data_ptr() if top_db >= 0 else None, batch=batch, time=time,
        samples_stride=time, hop_length=hop_length, frames=frames, n_fft=n_fft, num_mels=80,
        samples_dtype=native.INT16 if integers else native.FLOAT32, compute_dtype=native.FLOAT32,
        features_dtype=CODES[dtype], decibels=top_db >= 0, log_floor=1e-5, top_db=top_db,
    )  # fmt: skip
    assert launcher.call("clvp_fast_log_mel_cuda", call, multiprocessors) == 0
    return result


@pytest.mark.parametrize("n_fft", [256, 512, 1024, 2048, 4096])
def test_bits_do_not_depend_on_the_number_of_blocks(launcher, n_fft):
    """Hold 24 multiprocessors, where a tile is one block's or two blocks', to one, where few blocks take all tiles."""
    samples = noise(2, 20 * n_fft)
    few = features(launcher, samples, torch.float32, n_fft, n_fft // 4, 40.0)
    many = features(launcher, samples, torch.float32, n_fft, n_fft // 4, 40.0, multiprocessors=24)
    torch.testing.assert_close(many, few, rtol=0, atol=0)


@pytest.mark.parametrize("n_fft", [256, 512, 1024, 2048, 4096])
def test_many_frames_of_a_short_clip(launcher, n_fft):
    """Reflect its samples again and again, and clamp more frames than a warp looks at in one round of its loop."""
    integers = (9000 * noise(1, 119)).short()
    samples = integers.float() / 32768
    whole = features(launcher, samples, torch.float32, n_fft, 1, 20.0, multiprocessors=8)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = features(launcher, integers, dtype, n_fft, 1, 20.0)  # a block takes several tiles
        bound = max(4 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(found.float(), whole, rtol=bound, atol=bound)


@pytest.mark.parametrize("top_db", [-1.0, 20.0])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("n_fft", [256, 512, 1024, 2048, 4096])
def test_half_types_are_float32_rounded(launcher, n_fft, integers, top_db):
    samples = noise(2, 3 * n_fft)
    samples[1, 200] = torch.nan
    samples = (9000 * samples.nan_to_num()).short() if integers else samples
    whole = features(launcher, samples, torch.float32, n_fft, n_fft // 2, top_db)
    assert integers or whole.isnan().any()
    for dtype in (torch.float16, torch.bfloat16):
        half = features(launcher, samples, dtype, n_fft, n_fft // 2, top_db)
        if top_db < 0:
            torch.testing.assert_close(half, whole.to(dtype), rtol=0, atol=0, equal_nan=True)
        else:  # what is raised to the loudest value less top_db was rounded before, and is divided after
            torch.testing.assert_close(half.float(), whole, rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


def test_the_fences_around_the_count_of_blocks_are_needed(launcher, monkeypatch):
    """Remove each: the last block of a row, which raises values that are too low, reads those of the others."""

    def run():
        return features(launcher, noise(1, 60 * 256), torch.float32, 256, 64, 20.0)

    def is_seen(fault):
        monkeypatch.setattr(launcher.options, "swap", (program, fault.build()))
        try:
            return not torch.equal(run(), right)
        except Fault:
            return True

    right = run()
    program = launcher.reports[-1].program
    fences = [fault for fault in mutants(program) if fault.what == "fence removed"]
    monkeypatch.setattr(launcher, "reports", [])  # what runs with a fault is no part of the coverage
    assert len(fences) == 2 and all(map(is_seen, fences))
