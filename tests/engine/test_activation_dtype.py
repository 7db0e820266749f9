"""Products of the engine in 8 bits: what they round, what they follow, and where there are none."""

from dataclasses import replace

import pytest
import torch

from clvp_fast import SamplingParams, ops
from clvp_fast.engine.decoder import PagedDecoder
from clvp_fast.engine.memory import plan
from clvp_fast.engine.products import Product, in_int8
from clvp_fast.engine.runner import Runner
from clvp_fast.ops.linear import rounded
from tests.engine import test_refresh as changes
from tests.engine.test_decoder import tiny
from tests.engine.test_packed import products
from tests.kit import isa, random

INT8 = dict(weight_dtype=torch.int8, activation_dtype=torch.int8)
served = isa.needs("linear", torch.int8)


@served
@torch.inference_mode()
def test_products_are_those_of_rounded_rows():
    plain = in_int8(Product(random(50, 64, seed=1), random(50, seed=2)))
    product, x, residual = plain.in_8_bits(torch.float32), random(5, 64, seed=3), random(5, 50, seed=4)
    torch.testing.assert_close(product(x, residual), plain(rounded(x), residual), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(product(x), plain(x), rtol=1e-3, atol=1e-3)


@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_what_is_packed(dtype):
    model = tiny().speech_decoder_model.to(dtype)
    found = plan(model, 10**8, max_batch=3, max_new_tokens=9, weight_dtype=torch.int8, packed=True)
    runner = Runner(model, found.num_pages, 16, 3, 9, **INT8)
    *layers, head = products(runner)
    assert {(product.int8_x, product.panels.dtype) for product in layers} == {(True, torch.uint8)}
    assert not head.int8_x
    if dtype == torch.bfloat16 and changes.isa.has_matrix_unit():
        assert head.panels is None  # torch's own products serve it here
    else:
        assert found.parts["panels"] == sum(product.panels.nbytes for product in (*layers, head)) > 0


@served
def test_codes_are_those_of_torch_s_products():
    """Greedy codes follow from rounded rows, whichever backend multiplies them."""
    asked = replace(changes.request(), sampling=SamplingParams(do_sample=False, max_new_tokens=12))

    def codes(**options):
        (result,) = changes.engine(tiny(), **options).generate(asked)
        assert result.error is None
        return result.codes.tolist()

    found = codes(**INT8)
    with ops.backend("torch"):
        assert codes(**INT8) == found
    assert codes(weight_dtype=torch.int8) != found


@served
@pytest.mark.parametrize("change", [changes.copied, changes.put_elsewhere])
def test_a_change_of_the_weights_needs_a_refresh(change):
    model = tiny()
    made = changes.engine(model, **INT8)
    before = changes.codes(made)
    change(model)
    assert "8 bits" in made.outdated
    made.refresh()
    assert changes.codes(made) == changes.anew(model, **INT8) != before


def test_impossible_choices_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"activation_dtype must be torch\.int8, or None for no rounding, not torch"):
        PagedDecoder(model.speech_decoder_model, weight_dtype=torch.int8, activation_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"multiplies weights in 8 bits: add weight_dtype=torch\.int8"):
        changes.engine(model, activation_dtype=torch.int8)
    with pytest.raises(ValueError, match="has products over packed weights alone: leave out packed_weights"):
        changes.engine(model, **INT8, packed_weights=False)
    with pytest.raises(ValueError, match=r"^activation_dtype=torch\.int8 has no kernel here \(.+\): leave it out$"):
        changes.engine(tiny().to(torch.float16), **INT8)


@pytest.mark.skipif(isa.why_no_library() is not None, reason=str(isa.why_no_library()))
def test_a_cpu_without_such_products_says_so(request):
    isa.run_on(request, "portable")
    with pytest.raises(ValueError, match=r"has no kernel here \(torch's own products serve a CPU that has ne"):
        changes.engine(tiny(), **INT8)
