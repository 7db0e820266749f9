"""Calls of `log_mel`: bits and memory of its kernels, what they keep of parameters, compiled graphs, gradients, errors.

Its numbers are in test_log_mel.py.
"""

import gc
from importlib import import_module
from itertools import pairwise

import pytest
import torch

import clvp_fast
from clvp_fast import native
from clvp_fast.ops import log_mel_tables
from clvp_fast.ops.dispatch import OPERATORS
from clvp_fast.ops.log_mel import log_mel
from tests.kit import Guarded, at_threads
from tests.kit.device import EMULATED
from tests.kit.operators import opcheck
from tests.ops.test_log_mel import FLOOR, doubles, noise, over, run, settings, to

NATIVE = over("cpu", "gpu")
#: Tests of what is chosen: tests/ptx/plugin.py changes what is launched alone.
CHOICE = pytest.mark.skipif(EMULATED, reason="log-mel as PTX runs where a CPU's kernel was chosen")
CASES = [(256, 60, 80), (1024, 256, 80), (2048, 3000, 1), (4096, 100, 256), (512, 1, 17)]


def run_in(forced, backend, samples, **options):
    """Do as `run`, where the operator's backend is another, on the same device."""
    with clvp_fast.backend(forced):
        return run(backend, samples, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
@NATIVE
def test_bits_of_a_row_alone_and_in_a_batch(backend, case):
    """Vary the other rows, their lengths and their number."""
    time = {1: 400, 100: 4500}.get(case[1], 9000)  # several tiles of frames
    samples, options = noise(7, time, seed=1), settings(*case)
    lengths = torch.tensor([time, time - 1, 1, time // 2, 3, time - case[1] // 2, time // 3])
    for more in ({}, {"decibels": True, "top_db": 9.0}):
        whole = run(backend, samples, **options, **more)
        assert torch.equal(whole, run(backend, samples, **options, **more))
        ragged = run(backend, samples, lengths=lengths, **options, **more)
        reversed_rows = run(backend, samples.flip(0), lengths=lengths.flip(0), **options, **more).flip(0)
        assert torch.equal(ragged, reversed_rows)
        for row, length in enumerate(lengths.tolist()):
            assert torch.equal(run(backend, samples[row : row + 1], **options, **more)[0], whole[row])
            alone = run(backend, samples[row : row + 1, :length], **options, **more)[0]
            assert torch.equal(alone, ragged[row, :, : alone.shape[1]]) and not ragged[row, :, alone.shape[1] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@over("cpu")
def test_bits_do_not_depend_on_threads_or_layout(backend, dtype):
    samples, options, results = noise(3, 20000), settings(decibels=True, top_db=30.0), []
    for _ in at_threads(1, 2, 3, 16):
        results.append(log_mel(samples, compute_dtype=dtype, **options))
        results.append(log_mel(samples.T.contiguous().T, compute_dtype=dtype, **options))
    for result in results:
        assert torch.equal(result, results[0])


def guarded(values, device):
    """Return a copy of `values` between rows of poison, and its keeper."""
    keeper = Guarded(1, *values.shape, dtype=values.dtype, device=device)
    keeper.tensor[0] = values
    return keeper, keeper.tensor[0]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@NATIVE
def test_nothing_is_read_or_written_outside(backend, case, ragged):
    """Call the C function with each array between poison, which shows in the result when read."""
    n_fft, hop_length, num_mels = case
    batch, time = 3, 700
    frames = 1 + time // hop_length
    options = settings(*case)
    samples = Guarded(batch, time, dtype=torch.float32, device=backend.device)
    samples.tensor[:] = noise(batch, time)
    lengths = torch.tensor([time, 5, 123]) if ragged else None
    expected = run(backend, samples.tensor.clone(), lengths=lengths, **options)
    if ragged:
        for row, length in zip(samples.tensor, lengths, strict=True):
            row[length:] = torch.nan
    weights, bands = log_mel_tables.filters_and_bands(options["mel_filters"], torch.float32)
    circle = log_mel_tables.twiddles(n_fft, torch.float32, torch.device("cpu"))
    arrays = {
        "window": options["window"],
        "mel_filters": weights,
        "mel_norms": options["mel_norms"],
        "twiddles": circle,
    }
    kept = {name: guarded(values, backend.device) for name, values in arrays.items()}
    bands, lengths = bands.to(backend.device), None if lengths is None else lengths.to(backend.device)
    out = Guarded(batch, num_mels, frames, dtype=torch.float32, device=backend.device)
    call = native.LogMelCall(
        samples=samples.tensor.data_ptr(),
        lengths=None if lengths is None else lengths.data_ptr(),
        bands=bands.data_ptr(),
        features=out.tensor.data_ptr(),
        batch=batch,
        time=time,
        samples_stride=time,
        hop_length=hop_length,
        frames=frames,
        n_fft=n_fft,
        num_mels=num_mels,
        log_floor=options["log_floor"],
        top_db=-1.0,
        **{name: tensor.data_ptr() for name, (_, tensor) in kept.items()},
    )
    if backend.device == "cpu":
        native.check(native.library().clvp_fast_log_mel_cpu(call, 2, None))
    else:
        native.check(native.library("cuda").clvp_fast_log_mel_cuda(call, torch.cuda.current_stream().cuda_stream))
    out.check()
    assert torch.equal(out.tensor.cpu(), expected)
    for name, values in arrays.items():
        assert torch.equal(kept[name][1].cpu(), values), f"{name} was written"


@CHOICE
@NATIVE
def test_registered_kernel(backend):
    options = settings(256, 60, 10)
    parameters = [options[name].to(backend.device) for name in ("window", "mel_filters", "mel_norms")]
    for samples, lengths in ((noise(3, 900), torch.tensor([900, 3, 400])), ((noise(2, 50) * 9000).short(), None)):
        lengths = None if lengths is None else lengths.to(backend.device)
        inputs = (samples.to(backend.device), *parameters[:2], 60, lengths, parameters[2], 1e-5)
        for more in ((False, None, None, None), (True, 20.0, torch.float32, torch.float16)):
            opcheck(backend, torch.ops.clvp_fast.log_mel.default, inputs + more)


@NATIVE
def test_compiles_among_other_operators(backend):
    options = to(backend.device, settings(num_mels=20))
    compiled = torch.compile(
        lambda x, lengths: log_mel(x * 2, lengths=lengths, dtype=torch.float16, **options) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    for time in (3000, 2000):
        samples = noise(2, time).to(backend.device)
        lengths = torch.tensor([time, 50], device=backend.device)
        expected = log_mel(samples * 2, lengths=lengths, dtype=torch.float16, **options) + 1
        assert torch.equal(compiled(samples, lengths), expected)


@NATIVE
def test_is_the_default(backend):
    samples, options = noise(2, 3000), settings()
    kernel = run(backend, samples, **options)
    assert torch.equal(run_in(None, backend, samples, **options), kernel)
    assert clvp_fast.explain("log_mel", backend.device)[0].backend == "kernel"
    other = run_in("torch", backend, samples, **options)
    assert not torch.equal(other, kernel), "the two paths cannot be told apart"


@NATIVE
def test_new_values_of_parameters_are_seen(backend):
    """Keep derived tables by tensor and version, and drop them with the tensor."""
    gc.collect()
    samples, before = noise(2, 3000).to(backend.device), len(log_mel_tables._TABLES)
    options = to(backend.device, settings(dtype=torch.float64))  # all three are converted
    options["compute_dtype"] = torch.float32
    results = [log_mel(samples, **options)]
    assert len(log_mel_tables._TABLES) == before + 3
    for change in ("window", "mel_filters", "mel_norms"):
        options[change].mul_(0.5)
        results.append(log_mel(samples, **options))
    options["mel_filters"].data = options["mel_filters"].flip(1)
    results.append(log_mel(samples, **options))
    fresh = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    assert torch.equal(log_mel(samples, **fresh), results[-1])
    assert all(not torch.equal(one, other) for one, other in pairwise(results))
    del options, fresh
    gc.collect()
    assert len(log_mel_tables._TABLES) == before


def test_bands():
    filters = torch.zeros(129, 5)
    filters[0, 0] = filters[128, 1] = filters[7, 2] = filters[9, 2] = 0.5
    filters[:, 3] = -1.0
    weights, bands = log_mel_tables.filters_and_bands(filters, torch.float64)
    assert bands.tolist() == [[0, 1], [128, 129], [7, 10], [0, 129], [0, 0]] and bands.dtype == torch.int32
    assert weights.is_contiguous() and torch.equal(weights, filters.T.double())


@NATIVE
def test_inference_tensors_are_not_remembered(backend):
    gc.collect()
    before = len(log_mel_tables._TABLES)
    with torch.inference_mode():
        samples, options = noise(2, 3000).to(backend.device), to(backend.device, settings())
        first = log_mel(samples, **options)
        options["mel_filters"].mul_(2.0)
        assert not torch.equal(log_mel(samples, **options), first)
    assert len(log_mel_tables._TABLES) == before


@CHOICE
@NATIVE
def test_unserved_arguments_are_named(backend):
    samples = noise(2, 900)
    for changes, message in (
        ({"n_fft": 250}, "it serves n_fft 256, 512, 1024, 2048, 4096, not 250"),
        ({"n_fft": 8192}, "not 8192"),
        ({"num_mels": 257}, "it serves num_mels up to 256, not 257"),
        *([] if doubles(backend) else [({"compute_dtype": torch.float64}, "on a GPU it computes in float32")]),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(backend, samples, **settings(**changes))
        with pytest.warns(UserWarning, match=f"clvp_fast.log_mel takes the slower torch path: .*{message}"):
            OPERATORS["log_mel"]._warned.clear()
            expected = run_in(None, backend, samples, **settings(**changes))
        assert torch.equal(expected, run_in("torch", backend, samples, **settings(**changes)))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="an input requires grad"):
        run(backend, samples.requires_grad_(), **settings())


@over("cpu")
def test_lengths_that_only_the_library_sees(backend):
    """Compiled code does not look at them."""
    compiled = torch.compile(log_mel, fullgraph=True, backend="aot_eager")
    for bad in (0, -1, 901):
        with pytest.raises(RuntimeError, match="length"):
            compiled(noise(2, 900), lengths=torch.tensor([900, bad]), **settings())


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
@over("torch")
def test_registered_operator(backend, dtype, lengths):
    options = settings(256, 60, 10)
    samples = (noise(3, 1000) * 30000).to(dtype)
    inputs = (samples, *(options[name] for name in ("window", "mel_filters", "hop_length")))
    inputs += (lengths, options["mel_norms"], FLOOR)
    operator = torch.ops.clvp_fast.log_mel.default
    for more in ((False, None, None, None), (True, 20.0, torch.float64, torch.float16)):
        torch.library.opcheck(operator, inputs + more, test_utils=("test_schema", "test_faketensor"))
        names = dict(zip(("decibels", "top_db", "compute_dtype", "dtype"), more, strict=True))
        got, expected = operator(*inputs, *more), log_mel(samples, lengths=lengths, **options, **names)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@over("default", "torch", "reference")
def test_compiles_as_one_graph(backend):
    options = settings(256, 60, 10, decibels=True, top_db=30.0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(samples, lengths):
        return log_mel(samples, lengths=lengths, **options)

    lengths = torch.tensor([1000, 3, 400])
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


@pytest.mark.parametrize("forced", [None, "kernel", "torch", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message, forced):
    options = {"samples": noise(3, 1000), **settings(256, 60, 10), **change}
    with clvp_fast.backend(forced), pytest.raises(error, match=message):
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
