"""Prompts in tensors that stay, as on a GPU: what is stored, in which groups, and how little the host does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clvp_fast import ops
from clvp_fast.engine import prompts as prompts_module
from clvp_fast.engine.prompts import Prompts
from clvp_fast.engine.scheduler import Prefill
from tests.engine.captures_on_paper import capture_on_paper
from tests.engine.test_decoder import prompts, tiny
from tests.engine.test_runner import GREEDY, Driver, NoReading, expected_tokens
from tests.kit import isa

# The prompts have four more tokens than that: 8, 27, 13, 44 and 19.
LENGTHS = (4, 23, 9, 40, 15)


def driver_of(rows: int | None = 64, always: bool = False, lengths=LENGTHS) -> Driver:
    """Return a driver whose prompts are prefilled in `rows` rows, and the rest of them poisoned."""
    model = tiny()
    driver = Driver(model, prompts(model, lengths), [GREEDY] * len(lengths))
    runner = driver.runner
    table = runner.slots.tensors["prefix_table"]
    runner._prompts = Prompts(runner.decoder, runner.pages, table, rows, always)
    if rows is not None:
        runner._prompts._entered[0].fill_(torch.nan)
    return driver


def prefilled(driver: Driver, keys=range(5)) -> torch.Tensor:
    """Return the pages behind a prefill of these prompts."""
    for slot, key in enumerate(keys):
        driver.admit(slot, key)
    driver.runner.apply(driver.pending, driver.prompts, driver.params)
    driver.pending = driver._nothing()
    return driver.runner.pages.data


def watched(monkeypatch, driver: Driver) -> list[list[int]]:
    """Return a list that gets the lengths of each group that is prefilled."""
    groups, prefill = [], driver.runner.decoder.prefill

    def noted(embeds, bounds, *others):
        groups.append(bounds.diff().tolist())
        prefill(embeds, bounds, *others)

    monkeypatch.setattr(driver.runner.decoder, "prefill", noted)
    return groups


@isa.needs("paged_attention_decode")
@pytest.mark.parametrize("always", [False, True])
def test_pages_have_what_prompts_alone_store(always):
    """Compare bits; no row behind the prompts, nor an earlier longer group, leaves a trace."""
    alone, together = prefilled(driver_of(rows=None)), prefilled(driver_of(always=always))
    assert torch.equal(alone.nan_to_num(7.0), together.nan_to_num(7.0)) and not alone.isnan().all()


def test_groups_have_as_many_tokens_as_fit(monkeypatch):
    driver = driver_of()
    groups = watched(monkeypatch, driver)
    for key in range(5):
        driver.admit(key, key)
    found = driver.run()
    # As many as there are requests, whose number follows the set's fewest rows.
    assert [[length for length in group if length] for group in groups] == [[8, 27, 13], [44, 19]]
    assert all(group[-1] == 0 and len(group) == len(groups[0]) for group in groups)
    model = tiny()
    assert [found[key, 0] for key in range(5)] == [expected_tokens(model, each) for each in driver.prompts.values()]


def test_groups_have_a_bounded_number_of_prompts(monkeypatch):
    monkeypatch.setattr(prompts_module, "PREFILL_PROMPTS", 2)
    driver = driver_of()
    groups = watched(monkeypatch, driver)
    prefilled(driver)
    assert groups == [[8, 27], [13, 44], [19, 0]]


@pytest.mark.parametrize("always", [False, True])
def test_all_products_have_the_same_rows(monkeypatch, always):
    driver, rows, linear = driver_of(always=always), set(), ops.linear

    def product(x, *others, **settings):
        rows.add((len(x), settings["always"]))
        return linear(x, *others, **settings)

    monkeypatch.setattr(ops, "linear", product)
    prefilled(driver)
    assert rows == {(64, always)}


class Counting(TorchDispatchMode):
    """Count operators of torch that are no views."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_the_host_does_little_and_reads_nothing():
    """Count what it does beside the launches that a graph replays: one copy of numbers, and a few launches."""
    driver, counted = driver_of(), []
    runner = driver.runner
    assert [*runner._prompts.groups([])] == []
    (group,) = runner._prompts.groups([Prefill(key, key, [0], len(driver.prompts[key])) for key in (0, 1)])
    for some in (group[:1], group):
        with NoReading(), Counting() as counting, torch.inference_mode():
            runner._prompts.enter(some, driver.prompts)
        counted.append(counting.count)
    assert counted[1] == counted[0] + 1 and counted[0] <= 8


@isa.needs("paged_attention_decode")
def test_a_replay_prefills_what_was_entered(monkeypatch):
    """Capture early and late: later prompts, fewer and shorter ones, store what they store alone."""
    expected = [prefilled(driver_of(rows=None), keys).nan_to_num(7.0) for keys in ((3, 1), (3, 1, 0), (3, 1, 0, 4, 2))]
    happened = capture_on_paper(monkeypatch)
    for late in (False, True):
        driver = driver_of()
        graphs = driver.runner._graphs
        graphs.late = late
        if not late:
            graphs._record("prefill", driver.runner._prompts.run)
        happened.clear()
        found = [prefilled(driver, keys).nan_to_num(7.0).clone() for keys in ((3, 1), (3, 1, 0), (3, 1, 0, 4, 2))]
        assert all(map(torch.equal, found, expected))
        names = [what for what, key in happened if key == "prefill"]
        assert names == (["captured", *["replayed"] * 3] if late else ["replayed"] * 4), "groups: 3; 1; 0; 4 and 2"


def test_warming_up_writes_no_page():
    driver = driver_of()
    pages = prefilled(driver).clone()
    driver.runner.pages.data.fill_(torch.nan)
    driver.runner._prompts.clear()
    driver.runner._prompts.run()
    assert driver.runner.pages.data.isnan().all() and not pages.isnan().all()
