"""A prompt that joins the next step: the same codes and pages as apart, and weights that are read once for both."""

import pytest
import torch

from clvp_fast.engine.runner import Runner
from tests.engine.test_decoder import prompts, tiny
from tests.engine.test_runner import GREEDY, SAMPLED, Driver, expected_tokens
from tests.kit.isa import has_matrix_unit, needs

pytestmark = needs("linear")


INT8 = {"weight_dtype": torch.int8}


def driver_of(joins: bool, states: bool = False, dtype: torch.dtype = torch.float32, **options) -> Driver:
    model = tiny()
    texts = prompts(model, (4, 23, 9))
    driver = Driver(model.to(dtype), texts, [GREEDY, SAMPLED, GREEDY], packed=True, states=states, **options)
    driver.runner._joins = joins
    return driver


def joined(driver: Driver, monkeypatch) -> list[int]:
    """Return a list that gets the tokens of each prompt that joins a step; another prefill is an error then."""
    tokens, bind = [], driver.runner.decoder.bind

    def noted(*entered, prompt=None, **settings):
        if prompt is not None:
            tokens.append(len(prompt.embeds))
        return bind(*entered, prompt=prompt, **settings)

    monkeypatch.setattr(driver.runner.decoder, "bind", noted)
    return tokens


def entered(driver: Driver) -> None:
    """Run some steps: prompts come alone, beside candidates that run, and two at once."""
    driver.admit(0, 0)
    for _ in range(3):
        driver.step()
    driver.admit(1, 1)
    driver.admit(2, 1, candidate=1)
    driver.admit(3, 2)
    driver.run()


@pytest.mark.parametrize("options", [{}, INT8, INT8 | {"activation_dtype": torch.int8}, {"deterministic": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_states_and_pages_are_those_of_a_prefill_apart(dtype, options, monkeypatch):
    if dtype == torch.bfloat16 and not options.get("weight_dtype") and has_matrix_unit():
        pytest.skip("torch's own products serve bfloat16 here")
    found = []
    for joins in (True, False):
        driver = driver_of(joins, states=True, dtype=dtype, **options)
        tokens = joined(driver, monkeypatch)
        entered(driver)
        # Of two prompts in one step the last joins it.
        assert tokens == ([8, 13] if joins else [])
        found.append((driver.tokens, driver.runner.pages.data.clone(), driver.runner._states.clone()))
    (codes, pages, states), (others, other_pages, other_states) = found
    assert codes == others and torch.equal(pages.nan_to_num(7.0), other_pages.nan_to_num(7.0))
    for (key, candidate), drawn in codes.items():
        assert drawn, (key, candidate)
    assert torch.equal(states[:4, :20], other_states[:4, :20])


def test_greedy_codes_are_transformers():
    driver = driver_of(joins=True)
    entered(driver)
    model = tiny()
    assert [driver.tokens[key, 0] for key in (0, 2)] == [expected_tokens(model, driver.prompts[key]) for key in (0, 2)]


def test_a_prompt_that_no_step_took_is_stored_before_the_next_changes(monkeypatch):
    driver = driver_of(joins=True)
    for key in (0, 1):
        driver.admit(key, key)
        driver.apply()
    apart = driver_of(joins=False)
    for key in (0, 1):
        apart.admit(key, key)
    assert driver.run() == apart.run()


def test_a_reset_drops_it(monkeypatch):
    driver = driver_of(joins=True)
    driver.admit(0, 0)
    driver.apply()
    driver.runner.reset()
    tokens = joined(driver, monkeypatch)
    driver.runner.decode(1)
    assert tokens == [] and driver.runner.pages.data.isnan().all()


def test_it_waits_for_no_step_where_rows_of_a_product_see_each_other():
    model = tiny()
    for packed in (False, True):
        runner = Runner(model.speech_decoder_model, 9, 16, 2, 9, packed=packed)
        assert runner.decoder.has_rows_apart == packed
    runner.decoder.weights.head.__dict__["panels"] = None
    assert not runner.decoder.has_rows_apart
