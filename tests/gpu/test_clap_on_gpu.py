"""On a GPU, CLAP gives what it gives on the CPU, its features and its towers: `make gpu-check`."""

import copy

import pytest
import torch

import clvp_fast
from clvp_fast import ClapFeatureExtractor
from tests.models.clap.builders import SHAPES, composite_config, inputs_of, pair
from tests.models.clap.test_feature_extraction import CLIPS, RATE, SMALL

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_float32():
    places = torch.backends.cuda.matmul, torch.backends.cudnn  # patches are embedded by a convolution
    allowed = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, before in zip(places, allowed, strict=True):
        place.allow_tf32 = before


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("settings", [SMALL, dict(SMALL, sampling_rate=48_000, hop_length=480, fft_window_size=1024)])
def test_features_are_made_on_the_device(settings, truncation):
    extractor, call = ClapFeatureExtractor(**settings), dict(truncation=truncation, return_tensors="pt", seed=3)
    call |= dict(sampling_rate=settings["sampling_rate"], max_length=RATE)
    expected = extractor(CLIPS, **call)
    for clips, options in ((CLIPS, dict(device=DEVICE)), ([torch.tensor(clip, device=DEVICE) for clip in CLIPS], {})):
        found = extractor(clips, **call, **options)
        for name in expected:
            assert found[name].device.type == DEVICE and found[name].dtype == expected[name].dtype
        assert torch.equal(found["is_longer"].cpu(), expected["is_longer"])
        # Decibels, in float32 there and in float64 here.
        torch.testing.assert_close(found["input_features"].cpu(), expected["input_features"], rtol=0, atol=0.002)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_towers_equal_the_cpu(shape):
    _, on_cpu = pair(shape=shape)
    on_gpu, inputs = copy.deepcopy(on_cpu).to(DEVICE), inputs_of("ClapModel", composite_config(clvp_fast, shape))
    found = on_gpu(**{name: value.to(DEVICE) for name, value in inputs.items()})
    expected = on_cpu(**inputs)
    for name in ("text_embeds", "audio_embeds", "logits_per_audio"):
        torch.testing.assert_close(found[name].cpu(), expected[name], rtol=1e-3, atol=1e-4)
    assert clvp_fast.explain("window_attention", DEVICE)[0].backend == "kernel"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_types_stay_close(dtype):
    _, on_cpu = pair()
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE, dtype)
    inputs = inputs_of("ClapModel", composite_config(clvp_fast))
    expected = on_cpu.get_audio_features(inputs["input_features"]).pooler_output
    found = on_gpu.get_audio_features(inputs["input_features"].to(DEVICE, dtype)).pooler_output
    cosines = torch.cosine_similarity(found.cpu().float(), expected)
    assert (cosines > 0.99).all(), cosines
