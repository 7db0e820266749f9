"""On a GPU the models give what they give on the CPU: `make gpu-check`."""

import copy

import pytest
import torch

from tests.models.clvp.tiny import tiny_inputs, tiny_ours

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_float32():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(scope="module")
def models():
    model = tiny_ours()
    return model, copy.deepcopy(model).to("cuda")


def test_forward_equals_the_cpu(models):
    ids, features = tiny_inputs()
    on_cpu, on_gpu = (
        model(ids.to(model.device), features.to(model.device), return_loss=True).to_tuple() for model in models
    )
    for ours, expected in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [dict(), dict(num_beams=3, num_return_sequences=3)], ids=["greedy", "beams"])
def test_tokens_equal_the_cpu(models, settings):
    ids, features = tiny_inputs()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    sequences = [
        model.generate(
            ids.to(model.device),
            features.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=24,
            return_dict_in_generate=True,
            **settings,
        ).sequences.cpu()
        for model in models
    ]
    assert torch.equal(*sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_close(models, dtype):
    ids, _ = tiny_inputs()
    expected = models[0].get_text_features(ids).embeds
    half = copy.deepcopy(models[1]).to(dtype)
    got = half.get_text_features(ids.to("cuda")).embeds.float().cpu()
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.999


def test_static_cache_and_packed_parameters(models):
    ids, features = (x.to("cuda") for x in tiny_inputs())
    model = models[1]
    dynamic, static = (
        model.generate(ids, features, max_new_tokens=12, cache_implementation=kind)[0] for kind in (None, "static")
    )
    assert torch.equal(dynamic, static)
    attention = model.speech_decoder_model.model.decoder.layers[0].attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
