"""`log_mel` as the native library computes it, on the CPU and on the GPU where there is one."""

import gc
from itertools import pairwise

import pytest
import torch

import clvp_fast
from clvp_fast import native
from clvp_fast.ops import log_mel_tables
from clvp_fast.ops.dispatch import OPERATORS
from clvp_fast.ops.log_mel import log_mel
from tests.kit import Guarded
from tests.kit.device import DEVICE
from tests.kit.isa import why_no_library
from tests.ops.log_mel_bodies import Bodies, Path, noise, settings

PATHS = {"cpu": Path("kernel", "cpu", "torch")} | (
    {"cuda": Path("kernel", "cuda", "torch", doubles=False)} if DEVICE == "cuda" else {}
)


@pytest.fixture(params=PATHS)
def path(request):
    if reason := why_no_library() if request.param == "cpu" else native.missing(request.param):
        pytest.skip(reason)
    return PATHS[request.param]


@pytest.fixture
def on_cpu():
    if reason := why_no_library():
        pytest.skip(reason)


def moved(options, path):
    return {name: x.to(path.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


class TestKernel(Bodies):
    pass


CASES = [(256, 60, 80), (1024, 256, 80), (2048, 3000, 1), (4096, 100, 256), (512, 1, 17)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_a_row_alone_and_in_a_batch(path, case):
    """Whatever the other rows are, their lengths and their number."""
    samples, options = noise(7, 9000, seed=1)[:, : 400 if case[1] == 1 else None], settings(*case)
    time = samples.shape[1]
    lengths = torch.tensor([time, time - 1, 1, time // 2, 3, time - case[1] // 2, time // 3])
    for more in ({}, {"decibels": True, "top_db": 9.0}):
        whole = path(samples, **options, **more)
        assert torch.equal(whole, path(samples, **options, **more))
        ragged = path(samples, lengths=lengths, **options, **more)
        reversed_rows = path(samples.flip(0), lengths=lengths.flip(0), **options, **more).flip(0)
        assert torch.equal(ragged, reversed_rows)
        for row, length in enumerate(lengths.tolist()):
            assert torch.equal(path(samples[row : row + 1], **options, **more)[0], whole[row])
            alone = path(samples[row : row + 1, :length], **options, **more)[0]
            assert torch.equal(alone, ragged[row, :, : alone.shape[1]]) and not ragged[row, :, alone.shape[1] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads_or_layout(on_cpu, dtype):
    before, samples, options = torch.get_num_threads(), noise(3, 20000), settings(decibels=True, top_db=30.0)
    results = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(log_mel(samples, compute_dtype=dtype, **options))
            results.append(log_mel(samples.T.contiguous().T, compute_dtype=dtype, **options))
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert torch.equal(result, results[0])


def guarded(values, device):
    """A copy of `values` between rows of poison, and what keeps it."""
    keeper = Guarded(1, *values.shape, dtype=values.dtype, device=device)
    keeper.tensor[0] = values
    return keeper, keeper.tensor[0]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_read_or_written_outside(path, case, ragged):
    """The C function, each array between poison: what is read there shows in the result."""
    n_fft, hop_length, num_mels = case
    batch, time = 3, 700
    frames = 1 + time // hop_length
    options = settings(*case)
    samples = Guarded(batch, time, dtype=torch.float32, device=path.device)
    samples.tensor[:] = noise(batch, time)
    lengths = torch.tensor([time, 5, 123]) if ragged else None
    expected = path(samples.tensor.clone(), lengths=lengths, **options)
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
    kept = {name: guarded(values, path.device) for name, values in arrays.items()}
    bands, lengths = bands.to(path.device), None if lengths is None else lengths.to(path.device)
    out = Guarded(batch, num_mels, frames, dtype=torch.float32, device=path.device)
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
    if path.device == "cpu":
        native.check(native.library().clvp_fast_log_mel_cpu(call, 2, None))
    else:
        native.check(native.library("cuda").clvp_fast_log_mel_cuda(call, torch.cuda.current_stream().cuda_stream))
    out.check()
    assert torch.equal(out.tensor.cpu(), expected)
    for name, values in arrays.items():
        assert torch.equal(kept[name][1].cpu(), values), f"{name} was written"


def test_registered(path):
    options = settings(256, 60, 10)
    parameters = [options[name].to(path.device) for name in ("window", "mel_filters", "mel_norms")]
    for samples, lengths in ((noise(3, 900), torch.tensor([900, 3, 400])), ((noise(2, 50) * 9000).short(), None)):
        lengths = None if lengths is None else lengths.to(path.device)
        inputs = (samples.to(path.device), *parameters[:2], 60, lengths, parameters[2], 1e-5)
        for more in ((False, None, None, None), (True, 20.0, torch.float32, torch.float16)):
            torch.library.opcheck(torch.ops.clvp_fast.log_mel.default, inputs + more)


def test_compiles_as_one_graph(path):
    options = moved(settings(num_mels=20), path)
    compiled = torch.compile(
        lambda x, lengths: log_mel(x * 2, lengths=lengths, dtype=torch.float16, **options) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    for time in (3000, 2000):
        samples = noise(2, time).to(path.device)
        lengths = torch.tensor([time, 50], device=path.device)
        expected = log_mel(samples * 2, lengths=lengths, dtype=torch.float16, **options) + 1
        assert torch.equal(compiled(samples, lengths), expected)


def test_is_the_default(path):
    samples, options = noise(2, 3000), settings()
    forced = path(samples, **options)
    chosen = Path(None, path.device, "torch")
    assert torch.equal(chosen(samples, **options), forced)
    assert clvp_fast.explain("log_mel", path.device)[0].backend == "kernel"
    other = Path("torch", path.device, "torch")(samples, **options)
    assert not torch.equal(other, forced), "the two paths cannot be told apart"


def test_new_values_of_parameters_are_seen(path):
    """What is derived from them is kept by tensor and version, and goes with the tensor."""
    gc.collect()
    samples, before = noise(2, 3000).to(path.device), len(log_mel_tables._TABLES)
    options = moved(settings(dtype=torch.float64), path)  # all three are converted
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


def test_inference_tensors_are_not_remembered(path):
    gc.collect()
    before = len(log_mel_tables._TABLES)
    with torch.inference_mode():
        samples, options = noise(2, 3000).to(path.device), moved(settings(), path)
        first = log_mel(samples, **options)
        options["mel_filters"].mul_(2.0)
        assert not torch.equal(log_mel(samples, **options), first)
    assert len(log_mel_tables._TABLES) == before


def test_what_is_not_served_is_named(path):
    samples = noise(2, 900)
    for changes, message in (
        ({"n_fft": 250}, "it serves n_fft 256, 512, 1024, 2048, 4096, not 250"),
        ({"n_fft": 8192}, "not 8192"),
        ({"num_mels": 257}, "it serves num_mels up to 256, not 257"),
        *([] if path.doubles else [({"compute_dtype": torch.float64}, "on a GPU it computes in float32")]),
    ):
        with pytest.raises(RuntimeError, match=message):
            path(samples, **settings(**changes))
        with pytest.warns(UserWarning, match=f"clvp_fast.log_mel takes the slower torch path: .*{message}"):
            OPERATORS["log_mel"]._warned.clear()
            expected = Path(None, path.device, "torch")(samples, **settings(**changes))
        assert torch.equal(expected, Path("torch", path.device, "torch")(samples, **settings(**changes)))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="an input requires grad"):
        path(samples.requires_grad_(), **settings())


def test_lengths_that_only_the_library_sees(on_cpu):
    """Compiled code does not look at them."""
    compiled = torch.compile(log_mel, fullgraph=True, backend="aot_eager")
    for bad in (0, -1, 901):
        with pytest.raises(RuntimeError, match="length"):
            compiled(noise(2, 900), lengths=torch.tensor([900, bad]), **settings())
