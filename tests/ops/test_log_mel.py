"""`log_mel`: the reference against transformers' numpy spectrogram, the torch path against the reference."""

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

import clvp_fast
from clvp_fast.ops.log_mel import log_mel

FLOOR = 1e-4


def arguments(batch=3, time=1000, n_fft=256, hop_length=60, num_mels=10, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(batch, time, dtype=dtype, generator=generator) * 0.1
    return samples, {
        "window": torch.rand(n_fft, dtype=dtype, generator=generator),
        "mel_filters": torch.rand(n_fft // 2 + 1, num_mels, dtype=dtype, generator=generator),
        "hop_length": hop_length,
        "mel_norms": torch.rand(num_mels, dtype=dtype, generator=generator) * 3 - 5,
        "log_floor": FLOOR,
    }


def run(backend, samples, **options):
    with clvp_fast.backend(backend):
        return log_mel(samples, **options)


def assert_close(got, expected, atol):
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.is_contiguous()
    error = (got - expected).abs().max().item()
    assert error <= atol, error
    assert expected.square().mean().sqrt() > 20 * atol


@pytest.mark.parametrize("time", [1, 2, 5, 100, 999, 1000, 1021])
@pytest.mark.parametrize(("n_fft", "hop_length"), [(256, 60), (64, 64), (100, 7)])
def test_reference_equals_the_numpy_spectrogram(time, n_fft, hop_length):
    samples, options = arguments(time=time, n_fft=n_fft, hop_length=hop_length)
    options["window"] = torch.from_numpy(window_function(n_fft, "hann"))
    filters = mel_filter_bank(n_fft // 2 + 1, 10, 0.0, 8000.0, 22050, norm="slaney", mel_scale="htk")
    options["mel_filters"] = torch.from_numpy(filters)
    got = run("reference", samples, **options)
    for row, mel in zip(samples, got, strict=True):
        power = spectrogram(row.numpy(), options["window"].numpy(), n_fft, hop_length, power=2.0, mel_filters=filters)
        expected = np.log(np.maximum(power, FLOOR)) / options["mel_norms"].numpy()[:, None]
        assert mel.shape == expected.shape
        assert np.abs(mel.numpy() - expected).max() < 1e-6  # numpy's holds its spectrum in complex64


@pytest.mark.parametrize("time", [1, 2, 3, 127, 128, 129, 1000])
@pytest.mark.parametrize(("n_fft", "hop_length"), [(256, 60), (64, 64), (101, 7), (32, 100)])
@pytest.mark.parametrize("ragged", [False, True])
def test_torch_path_equals_the_reference(time, n_fft, hop_length, ragged):
    samples, options = arguments(time=time, n_fft=n_fft, hop_length=hop_length)
    if ragged:
        options["lengths"] = torch.tensor([time, (time + 1) // 2, min(time, 2)])
    expected = run("reference", samples, **options)
    assert_close(run("torch", samples, **options), expected, 1e-10)
    single = {name: value.float() if name in ("window", "mel_filters") else value for name, value in options.items()}
    assert_close(run("torch", samples.float(), **single), expected.float(), 1e-4)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_each_row_of_its_own_length_equals_the_row_alone(backend):
    samples, options = arguments(batch=5, time=700)
    lengths = torch.tensor([700, 1, 128, 129, 333])
    poisoned = samples.clone()
    for row, length in zip(poisoned, lengths, strict=True):
        row[length:] = float("nan")
    got = run(backend, poisoned, lengths=lengths, **options)
    for row, length, mel in zip(samples, lengths.tolist(), got, strict=True):
        alone = run(backend, row[None, :length], **options)[0]
        assert_close(mel[:, : alone.shape[1]].contiguous(), alone, 1e-12)
        assert not mel[:, alone.shape[1] :].any()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_int16_is_scaled(backend):
    samples, options = arguments(dtype=torch.float32)
    ints = (samples * 32767).to(torch.int16)
    assert_close(run(backend, ints, **options), run(backend, ints.float() / 32768, **options), 1e-6)


def test_half_precision_samples_are_computed_in_float32():
    samples, options = arguments(dtype=torch.float32)
    assert_close(log_mel(samples.bfloat16(), **options), log_mel(samples.bfloat16().float(), **options), 1e-6)


def test_strided_samples():
    samples, options = arguments(batch=4, time=800)
    for view in (samples[::2], samples[:, ::3], samples.T.contiguous().T):
        assert_close(log_mel(view, **options), log_mel(view.contiguous(), **options), 1e-12)


def test_without_norms_and_under_the_floor():
    samples, options = arguments()
    norms = options.pop("mel_norms")
    assert_close(log_mel(samples, **options) / norms[:, None], log_mel(samples, mel_norms=norms, **options), 1e-12)
    silent = log_mel(torch.zeros_like(samples), **options)
    assert torch.equal(silent, torch.full_like(silent, FLOOR).log())


def test_gradients():
    samples, options = arguments(batch=2, time=40, n_fft=16, hop_length=9, num_mels=3)
    tensors = [samples * 10, options.pop("window"), options.pop("mel_filters"), options.pop("mel_norms")]
    for tensor in tensors:
        tensor.requires_grad_()

    def call(samples, window, mel_filters, mel_norms):
        named = {"window": window, "mel_filters": mel_filters, "mel_norms": mel_norms}
        return log_mel(samples, lengths=torch.tensor([40, 17]), **named, **options)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("lengths", [None, torch.tensor([1000, 3, 400])], ids=["full", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
def test_registered_operator(lengths, dtype):
    samples, options = arguments()
    samples = (samples * 30000).to(dtype) if dtype == torch.int16 else samples.to(dtype)
    inputs = (samples, *(options[name] for name in ("window", "mel_filters", "hop_length")))
    inputs += (lengths, options["mel_norms"], FLOOR)
    operator = torch.ops.clvp_fast.log_mel.default
    torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))
    assert_close(operator(*inputs), run("torch", samples, lengths=lengths, **options), 1e-12)


def test_compiles_as_one_graph():
    samples, options = arguments()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(samples, lengths):
        return log_mel(samples, lengths=lengths, **options)

    lengths = torch.tensor([1000, 3, 400])
    for time in (1000, 800):
        row = samples[:, :time], lengths.clamp(max=time)
        assert_close(compiled(*row), log_mel(row[0], lengths=row[1], **options), 1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": torch.zeros(5)}, ValueError, r"samples must have shape \[batch, time\] with time > 0, not \[5\]"),
        ({"samples": torch.zeros(3, 0)}, ValueError, "samples must have shape"),
        (
            {"samples": torch.zeros(3, 9, dtype=torch.int32)},
            TypeError,
            "samples must be floating or int16, not torch.int32",
        ),
        ({"window": torch.ones(1)}, ValueError, "window must have shape"),
        (
            {"mel_filters": torch.ones(10, 129)},
            ValueError,
            r"mel_filters must have shape \[n_fft // 2 \+ 1 = 129, num_mels\]",
        ),
        ({"mel_norms": torch.ones(9)}, ValueError, r"mel_norms must have shape \[num_mels = 10\], not \[9\]"),
        ({"lengths": torch.ones(2, dtype=torch.long)}, ValueError, r"lengths must have shape \[batch = 3\], not \[2\]"),
        ({"hop_length": 0}, ValueError, "hop_length must be at least 1, not 0"),
        ({"window": torch.ones(256, device="meta")}, ValueError, "window is on meta"),
    ],
)
def test_bad_arguments(change, error, message):
    samples, options = arguments()
    options = {"samples": samples, **options, **change}
    with pytest.raises(error, match=message):
        log_mel(options.pop("samples"), **options)
