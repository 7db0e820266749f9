"""The page pool against a plain count of references, under any order of calls."""

from collections import Counter

import pytest

from clvp_fast.engine.page_pool import OutOfPages, PagePool

pytest.importorskip("hypothesis")  # which a GPU machine may lack

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule


class Accounting(RuleBasedStateMachine):
    """`held` counts the references that the pool must have."""

    @initialize(num_pages=st.integers(1, 12))
    def build(self, num_pages):
        self.pool, self.held = PagePool(num_pages), Counter()

    @rule(count=st.integers(0, 14))
    def allocate(self, count):
        free = self.pool.free_pages
        if count > free:
            with pytest.raises(OutOfPages, match=f"{count} pages were asked for, and {free} of "):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count and not set(pages) & set(self.held)
        self.held.update(pages)

    @rule(data=st.data())
    def share(self, data):
        pages = data.draw(st.lists(st.sampled_from(sorted(self.held)), max_size=5)) if self.held else []
        self.pool.share(pages)
        self.held.update(pages)

    @rule(data=st.data())
    def release(self, data):
        pages = data.draw(st.permutations(sorted(self.held.elements())))
        pages = pages[: data.draw(st.integers(0, len(pages)))]
        self.pool.release(pages)
        self.held = +(self.held - Counter(pages))

    @rule(data=st.data())
    def touch_a_free_page(self, data):
        free = sorted(set(range(self.pool.num_pages)) - set(self.held))
        if free:
            page = data.draw(st.sampled_from(free))
            with pytest.raises(ValueError, match=f"page {page} is free and cannot be shared"):
                self.pool.share([page])
            with pytest.raises(ValueError, match=f"page {page} is free already and cannot be released again"):
                self.pool.release([page])

    @invariant()
    def counts_agree(self):
        if hasattr(self, "pool"):
            assert [self.pool.references(page) for page in range(self.pool.num_pages)] == [
                self.held[page] for page in range(self.pool.num_pages)
            ]
            assert self.pool.used_pages == len(self.held)
            assert self.pool.free_pages == self.pool.num_pages - len(self.held)


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_pool_holds_at_least_one_page():
    with pytest.raises(ValueError, match="a page pool needs at least one page, not 0"):
        PagePool(0)
    with pytest.raises(OutOfPages, match="-1 pages were asked for"):
        PagePool(1).allocate(-1)
