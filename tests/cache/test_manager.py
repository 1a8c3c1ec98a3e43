"""Prefix matching, rings, forks and numbers of the KV cache books, against brute force where there is a choice."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jaxinfer.cache.groups import KVGroup
from jaxinfer.cache.manager import KVCacheManager, PageCopy
from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import extend_page_hashes, first_page_in_window, longest_prefix


def manager_of(windows, num_pages=20, page_size=4, widths=None, max_num_seqs=4) -> KVCacheManager:
    groups = [KVGroup(1, 8, window, (index,)) for index, window in enumerate(windows)]
    widths = widths or [group.table_width(64, 8, page_size) for group in groups]
    return KVCacheManager(groups, [num_pages] * len(groups), page_size, widths, max_num_seqs)


def test_page_hashes_cover_all_before_them_and_the_salt():
    hashes: list[bytes] = []
    extend_page_hashes(hashes, [1, 2, 3, 4, 5], 2, "")
    assert len(hashes) == 2
    whole: list[bytes] = []
    extend_page_hashes(whole, [1, 2, 3, 4, 5, 6], 2, "")
    extend_page_hashes(hashes, [1, 2, 3, 4, 5, 6], 2, "")
    assert hashes == whole
    for tokens, salt in (([9, 2, 3, 4, 5, 6], ""), ([1, 2, 3, 4, 5, 6], "other")):
        other: list[bytes] = []
        extend_page_hashes(other, tokens, 2, salt)
        assert not set(other) & set(whole)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    windows=st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=3),
    page_size=st.integers(1, 4),
    length=st.integers(0, 8),
)
def test_longest_prefix_is_the_longest_whose_visible_pages_are_all_there(data, windows, page_size, length):
    hashes = [bytes([page]) for page in range(length)]
    pools, present = [], []
    for _ in windows:
        there = data.draw(st.sets(st.integers(0, 7)))
        pool = PagePool(10)
        for page, logical in zip(pool.take(len(there)), there, strict=True):
            pool.register(page, bytes([logical]))
        pools.append(pool)
        present.append(there)

    def usable(num_pages: int) -> bool:
        position = num_pages * page_size  # the first token to compute; it and all later ones must see what they need
        return all(
            seen // page_size in there
            for window, there in zip(windows, present, strict=True)
            for seen in range(position)
            if window is None or position - window < seen
        )

    best = max(num_pages for num_pages in range(length + 1) if usable(num_pages))
    assert longest_prefix(pools, windows, hashes, page_size) == best


@settings(max_examples=60, deadline=None)
@given(window=st.integers(1, 20), page_size=st.integers(1, 5), width=st.integers(2, 12))
def test_the_largest_chunk_is_what_a_ring_can_hold_wherever_it_starts(window: int, page_size: int, width: int):
    manager = manager_of([window], page_size=page_size, widths=[width])

    def fits(chunk: int) -> bool:
        return all(
            (start + chunk - 1) // page_size - first_page_in_window(window, start, page_size) < width
            for start in range(window + 2 * page_size)
        )

    chunk = manager.max_chunk_tokens(10**6)
    assert chunk < 1 or fits(chunk)
    assert not fits(chunk + 1)
    assert manager.max_chunk_tokens(width * page_size) == width * page_size


@pytest.mark.parametrize(
    ("windows", "num_pages", "expected"),
    [
        ([None], 6, 20),
        ([9], 4, 2**31 - 1),  # 3 pages always hold the window
        ([9], 3, 8),  # 2 do not: only what fits whole
        ([None, 9], 6, 20),
        ([None], 100, 64),  # the page table's width
    ],
)
def test_tokens_that_one_sequence_can_hold(windows, num_pages, expected):
    assert manager_of(windows, num_pages).max_sequence_tokens() == expected


def test_allocation_is_all_or_nothing_over_groups():
    manager = manager_of([None, None], num_pages=5)
    first = manager.open(0, [], 0, 8, [0, 0])
    assert first is not None
    assert manager.allocate(first, 0, 8) == []
    manager.pools[1].take(1)  # the second group has one page left, the first has two
    assert manager.allocate(first, 8, 16) is None
    assert [pool.num_available for pool in manager.pools] == [2, 1]
    assert manager.largest_end(first, 8, 16) == 12
    assert manager.allocate(first, 8, 12) == []
    assert first.num_pages == 3


def test_opening_leaves_the_reserve_and_counts_revived_pages():
    manager = manager_of([None], num_pages=6)
    hashes: list[bytes] = []
    extend_page_hashes(hashes, list(range(12)), 4, "")
    first = manager.open(0, hashes, 0, 12, [0])
    assert first is not None
    manager.allocate(first, 0, 12)
    manager.register(first, hashes, 12)
    manager.release(first)
    assert manager.match_prefix(hashes, 12) == 8  # not 12: the last token must be computed
    assert manager.match_prefix(hashes, 13) == 12
    assert manager.open(0, hashes, 12, 20, [1]) is None  # 3 revived, 2 new, none left
    again = manager.open(0, hashes, 12, 20, [0])
    assert again is not None
    assert again.num_pages == 3
    manager.check_integrity([again])


def test_a_ring_reuses_its_columns_and_gives_back_what_has_passed():
    manager = manager_of([6], page_size=2, widths=[5])
    sequence = manager.open(2, [], 0, 40, [0])
    assert sequence is not None
    for start in range(0, 40, 4):
        assert manager.allocate(sequence, start, start + 4) == []
        assert len(sequence.pages[0]) <= 5
        manager.check_integrity([sequence])
        seen = range(max(0, start - 5) // 2, (start + 4) // 2)
        assert [manager.tables[0][2, page % 5] for page in seen] == sequence.pages[0]
    assert manager.pools[0].peak_held == 5
    manager.release(sequence)
    assert not manager.tables[0].any()


def test_the_last_holder_of_a_shared_page_writes_in_place():
    manager = manager_of([None])
    parent = manager.open(0, [], 0, 6, [0])
    assert parent is not None
    manager.allocate(parent, 0, 6)
    shared = parent.pages[0][1]
    children = [manager.fork(parent, slot) for slot in (1, 2)]
    assert manager.pools[0].num_held == 2
    assert manager.waste() == 2 / 8  # positions 6 and 7, once, though three hold them
    for sequence in (children[0], parent):
        (copy,) = manager.allocate(sequence, 6, 7)
        assert copy == PageCopy(0, shared, sequence.pages[0][1])
    assert manager.allocate(children[1], 6, 7) == []
    assert children[1].pages[0][1] == shared
    assert manager.allocate(parent, 7, 8) == ()
    manager.check_integrity([parent, *children])
    assert manager.usage().num_held == 4
    assert manager.waste() == 2 / 16


def test_check_integrity_sees_a_wrong_table():
    manager = manager_of([None])
    sequence = manager.open(0, [], 0, 6, [0])
    assert sequence is not None
    manager.allocate(sequence, 0, 6)
    manager.tables[0][0, 1] += 1
    with pytest.raises(AssertionError, match="page tables differ from the books"):
        manager.check_integrity([sequence])
