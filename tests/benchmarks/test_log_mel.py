"""The benchmark of log-mel features: its providers agree, its gate sees every clip, its rivals are had or named."""

import sys

import numpy as np
import pytest
import torch

from benchmarks import kernels, log_mel
from benchmarks.harness import all_rows
from tests.kit.isa import needs_library

LOG_MEL = {
    "torch.stft, matmul, log",
    "clvp_fast torch",
    "clvp_fast kernel",
    "clvp_fast kernel, float64",
    "clvp_fast extractor",
    "transformers' extractor",
}


@pytest.fixture
def short_clips(monkeypatch):
    monkeypatch.setattr(log_mel, "SECONDS", 1)
    monkeypatch.setattr(log_mel, "CLIPS", {"cpu": (3,)})
    monkeypatch.setattr(log_mel, "_DISTINCT", 2)


def asrfront_stub(off: float = 0.0):
    """Compute `asrfront.gemma4` by its formula, as far as the benchmark calls it, in numpy."""

    def log_mel_batch(clips, threads):
        assert threads == torch.get_num_threads()
        padded = np.pad(clips.astype(np.float64), ((0, 0), (160, 160)))
        framed = np.lib.stride_tricks.sliding_window_view(padded, 320, axis=1)[:, ::160][
            :, : (clips.shape[1] - 1) // 160
        ]
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(320) / 320)
        filters = log_mel.mel_filter_bank(257, 128, 0.0, 8000.0, 16000, norm=None, mel_scale="htk")
        features = np.log(np.abs(np.fft.rfft(framed * hann, 512)) @ filters + 0.001) + off
        return features.astype(np.float32), np.full(len(clips), framed.shape[1])

    return log_mel_batch


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@needs_library
def test_log_mel_providers_agree(short_clips, monkeypatch):
    module = type(sys)("asrfront")
    module.gemma4 = type(sys)("asrfront.gemma4")
    module.gemma4.log_mel_batch = asrfront_stub()
    for name in ("torchaudio", "torchaudio.transforms"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "asrfront", module)
    before = torch.get_num_threads()
    rows = all_rows(log_mel, "cpu")
    assert torch.get_num_threads() == before and not [row for row in rows if row["seconds"] is None]
    threads = {row["shape"]["threads"] for row in rows}
    assert threads == {1, before}
    clvp = [row for row in rows if row["shape"]["n_fft"] == 1024]
    assert len(clvp) == len(threads) * len(LOG_MEL) and {row["provider"] for row in clvp} == LOG_MEL
    frames, weights = 3 * (1 + 22050 // 256), 4 * np.count_nonzero(log_mel._extractor().mel_filters)
    for row in clvp:
        assert row["bytes"] == 4 * (3 * 22050 + 80 * frames) and row["frames"] == frames and "flop" not in row
        assert row["fft_flop"] == frames * (2.5 * 1024 * 10 + weights)
        gone = {name: why.split(":")[0] for name, why in row["absent"].items()}
        assert gone.pop("torchaudio, log, norms") == "ModuleNotFoundError"
        assert gone == dict.fromkeys(["flashmel, log, norms", "flashmel, no log, no norms"], "for a GPU")
    gemma = [row for row in rows if row["shape"]["n_fft"] == 512]
    kernel = {"clvp_fast kernel", "clvp_fast kernel, float64"}
    assert {row["provider"] for row in gemma} == kernel | {"torch.stft, matmul, log", "asrfront"}
    assert all(row["frames"] == 3 * 99 and row["absent"] == {} for row in gemma)


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@needs_library
def test_a_wrong_or_absent_asrfront_is_told(short_clips, monkeypatch):
    module = type(sys)("asrfront")
    module.gemma4 = type(sys)("asrfront.gemma4")
    module.gemma4.log_mel_batch = asrfront_stub(2e-4)
    monkeypatch.setitem(sys.modules, "asrfront", module)
    rows = kernels.task_of("log_mel", log_mel.asrfront_case(3), "cpu", repeats=1).rows()
    assert [row["provider"] for row in rows if row["seconds"] is None] == ["asrfront"]
    monkeypatch.setitem(sys.modules, "asrfront", None)
    rows = kernels.task_of("log_mel", log_mel.asrfront_case(3), "cpu", repeats=1).rows()
    assert len(rows) == 3 and all("asrfront" in row["absent"]["asrfront"] and row["seconds"] for row in rows)


def test_the_gate_of_log_mel_sees_every_clip(short_clips):
    case = log_mel.clvp_case(5, "cpu")
    (samples,) = case.inputs(0)
    expected = case.reference(samples)
    assert samples.shape == (5, 22050) and expected.shape == (2, 80, 87)
    assert torch.equal(samples[:2], samples[2:4]) and not torch.equal(samples[0], samples[1])
    result = case.providers["clvp_fast torch"](samples)
    assert case.error(result, expected) < 1e-5
    norms = torch.tensor(log_mel._extractor().mel_norms)[:, None]
    assert case.error((result * norms).exp(), expected) < 1e-5  # without logarithm and norms
    wrong = [result[[0, 1, 0, 1, 1]], result * norms, (result * norms).exp() * 1.01, result[:, :, :-1], result[:, :40]]
    wrong += [result.index_fill(0, torch.tensor([4]), x) for x in (0.0, torch.nan)]
    for each in wrong:
        assert not case.error(each, expected) <= case.tolerance


@needs_library
def test_a_rival_that_breaks_is_told_and_one_that_runs_is_judged(short_clips, monkeypatch):
    class Broken:
        def __init__(self, **options):
            raise RuntimeError("built for another torch")

    class Working(torch.nn.Module):
        """torchaudio's transform, as far as the benchmark asks for it."""

        def __init__(self, **options):
            super().__init__()
            rest = {"sample_rate": 22050, "f_max": 8000.0, "norm": "slaney", "mel_scale": "htk", "n_mels": 80}
            assert options == {"n_fft": 1024, "hop_length": 256} | rest

        def forward(self, samples):
            spectrum = torch.stft(samples, 1024, 256, window=torch.hann_window(1024), return_complex=True)
            filters = torch.tensor(log_mel._extractor().mel_filters.T).float()
            return filters @ spectrum.abs().square()

    module = type(sys)("torchaudio.transforms")
    monkeypatch.setitem(sys.modules, "torchaudio", type(sys)("torchaudio"))
    monkeypatch.setitem(sys.modules, "torchaudio.transforms", module)
    module.MelSpectrogram = Broken
    name = "torchaudio, log, norms"
    rows = kernels.task_of("log_mel", log_mel.clvp_case(2, "cpu"), "cpu", repeats=1).rows()
    assert {row["provider"] for row in rows} == LOG_MEL and all(row["seconds"] for row in rows)
    assert rows[0]["absent"][name] == "RuntimeError: built for another torch"
    module.MelSpectrogram = Working
    rows = kernels.task_of("log_mel", log_mel.clvp_case(2, "cpu"), "cpu", repeats=1).rows()
    (found,) = (row for row in rows if row["provider"] == name)
    assert found["error"] < 1e-5 and found["seconds"] and name not in found["absent"]


def test_no_kernel_is_told(short_clips):
    with log_mel.clvp_fast.backend("torch"):
        case = log_mel.clvp_case(1, "cpu")
    assert "clvp_fast kernel" in case.absent and not [name for name in case.providers if "kernel" in name]
