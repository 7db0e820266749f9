"""Products of a bounded number of rows: what other rows hold, and how many there are, changes nothing.

Which kernel each product of a deterministic step has on a GPU, and in which order it sums, is compiled and compared in
`tests/benchmarks/test_cost.py`; bits of the kernel in `tests/ops`, on a GPU in `tests/gpu`.
"""

import pytest
import torch

from clvp_fast import CandidateEngine, ops
from clvp_fast.engine import step as step_module
from clvp_fast.engine.products import Product
from clvp_fast.engine.runner import is_deterministic
from clvp_fast.ops.binding import Scratch
from tests.engine.test_decoder import prompts, tiny
from tests.engine.test_runner import GREEDY, SAMPLED, Driver
from tests.kit import isa

KEYS = (0, 1, 2)


class Poisoned(Scratch):
    """Gives every tensor of a block full of NaN when it is made: rows that nobody wrote are NaN."""

    def __call__(self, name, rows, *shape, dtype):
        made = (name, *shape, dtype) not in self._blocks
        found = super().__call__(name, rows, *shape, dtype=dtype)
        if made and dtype.is_floating_point:
            self._blocks[name, *shape, dtype].fill_(torch.nan)
        return found


def drawn(model, count: int, size: int | None, steps: int = 5) -> dict:
    """Return tokens and hidden states of `count` candidates, with products of at most `size` rows."""
    driver = Driver(model, prompts(model), [GREEDY, SAMPLED, SAMPLED], max_batch=11, num_pages=200, states=True)
    runner = driver.runner
    runner.product_rows = size
    runner._scratch = Poisoned(runner._capacity, runner.device)
    for slot in range(count):
        driver.admit(slot, KEYS[slot % 3], slot)
    for _ in range(steps):
        driver.step()
    return {
        name: (driver.tokens[name], runner.states(slot, steps))
        for slot, name in enumerate((KEYS[slot % 3], slot) for slot in range(count))
    }


def same(one: dict, other: dict) -> bool:
    return all(one[name][0] == other[name][0] and torch.equal(one[name][1], other[name][1]) for name in one)


@isa.needs("paged_attention_decode")
@pytest.mark.parametrize("count", [1, 4, 7, 11])
def test_blocks_of_rows_give_what_one_call_gives(count):
    """Compare with one call of all rows: the CPU's products have the bits of a row for any number of rows."""
    model = tiny()
    assert same(drawn(model, count, 4), drawn(model, count, None))


def test_blocks_of_rows_in_the_interpreter():
    """Compare Triton's kernels, alone and in a full block before another one."""
    model = tiny()
    with ops.backend("triton"):
        alone, together = drawn(model, 1, 4, steps=3), drawn(model, 6, 4, steps=3)
    assert same(alone, together)
    assert len({tuple(tokens) for tokens, _ in together.values()}) > 3, "candidates differ"


def test_no_product_has_more_rows_than_a_block(monkeypatch):
    """Watch what a step binds: each product, in each layer and of the head, is made in blocks of the step's rows."""
    seen: list[tuple[int, bool]] = []
    bind, block = Product.bind, step_module.bind_gelu_mlp

    def bound(self, out, scratch, x, *others, always=False, **settings):
        seen.append((len(x), always))
        return bind(self, out, scratch, x, *others, always=always, **settings)

    def bound_block(out, scratch, x, *others, **settings):
        seen.append((len(x), True))
        return block(out, scratch, x, *others, **settings)

    monkeypatch.setattr(Product, "bind", bound)
    monkeypatch.setattr(step_module, "bind_gelu_mlp", bound_block)
    model = tiny()
    driver = Driver(model, prompts(model), [GREEDY] * 3, max_batch=11)
    runner, layers = driver.runner, driver.runner.decoder.num_layers
    for size, rows, blocks in ((None, 5, {5}), (4, 1, {1}), (4, 4, {4}), (4, 5, {4, 1}), (4, 11, {4, 3})):
        runner.product_rows, calls = size, 1 if size is None else -(-rows // size)
        seen.clear()
        runner._bind(rows, {})
        # Projections, the output and the feed-forward block of each layer, which may be two products; the head.
        assert len(seen) in (calls * (3 * layers + 1), calls * (4 * layers + 1))
        assert {count for count, _ in seen} == blocks and {always for _, always in seen} <= {size is not None, True}


@pytest.mark.parametrize(
    "wanted, device, persistent, found",
    [
        (None, "cuda", False, True),
        (None, "cuda", True, False),
        (None, "cpu", False, False),
        (True, "cpu", False, True),
        (True, "cuda", False, True),
        (False, "cuda", False, False),
    ],
)
def test_it_is_the_default_on_cuda(wanted, device, persistent, found):
    assert is_deterministic(wanted, device, persistent) is found


def test_it_is_refused_beside_persistent_steps():
    with pytest.raises(ValueError, match="leave out deterministic, or persistent"):
        is_deterministic(True, "cuda", True)


def test_every_engine_takes_the_default(monkeypatch):
    """Watch what a runner is asked for by an engine that nobody told about it."""
    asked: list = []
    monkeypatch.setattr("clvp_fast.engine.runner.is_deterministic", lambda *given: asked.append(given) or False)
    CandidateEngine.from_pretrained("random", max_batch=2, max_new_tokens=4)
    assert asked and {wanted for wanted, *_ in asked} == {None}
