"""The books of one pool: every page in one state, least recently released content forgotten first."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxinfer.cache.pages import PagePool


def test_page_zero_is_nobodys():
    pool = PagePool(4)
    assert sorted(pool.take(3)) == [1, 2, 3]
    assert pool.num_available == 0
    with pytest.raises(ValueError, match="num_pages=1 leaves no page to use"):
        PagePool(1)


def test_free_pages_go_before_remembered_ones_and_those_in_order_of_release():
    pool = PagePool(5)
    pages = pool.take(3)
    for page in pages:
        pool.register(page, bytes([page]))
    pool.release(reversed(pages))  # as a sequence does: its last page is forgotten first
    assert pool.num_evictable == 3
    (fresh,) = pool.take(1)
    assert fresh not in pages
    assert pool.take(2) == [pages[2], pages[1]]
    assert [pool.lookup(bytes([page])) for page in pages] == [pages[0], None, None]
    pool.share([pages[0]])
    assert pool.num_evictable == 0
    assert pool.num_available == 0
    pool.check_integrity(Counter([fresh, *pages]))


def test_the_first_page_with_some_content_stays_the_known_one():
    pool = PagePool(4)
    first, second = pool.take(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.lookup(b"same") == first
    pool.release([second])
    assert pool.num_evictable == 0
    pool.release([first])
    assert pool.num_evictable == 1
    pool.forget_all()
    assert pool.lookup(b"same") is None
    assert (pool.num_evictable, pool.num_available) == (0, 3)
    pool.check_integrity({})


def test_check_integrity_sees_wrong_books():
    pool = PagePool(4)
    (page,) = pool.take(1)
    with pytest.raises(AssertionError, match=f"page {page}: count 1, holders 2"):
        pool.check_integrity({page: 2})
    pool.release([page])
    pool._free.append(page)
    with pytest.raises(AssertionError, match="twice in the free list"):
        pool.check_integrity({})


class PoolAgainstModel(RuleBasedStateMachine):
    """Against a model that keeps a list of holders and the order of releases."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6)
        self.held: list[int] = []
        self.known: dict[bytes, int] = {}
        self.released: list[int] = []  # remembered pages without a holder, oldest first

    @rule(count=st.integers(0, 3))
    def take(self, count: int) -> None:
        if count <= self.pool.num_available:
            num_free = 5 - len(set(self.held)) - len(self.released)
            evicted = [self.released.pop(0) for _ in range(max(0, count - num_free))]
            self.known = {name: page for name, page in self.known.items() if page not in evicted}
            pages = self.pool.take(count)
            assert set(evicted) <= set(pages)
            assert not set(pages) & set(self.held + self.released)
            self.held += pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.held.remove(page)
        self.pool.release([page])
        if page not in self.held and page in self.known.values():
            self.released.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=st.binary(min_size=1, max_size=1))
    def register(self, data: st.DataObject, name: bytes) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.pool.register(page, name)
        if name not in self.known and page not in self.known.values():
            self.known[name] = page

    @precondition(lambda self: self.held or self.released)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(set(self.held) | set(self.released))))
        self.pool.share([page])
        self.held.append(page)
        if page in self.released:
            self.released.remove(page)

    @invariant()
    def same(self) -> None:
        self.pool.check_integrity(Counter(self.held))
        assert self.pool.num_evictable == len(self.released)
        assert self.pool.num_held == len(set(self.held))
        assert {name: self.pool.lookup(name) for name in self.known} == self.known


PoolAgainstModel.TestCase.settings = settings(max_examples=30, deadline=None)
TestPoolAgainstModel = PoolAgainstModel.TestCase
