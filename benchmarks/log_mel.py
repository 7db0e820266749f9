"""Log-mel features of six-second clips, against transformers' extractor, torch, torchaudio, flashmel and asrfront.

Providers get the same float32 samples; all but the extractors, which are measured whole, from numpy to numpy, leave
their features where the samples are. A result may differ from the float64 reference by what the class may differ from
transformers'. On a CPU everything is measured with one thread and with all (numpy's own products, a small part of
transformers' time, take all in either), and the limit counts the bytes at the rate at which all threads copy.

A rival that cannot be had is named in the rows, with the reason: `pip install torchaudio asrfront flashmel`.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank, window_function

import clvp_fast
from benchmarks.harness import Task
from benchmarks.kernels import Case, Planned, bound, tasks as tasks_of
from benchmarks.rivals import asrfront_mel, mel_spectrogram
from clvp_fast import ClvpFeatureExtractor
from clvp_fast.ops import log_mel
from clvp_fast.ops.log_mel import reference as log_mel_reference

RATE, SECONDS, N_FFT, HOP, NUM_MELS, FLOOR = 22050, 6, 1024, 256, 80, 1e-5
CLIPS = {"cpu": (64, 1, 16, 256), "cuda": (1024, 1, 64, 4096), "smoke": (3,)}
# Transformers' extractor takes clip by clip: its time at other sizes is known.
_EXTRACTORS_UP_TO = 64
_TOLERANCE = 1e-4
# Larger batches repeat this many clips, a prime, so that a row taken for another one is seen.
_DISTINCT = 61


@cache
def _extractor() -> ClvpFeatureExtractor:
    return ClvpFeatureExtractor(mel_norms=np.random.default_rng(0).uniform(1, 7, NUM_MELS).tolist())


def make_clips(seed: int, clips: int, rate: int, device: str) -> tuple[torch.Tensor]:
    """Noise `[clips, time]` that swells and fades, as speech does."""
    generator = torch.Generator().manual_seed(seed)
    distinct, time = min(clips, _DISTINCT), SECONDS * rate
    swell = torch.rand(distinct, 1, SECONDS * 4, generator=generator) ** 3
    swell = torch.nn.functional.interpolate(swell, size=time, mode="linear")[:, 0]
    samples = (0.3 * torch.randn(distinct, time, generator=generator) * swell).to(device)
    return (samples.repeat(-(-clips // distinct), 1)[:clips],)


def furthest(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference from `expected` of the first clips, which the others repeat.

    A result without the logarithm is judged after it.
    """
    if (result >= 0).all():
        result = result.clamp(min=FLOOR).log() / torch.tensor(_extractor().mel_norms, device=result.device)[:, None]
    if result.shape[1:] != expected.shape[1:]:
        return math.inf
    return float(
        torch.stack([(part - expected[: len(part)]).abs().max() for part in result.split(len(expected))]).max()
    )


def _by(name: str, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*arguments):
        with clvp_fast.backend(name):
            return call(*arguments)

    return run


def _ours(settings: Callable[[], dict], device: str) -> tuple[dict, dict]:
    """Return the operator by its kernel, in float32 and, on a CPU, in float64, as the extractor computes."""
    refused = clvp_fast.explain("log_mel", device)[0].refused.get("kernel")
    if refused:
        return {}, {"clvp_fast kernel": refused}
    providers = {"clvp_fast kernel": _by("kernel", lambda samples: log_mel(samples, **settings()))}
    if device == "cpu":
        double = {"compute_dtype": torch.float64, "dtype": torch.float32}
        providers["clvp_fast kernel, float64"] = _by("kernel", lambda samples: log_mel(samples, **settings(), **double))
    return providers, {}


def _stft(settings: Callable[[], dict]) -> Planned:
    """Compute log-mel as a careful user of torch would write it."""

    def plan(samples):
        tables = settings()
        window, hop, norms = tables["window"], tables["hop_length"], tables["mel_norms"][:, None]
        filters, floor = tables["mel_filters"].T.contiguous(), tables["log_floor"]

        def run():
            spectrum = torch.stft(samples, len(window), hop, window=window, return_complex=True)
            return (filters @ torch.view_as_real(spectrum).square().sum(-1)).clamp(min=floor).log() / norms

        return run

    return Planned(plan)


def _mel_spectrograms(settings: Callable[[], dict], device: str) -> tuple[dict, dict]:
    """Return torchaudio's transform with the logarithm and the norms after it, and flashmel's with and without them."""
    options = {"sample_rate": RATE, "n_fft": N_FFT, "hop_length": HOP, "n_mels": NUM_MELS}
    options |= {"f_max": 8000.0, "norm": "slaney", "mel_scale": "htk"}

    def alone(module: str) -> Planned:
        def plan(samples):
            transform = mel_spectrogram.transform(module, device, **options)
            return lambda: transform(samples)

        return Planned(plan)

    def normalised(module: str) -> Planned:
        def plan(samples):
            mel, norms = alone(module).plan(samples), settings()["mel_norms"][:, None]
            return lambda: mel().clamp(min=FLOOR).log() / norms

        return Planned(plan)

    providers = {"torchaudio, log, norms": normalised("torchaudio.transforms")}
    flashmel = {"flashmel, log, norms": normalised("flashmel"), "flashmel, no log, no norms": alone("flashmel")}
    if device == "cuda":
        return providers | flashmel, {}
    return providers, dict.fromkeys(flashmel, "for a GPU")


def _extractors() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    from transformers.models.clvp.feature_extraction_clvp import ClvpFeatureExtractor as StockExtractor

    def run(extractor):
        def extract(samples):
            clips, length = list(samples.numpy()), samples.shape[1]
            features = extractor(clips, sampling_rate=RATE, return_tensors="np", max_length=length)
            return torch.from_numpy(features["input_features"])

        return extract

    stock = StockExtractor(mel_norms=_extractor().mel_norms)
    return {"clvp_fast extractor": run(_extractor()), "transformers' extractor": run(stock)}


def _settings(device: str) -> dict:
    to = {"device": device, "dtype": torch.float32}
    return {
        "window": torch.tensor(window_function(N_FFT, "hann"), **to),
        "mel_filters": torch.tensor(_extractor().mel_filters, **to),
        "hop_length": HOP,
        "mel_norms": torch.tensor(_extractor().mel_norms, **to),
        "log_floor": FLOOR,
    }


def _operator_reference(samples: torch.Tensor, settings: dict) -> torch.Tensor:
    window, filters, norms = (settings[name] for name in ("window", "mel_filters", "mel_norms"))
    arguments = (window, filters, settings["hop_length"], None, norms, settings["log_floor"])
    return log_mel_reference(samples[:_DISTINCT].double(), *arguments, False, None, torch.float64, torch.float64)


def clvp_case(clips: int, device: str, threads: int | None = None) -> Case:
    """Make the case of CLVP's own features, normalised; the filters are the extractor's."""
    settings = cache(partial(_settings, device))  # which lie on the device, and are made when a provider is
    kernel, no_kernel = _ours(settings, device)
    spectrograms, no_spectrograms = _mel_spectrograms(settings, device)
    torch_path = {"clvp_fast torch": _by("torch", lambda samples: log_mel(samples, **settings()))}
    extractors = _extractors() if device == "cpu" and clips <= _EXTRACTORS_UP_TO else {}
    shape = dict(clips=clips, seconds=SECONDS, n_fft=N_FFT, hop_length=HOP, num_mels=NUM_MELS)
    return Case(
        shape=shape if device == "cuda" else shape | {"threads": threads or torch.get_num_threads()},
        dtype=torch.float32,
        inputs=lambda seed: make_clips(seed, clips, RATE, device),
        reference=lambda samples: _operator_reference(samples, settings()),
        providers={"torch.stft, matmul, log": _stft(settings)} | torch_path | kernel | spectrograms | extractors,
        **_counted(clips, 1 + SECONDS * RATE // HOP, SECONDS * RATE, _settings("cpu")),
        absent=no_kernel | no_spectrograms,
        error=furthest,
        tolerance=_TOLERANCE,
        repeats=30 if device == "cuda" or clips < 64 else 10 if clips < 256 else 5,
        threads=threads,
    )


def _counted(clips: int, frames: int, time: int, settings: dict) -> dict:
    """Count the bytes of samples and features. The operations are not matrix products, whose rate would be no limit."""
    n_fft, (_, num_mels) = len(settings["window"]), settings["mel_filters"].shape
    per_frame = 2.5 * n_fft * math.log2(n_fft) + 4 * int(settings["mel_filters"].count_nonzero())
    return {
        "bytes": 4 * clips * (time + num_mels * frames),
        "extra": {"frames": clips * frames, "fft_flop": round(clips * frames * per_frame)},
    }


def asrfront_case(clips: int, threads: int | None = None) -> Case:
    """Make the case of Gemma 4's features, as asrfront computes them.

    As many frames of the same length, hop, transform and channels for both, with 0.001 under the logarithm; asrfront's
    are of the magnitude instead of the power, with zeros before the first sample and no norms, and lie `[clips, frames,
    channels]`.
    Each is judged by the float64 formula of its own.
    """
    rate, n_fft, hop, length = 16000, 512, 160, 320
    time = SECONDS * rate
    frames = (time - 1) // hop
    hann = np.pad(window_function(length, "hann"), (n_fft - length) // 2)
    filters = mel_filter_bank(n_fft // 2 + 1, 128, 0.0, 8000.0, rate, norm=None, mel_scale="htk")
    settings = {"window": torch.tensor(hann).float(), "mel_filters": torch.tensor(filters).float(), "hop_length": hop}
    settings |= {"mel_norms": torch.ones(128), "log_floor": 0.001}
    used = 1 + (frames - 1) * hop

    def magnitudes(samples):
        framed = torch.nn.functional.pad(samples[:_DISTINCT].double(), (n_fft // 2, n_fft)).unfold(1, n_fft, hop)
        spectrum = torch.fft.rfft(framed[:, :frames] * torch.from_numpy(hann)).abs()
        return (spectrum @ torch.from_numpy(filters) + 0.001).log()

    def distance(result, expected):
        ours, theirs = expected
        return furthest(result, theirs if result.shape[1:] == theirs.shape[1:] else ours)

    kernel, absent = _ours(lambda: settings, "cpu")
    providers = {"torch.stft, matmul, log": _stft(lambda: settings)} | kernel

    def of_used(run):
        return Planned(lambda samples: bound(run, (samples[:, :used],)))

    providers = {name: of_used(run) for name, run in providers.items()}
    providers["asrfront"] = asrfront_mel.gemma4
    return Case(
        shape=dict(
            clips=clips,
            seconds=SECONDS,
            n_fft=n_fft,
            hop_length=hop,
            num_mels=128,
            threads=threads or torch.get_num_threads(),
        ),
        dtype=torch.float32,
        inputs=lambda seed: make_clips(seed, clips, rate, "cpu"),
        reference=lambda samples: (_operator_reference(samples[:, :used], settings), magnitudes(samples)),
        providers=providers,
        **_counted(clips, frames, time, settings),
        absent=absent,
        error=distance,
        tolerance=_TOLERANCE,
        repeats=10,
        threads=threads,
    )


def cases(device: str, smoke: bool = False) -> Iterator[Case]:
    clips_of = CLIPS["smoke" if smoke else device]
    counts = (torch.get_num_threads(),) if device == "cuda" else sorted({1, torch.get_num_threads()}, reverse=True)
    for threads in counts:
        for clips in clips_of:
            yield clvp_case(clips, device, threads)
        if device == "cpu":
            yield asrfront_case(clips_of[0], threads)


def tasks(device: str, smoke: bool = False) -> Iterator[Task]:
    return tasks_of("log_mel", cases(device, smoke), device, smoke)
