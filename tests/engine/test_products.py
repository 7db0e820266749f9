"""Products over int8 weights: those of the weights that the int8 ones stand for."""

import pytest
import torch

from benchmarks.precision import round_to_int8
from clvp_fast import CandidateEngine, CandidateRequest, SamplingParams
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.engine.products import Product, in_int8
from clvp_fast.engine.weights import DecoderWeights
from tests.engine.test_decoder import tiny
from tests.kit import random


def test_weights_are_rounded_to_steps_of_their_row():
    weight = random(6, 64, seed=1) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1e-30, 3.0])[:, None]
    weight[5, 7] = 400.0  # an outlier coarsens its own row alone
    linear = in_int8(Product(weight, None))
    assert linear.weight.dtype == torch.int8 and linear.weight.abs().max() == 127
    meant = linear.weight.float() * linear.scale[:, None]
    torch.testing.assert_close(linear.scale[[0, 1, 2, 5]], weight.abs().amax(1)[[0, 1, 2, 5]] / 127)
    assert ((meant - weight).abs() <= 0.501 * linear.scale[:, None]).all()
    assert (meant[3] == 0).all()
    # Conv1D keeps weights the other way round; the kernel reads rows.
    turned = in_int8(Product(weight.T.contiguous().T, None))
    assert torch.equal(turned.weight, linear.weight) and turned.weight.is_contiguous()


@torch.inference_mode()
def test_products_are_those_of_the_rounded_weights():
    model = tiny(use_attention_bias=True).speech_decoder_model
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    quantized = DecoderWeights.take(model).in_int8().layers
    plain = DecoderWeights.take(round_to_int8(model)).layers
    x, residual = random(5, model.config.hidden_size, seed=2), random(5, model.config.hidden_size, seed=3)
    for ours, theirs in zip(quantized, plain, strict=True):
        for got, expected in zip(ours.project(x), theirs.project(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.out(x), theirs.out(x), rtol=1e-5, atol=1e-5)
        both = ours.feed_forward(x, residual), theirs.feed_forward(x, residual)
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_half_types_keep_the_residual_in_float32():
    layer = DecoderWeights.take(tiny().speech_decoder_model.to(torch.bfloat16)).in_int8().layers[0]
    x, residual = random(3, 128, seed=2).bfloat16(), random(3, 128, seed=3, scale=300.0)
    out = layer.feed_forward(x, residual)
    assert out.dtype == torch.float32
    added = layer.feed_forward(x, torch.zeros_like(residual))
    torch.testing.assert_close(out - residual, added, rtol=0, atol=1e-4)
    assert added.abs().max() > 0.02


def test_the_engine_decodes_with_them():
    """Greedy codes are those of an engine over the rounded weights, and not those over the model's own."""

    def codes(model, **options):
        processor = type("Processor", (), {"feature_extractor": None})()
        engine = CandidateEngine(model, processor, max_batch=2, max_new_tokens=24, **options)
        request = CandidateRequest(
            input_ids=[5, 9, 17, 30, 8],
            input_features=random(1, 20, 40, seed=4),
            sampling=SamplingParams(do_sample=False, repetition_penalty=1.0, max_new_tokens=24, seed=0),
        )
        (result,) = engine.generate(request)
        assert result.error is None
        return result.codes.tolist()

    quantized = codes(tiny(), weight_dtype=torch.int8)
    model = tiny()
    round_to_int8(model.speech_decoder_model)
    assert quantized == codes(model)


def test_adapters_and_other_dtypes_are_refused():
    model = tiny().speech_decoder_model
    with pytest.raises(ValueError, match=r"weight_dtype must be torch\.int8, or None"):
        PagedDecoder(model, weight_dtype=torch.float16)
    attn = model.model.decoder.layers[1].attn
    attn.q_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="q_proj has hooks or a forward of its own"):
        PagedDecoder(model, weight_dtype=torch.int8)
