"""`log_mel`: reference against transformers' numpy spectrogram, torch path against the reference, what is refused."""

from importlib import import_module

import numpy as np
import pytest
import torch
from transformers.audio_utils import spectrogram

import clvp_fast
from clvp_fast.ops.log_mel import log_mel
from tests.ops.log_mel_bodies import FLOOR, TORCH, Bodies, Path, exact, noise, settings

PATHS = {"reference": Path("reference", "cpu", "torch"), "torch": TORCH}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


class TestPaths(Bodies):
    pass


def numpy_spectrogram(row, options, **decibels):
    """transformers', whose frames are of an even length."""
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
def test_frames_of_any_length(n_fft, path):
    """What no kernel serves, odd frames among it."""
    window, filters = noise(n_fft, scale=1.0).double(), noise(n_fft // 2 + 1, 4).double().abs()
    for time in (1, 50, 500):
        for lengths in (None, torch.tensor([time, (time + 1) // 2])):
            given = {"window": window, "mel_filters": filters, "hop_length": 7, "lengths": lengths}
            got, expected = path(noise(2, time).double(), **given), exact(noise(2, time), **given)
            assert got.shape == (2, 4, 1 + (time - n_fft % 2) // 7)
            assert (got - expected).abs().max() < 1e-9


def test_gradients():
    tensors = [noise(2, 40, scale=1.0), noise(16, scale=1.0), noise(9, 3, scale=1.0).abs(), noise(3, scale=1.0) + 3]
    tensors = [tensor.double().requires_grad_() for tensor in tensors]

    for more in ({}, {"decibels": True, "top_db": 5.0}):

        def call(samples, window, mel_filters, mel_norms, more=more):
            named = {"window": window, "mel_filters": mel_filters, "mel_norms": mel_norms}
            return log_mel(samples, lengths=torch.tensor([40, 17]), hop_length=9, **named, **more)

        assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("lengths", [None, torch.tensor([1000, 3, 400])], ids=["full", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16], ids=str)
def test_registered_operator(lengths, dtype):
    options = settings(256, 60, 10)
    samples = (noise(3, 1000) * 30000).to(dtype)
    inputs = (samples, *(options[name] for name in ("window", "mel_filters", "hop_length")))
    inputs += (lengths, options["mel_norms"], FLOOR)
    operator = torch.ops.clvp_fast.log_mel.default
    with clvp_fast.backend("torch"):
        for more in ((False, None, None, None), (True, 20.0, torch.float64, torch.float16)):
            torch.library.opcheck(operator, inputs + more, test_utils=("test_schema", "test_faketensor"))
            names = dict(zip(("decibels", "top_db", "compute_dtype", "dtype"), more, strict=True))
            got, expected = operator(*inputs, *more), log_mel(samples, lengths=lengths, **options, **names)
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_compiles_as_one_graph(backend):
    options = settings(256, 60, 10, decibels=True, top_db=30.0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(samples, lengths):
        return log_mel(samples, lengths=lengths, **options)

    lengths = torch.tensor([1000, 3, 400])
    with clvp_fast.backend(backend):
        for time in (1000, 800):
            row = noise(3, 1000)[:, :time], lengths.clamp(max=time)
            torch.testing.assert_close(compiled(*row), log_mel(row[0], lengths=row[1], **options))


BAD = [
    ({"samples": torch.zeros(5)}, ValueError, r"samples must have shape \[batch, time\] \(mono\) .*, not \[5\]"),
    ({"samples": torch.zeros(3, 2, 9)}, ValueError, r"\[batch, time\] \(mono\) with time > 0, not \[3, 2, 9\]"),
    ({"samples": torch.zeros(3, 0)}, ValueError, r"with time > 0, not \[3, 0\]"),
    *(
        ({"samples": torch.zeros(3, 9, dtype=dtype)}, TypeError, f"samples must be floating or int16, not {dtype}")
        for dtype in (torch.int32, torch.int64, torch.uint8, torch.int8, torch.bool, torch.complex64)
    ),
    ({"window": torch.ones(1)}, ValueError, "window must have shape"),
    ({"window": torch.ones(256, dtype=torch.int32)}, TypeError, "window must be floating, not torch.int32"),
    ({"window": torch.ones(256, device="meta")}, ValueError, "window is on meta"),
    ({"mel_filters": torch.ones(10, 129)}, ValueError, r"shape \[n_fft // 2 \+ 1 = 129, num_mels\] with num_mels > 0"),
    ({"mel_filters": torch.ones(129, 0), "mel_norms": None}, ValueError, r"with num_mels > 0, not \[129, 0\]"),
    ({"mel_filters": torch.ones(129, 10).bool()}, TypeError, "mel_filters must be floating, not torch.bool"),
    ({"mel_norms": torch.ones(9)}, ValueError, r"mel_norms must have shape \[num_mels = 10\], not \[9\]"),
    (
        {"mel_norms": torch.ones(10, dtype=torch.complex64)},
        TypeError,
        "mel_norms must be floating",
    ),
    ({"lengths": torch.ones(2).long()}, ValueError, r"lengths must have shape \[batch = 3\], not \[2\]"),
    ({"lengths": torch.ones(3)}, TypeError, "lengths must be integers, not torch.float32"),
    ({"lengths": torch.ones(3).bool()}, TypeError, "lengths must be integers, not torch.bool"),
    ({"lengths": torch.tensor([5, 0, 9])}, ValueError, r"lengths\[1\] must be from 1 to 1000, not 0"),
    ({"lengths": torch.tensor([5, 1000, 1001])}, ValueError, r"lengths\[2\] must be from 1 to 1000, not 1001"),
    ({"hop_length": 0}, ValueError, "hop_length must be at least 1, not 0"),
    ({"log_floor": 0.0}, ValueError, "log_floor must be positive and a normal number of torch.float32, not 0.0"),
    ({"log_floor": -1e-5}, ValueError, "log_floor must be positive"),
    ({"log_floor": 1e-50}, ValueError, "log_floor must be positive and a normal number of torch.float32, not 1e-50"),
    ({"log_floor": float("nan")}, ValueError, "log_floor must be positive"),
    ({"log_floor": float("inf")}, ValueError, "log_floor must be positive"),
    ({"top_db": 80.0}, ValueError, "top_db belongs to decibels=True: give both, or neither"),
    ({"top_db": -1.0, "decibels": True}, ValueError, "top_db must be 0 or more, not -1.0"),
    ({"top_db": float("nan"), "decibels": True}, ValueError, "top_db must be 0 or more, not nan"),
    ({"compute_dtype": torch.float16}, TypeError, "compute_dtype must be float32 or float64, not torch.float16"),
    (
        {"dtype": torch.float64},
        TypeError,
        "dtype must be .* or compute_dtype, torch.float32, not torch.float64",
    ),
    ({"dtype": torch.int16}, TypeError, "dtype must be .*, not torch.int16"),
]


@pytest.mark.parametrize("backend", [None, "kernel", "torch", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message, backend):
    options = {"samples": noise(3, 1000), **settings(256, 60, 10), **change}
    with clvp_fast.backend(backend), pytest.raises(error, match=message):
        log_mel(options.pop("samples"), **options)


def test_lengths_on_a_device_are_looked_at_in_debug_mode_alone(monkeypatch):
    public, seen = import_module("clvp_fast.ops.log_mel"), []
    lengths = torch.tensor([5, 0, 9])
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))  # all that decides
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: seen.append(self) or [5, 0, 9])
    public._check_lengths(lengths, noise(3, 1000))
    assert not seen
    monkeypatch.setattr(public, "_debug", True)
    with pytest.raises(ValueError, match=r"lengths\[1\] must be from 1 to 1000, not 0"):
        public._check_lengths(lengths, noise(3, 1000))
