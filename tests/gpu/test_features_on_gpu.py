"""On a GPU the feature extractor gives what it gives on the CPU, and leaves it there: `make gpu-check`."""

import numpy as np
import pytest
import torch

from clvp_fast import ClvpFeatureExtractor
from tests.models.clvp.test_feature_extraction import BATCH, NORMS, ON_DEVICE, SMALL, noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(audio):
    return [clip.cuda() for clip in audio] if isinstance(audio, list) else audio.cuda()


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
@pytest.mark.parametrize("kind", ON_DEVICE)
def test_equal_to_the_cpu(kind, return_tensors):
    extractor, audio = ClvpFeatureExtractor(**SMALL), ON_DEVICE[kind](BATCH)
    expected = extractor(audio, sampling_rate=16000, return_tensors="pt")
    for given, options in ((on_gpu(audio), {}), (audio, {"device": "cuda"}), (on_gpu(audio), {"device": "cuda:0"})):
        got = extractor(given, sampling_rate=16000, return_tensors=return_tensors, **options)
        for name in expected:
            if return_tensors == "pt":
                assert got[name].device.type == "cuda" and got[name].dtype == expected[name].dtype
                torch.testing.assert_close(got[name].cpu(), expected[name], rtol=0, atol=1e-4)
            else:
                assert isinstance(got[name][0], np.ndarray)
                np.testing.assert_allclose(np.stack(got[name]), expected[name].numpy(), atol=1e-4)
    back = extractor(on_gpu(audio), sampling_rate=16000, return_tensors="pt", device="cpu")
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_arrays_and_unequal_lengths():
    extractor = ClvpFeatureExtractor(mel_norms=NORMS)
    batch = [noise(length, seed=length) for length in (132300, 90000, 1, 300)]
    options = {"sampling_rate": 22050, "padding": False}
    expected = extractor(batch, **options)
    for given in (
        batch,
        [torch.from_numpy(clip).cuda() for clip in batch],
        [torch.from_numpy(batch[0]).cuda(), *batch[1:]],
    ):
        got = extractor(given, device="cuda", **options)
        for name in expected:
            for ours, theirs in zip(got[name], expected[name], strict=True):
                assert ours.shape == theirs.shape
                np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_bad_samples_are_found_without_a_look_at_them():
    extractor = ClvpFeatureExtractor(**SMALL)
    batch = torch.zeros(3, 5000, device="cuda")
    batch[1, 4000] = torch.nan
    with pytest.raises(ValueError, match="clip 1 has samples that are NaN or infinite"):
        extractor(batch, sampling_rate=16000, return_tensors="pt")
    assert (
        extractor(batch, sampling_rate=16000, return_tensors="pt", max_length=3800)["input_features"].isfinite().all()
    )
    with pytest.raises(ValueError, match="clips lie on several devices, cpu, cuda:0: pass `device`"):
        extractor([batch[0], noise(5)], sampling_rate=16000)
