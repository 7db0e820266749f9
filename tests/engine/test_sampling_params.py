"""`SamplingParams`: Tortoise's defaults and presets, and one sentence for whatever cannot be."""

import inspect
import pickle
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import numpy as np
import pytest
from transformers import GenerationConfig

from clvp_fast.engine.sampling_params import PRESETS, SamplingParams
from clvp_fast.ops import sample


def test_defaults_are_tortoises():
    params = SamplingParams()
    assert (params.num_candidates, params.temperature, params.top_p, params.repetition_penalty) == (16, 0.8, 0.8, 2.0)
    assert (params.max_new_tokens, params.do_sample, params.seed, params.stop_token) == (500, True, None, None)
    assert (params.top_k, params.typical_p, params.min_p) == (50, 1.0, 0.0)  # 50: of transformers


def test_names_are_transformers_and_the_operators():
    names = {"temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty", "do_sample"}
    fields = set(inspect.signature(SamplingParams).parameters)
    assert names < fields
    assert names < set(inspect.signature(sample).parameters)
    assert names | {"max_new_tokens"} <= set(vars(GenerationConfig()))


@pytest.mark.parametrize(
    ("name", "count"), [("ultra_fast", 16), ("fast", 96), ("standard", 256), ("high_quality", 256)]
)
def test_a_preset_asks_for_all_of_its_candidates(name, count):
    assert SamplingParams.preset(name) == SamplingParams(num_candidates=count)


def test_overrides_win_over_a_preset():
    assert SamplingParams.preset("fast", seed=3, num_candidates=7) == SamplingParams(num_candidates=7, seed=3)
    with pytest.raises(ValueError, match="would all be equal"):
        SamplingParams.preset("standard", do_sample=False)
    with pytest.raises(ValueError, match="there is no preset 'slow'; there are ultra_fast, fast, standard, high_qual"):
        SamplingParams.preset("slow")
    assert list(PRESETS) == ["ultra_fast", "fast", "standard", "high_quality"]


@pytest.mark.parametrize("count", [1, 3, 17, 100, 513])
def test_no_candidate_is_lost_to_rounding(count):
    assert SamplingParams(num_candidates=count).num_candidates == count


def test_greedy_has_one_candidate():
    assert SamplingParams(do_sample=False).num_candidates == 1
    assert SamplingParams(do_sample=False, num_candidates=1) == SamplingParams(do_sample=False)
    with pytest.raises(ValueError, match=r"2 candidates of greedy decoding \(do_sample=False\) would all be equal"):
        SamplingParams(do_sample=False, num_candidates=2)


@pytest.mark.parametrize(
    ("field", "values", "wanted"),
    [
        ("num_candidates", [0, -1, 65_537, 10**12, 1.5, "4", True, np.float32(2)], "a whole number from 1 to 65536"),
        ("top_k", [-1, 2**63, 10**22, 0.5, 3.0, False, float("nan")], "a whole number from 0"),
        ("max_new_tokens", [0, -5, 2**31, 2.0, None, True], "a whole number from 1 to"),
        ("seed", [2**64, -(2**63) - 1, 0.0, True, "0"], "a whole number of 64 bits"),
        ("stop_token", [-1, 2**31, 1.0, False], "a token id"),
        ("temperature", [0, 0.0, -0.5, float("nan"), float("inf"), True, None, "1", 1j], "above 0 .*do_sample=False"),
        ("top_p", [0, 0.0, -0.1, 1.0001, 2, float("nan"), True, None], "above 0 and at most 1"),
        ("typical_p", [0, -0.1, 1.5, float("nan"), True, None], "above 0 and at most 1"),
        ("typical_mass", [0, 1.5, float("nan"), True, None], "above 0 and at most 1"),
        ("min_p", [-0.01, 1.01, float("nan"), False, None], "from 0"),
        ("repetition_penalty", [0, -1.0, float("nan"), float("inf"), True, None], "above 0"),
        ("do_sample", [0, 1, None, "yes"], "True or False"),
    ],
)
def test_impossible_values_are_refused_in_one_sentence(field, values, wanted):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field} must be .*{wanted}.*, not ") as refusal:
            SamplingParams(**{field: value})
        assert repr(value) in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_bounds_themselves_are_allowed():
    SamplingParams(top_p=1, typical_p=1, min_p=0, num_candidates=1, max_new_tokens=1, stop_token=0, top_k=None)
    SamplingParams(min_p=1, seed=2**64 - 1, temperature=1e-6)
    assert SamplingParams(seed=-(2**63)).seed == -(2**63)


def test_numpys_numbers_become_pythons():
    params = SamplingParams(num_candidates=np.int64(3), top_p=np.float32(0.5), seed=np.uint64(2**64 - 1), top_k=None)
    assert params == SamplingParams(num_candidates=3, top_p=0.5, seed=2**64 - 1, top_k=0)
    assert (type(params.num_candidates), type(params.top_p), type(params.seed)) == (int, float, int)
    assert params.top_k == 0


def test_they_are_values():
    params = SamplingParams(seed=1)
    with pytest.raises(FrozenInstanceError):
        params.seed = 2
    assert replace(params, seed=2) == SamplingParams(seed=2)
    assert pickle.loads(pickle.dumps(params)) == params and len({params, SamplingParams(seed=1)}) == 1


@pytest.mark.parametrize("value", [10**400, 10**5000], ids=["400 digits", "5000 digits"])
def test_a_number_that_no_float_holds_is_one_short_sentence(value):
    for name in ("temperature", "repetition_penalty", "num_candidates", "seed"):
        with pytest.raises(ValueError, match=f"^{name} must be ") as refusal:
            SamplingParams(**{name: value})
        assert len(str(refusal.value)) < 250


def test_a_fraction_that_a_float_rounds_to_zero_is_none():
    for name in ("temperature", "top_p", "typical_p", "repetition_penalty"):
        with pytest.raises(ValueError, match=f"^{name} must be above 0"):
            SamplingParams(**{name: Fraction(1, 10**400)})
