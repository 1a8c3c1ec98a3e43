"""Which pages each running sequence holds, in every KV group, and its page-table rows. Host books; imports no jax.

The device runs steps in the order in which they were scheduled, so a page may be given to another sequence as soon as
no later step reads it, even while steps that do read it are in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxinfer.cache.groups import KVGroup
from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import first_page_in_window, longest_prefix


class PageCopy(NamedTuple):
    """Copy page `source` to page `target` in the arrays of `group`, before the step writes anything."""

    group: int
    source: int
    target: int


@dataclass(slots=True, eq=False)
class SequencePages:
    """What one running sequence holds. Logical page j has positions [j * page_size, (j + 1) * page_size).

    slot            row in the page tables
    num_pages       logical pages allocated so far, the same in every group
    num_tokens      positions that are written once the last scheduled step has run
    num_registered  logical pages already offered to the prefix index
    first           per group, the first logical page still held (0 in full-attention groups)
    pages           per group, the pages of the logical pages first .. num_pages - 1
    tail_shared     the page that position `num_tokens` falls into may have other holders
    """

    slot: int
    num_pages: int
    num_tokens: int
    num_registered: int
    first: list[int]
    pages: list[list[int]]
    tail_shared: bool = False


@dataclass(frozen=True)
class KVUsage:
    """Pages summed over groups, page 0 not counted; `peak_held` sums the groups' own peaks."""

    num_pages: int
    num_held: int
    num_evictable: int
    peak_held: int


class KVCacheManager:
    """Books of all KV groups. `tables[group]` is int32 [max_num_seqs, width]: page of logical page j at j % width.

    Unused table entries are 0. Rows change with every call: copy what a step needs before the next call.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_pages_per_group: Sequence[int],
        page_size: int,
        table_widths: Sequence[int],
        max_num_seqs: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.windows = [group.window for group in groups]
        self.page_size = page_size
        self.table_widths = list(table_widths)
        self.enable_prefix_caching = enable_prefix_caching
        self.pools = [PagePool(num_pages) for num_pages in num_pages_per_group]
        self.tables = [np.zeros((max_num_seqs, width), np.int32) for width in table_widths]
        self._sequences: list[SequencePages | None] = [None] * max_num_seqs
        assert groups
        assert len(self.windows) == len(self.pools) == len(self.tables)

    # What fits

    def max_sequence_tokens(self) -> int:
        """Positions that one sequence can hold with the pools to itself; 2**31 - 1 when only rings bound it."""
        limit = 2**31 - 1
        for pool, window, width in zip(self.pools, self.windows, self.table_widths, strict=True):
            held = min(pool.num_usable, width)
            if window is None or held < self._pages_of_span(window):
                limit = min(limit, held * self.page_size)
        return limit

    def max_chunk_tokens(self, max_model_len: int) -> int:
        """Most positions of one sequence that one step may write without a ring overwriting what the step reads."""
        limit = max_model_len
        for window, width in zip(self.windows, self.table_widths, strict=True):
            if window is not None and width * self.page_size < max_model_len:
                limit = min(limit, (width - 1) * self.page_size + 2 - window)
        return limit

    def _pages_of_span(self, num_positions: int) -> int:
        """Most pages that so many consecutive positions can touch."""
        return (num_positions + self.page_size - 2) // self.page_size + 1

    def growth(self, sequence: SequencePages, num_tokens: int) -> list[int]:
        """Per group, the most pages that `sequence` will have to add to reach `num_tokens` positions."""
        total = -(-num_tokens // self.page_size)
        return [
            min(total, first + min(width, pool.num_usable)) - sequence.num_pages
            for first, width, pool in zip(sequence.first, self.table_widths, self.pools, strict=True)
        ]

    def num_available(self) -> int:
        """Pages that can be had in every group."""
        return min(pool.num_available for pool in self.pools)

    @property
    def num_freed(self) -> int:
        """Grows whenever a page becomes available."""
        return sum(pool.num_freed for pool in self.pools)

    # A sequence's life

    def match_prefix(self, page_hashes: Sequence[bytes], num_tokens: int) -> int:
        """Tokens of a `num_tokens` long sequence that need no computing; the last token is always computed."""
        limit = min(len(page_hashes), (num_tokens - 1) // self.page_size)
        return longest_prefix(self.pools, self.windows, page_hashes[:limit], self.page_size) * self.page_size

    def open(
        self, slot: int, page_hashes: Sequence[bytes], num_cached: int, num_tokens: int, reserve: Sequence[int]
    ) -> SequencePages | None:
        """Seat a sequence in a free row, sharing the pages of its first `num_cached` tokens (from `match_prefix`).

        None when its `num_tokens` tokens would not leave `reserve[group]` pages available.
        """
        num_pages = num_cached // self.page_size
        first = [first_page_in_window(window, num_cached, self.page_size) for window in self.windows]
        matched: list[list[int]] = []
        for pool, start in zip(self.pools, first, strict=True):
            found = [pool.lookup(page_hash) for page_hash in page_hashes[start:num_pages]]
            matched.append([page for page in found if page is not None])
            assert len(matched[-1]) == len(found)
        sequence = SequencePages(slot, num_pages, num_cached, num_pages, first, matched)
        grown = self.growth(sequence, num_tokens)
        for pool, pages, more, spare in zip(self.pools, matched, grown, reserve, strict=True):
            revived = sum(pool.ref_counts[page] == 0 for page in pages)
            if revived + more + spare > pool.num_available:
                return None
        self._seat(sequence)
        return sequence

    def fork(self, parent: SequencePages, slot: int) -> SequencePages:
        """Seat a copy of `parent` that shares all its pages; the first of them to write a shared page copies it."""
        parent.tail_shared = True
        child = SequencePages(
            slot,
            parent.num_pages,
            parent.num_tokens,
            parent.num_registered,
            list(parent.first),
            [list(pages) for pages in parent.pages],
            tail_shared=True,
        )
        self._seat(child)
        return child

    def _seat(self, sequence: SequencePages) -> None:
        assert self._sequences[sequence.slot] is None
        self._sequences[sequence.slot] = sequence
        for group, (pool, pages) in enumerate(zip(self.pools, sequence.pages, strict=True)):
            pool.share(pages)
            self._write_row(group, sequence, sequence.first[group], pages)

    def _write_row(self, group: int, sequence: SequencePages, logical: int, pages: Sequence[int]) -> None:
        if pages:
            columns = np.arange(logical, logical + len(pages)) % self.table_widths[group]
            self.tables[group][sequence.slot, columns] = pages

    def release(self, sequence: SequencePages) -> None:
        """Give up the row and all pages; those in the prefix index stay findable until they are needed."""
        assert self._sequences[sequence.slot] is sequence
        self._sequences[sequence.slot] = None
        for pool, table, pages in zip(self.pools, self.tables, sequence.pages, strict=True):
            pool.release(reversed(pages))
            table[sequence.slot] = 0

    # A step's writes

    def allocate(self, sequence: SequencePages, start: int, end: int) -> Sequence[PageCopy] | None:
        """Pages for positions [start, end), which the next step writes and reads back to their window.

        Returns the copies that must come before the writes; None, with nothing taken, when some group has too few.
        """
        num_new = -(-end // self.page_size) - sequence.num_pages
        if num_new <= 0 and not sequence.tail_shared:
            sequence.num_tokens = end
            return ()
        self._release_passed(sequence, start)
        shared = self._shared_tail(sequence, start)
        num_new = max(num_new, 0)
        if any(num_new + bool(page) > pool.num_available for pool, page in zip(self.pools, shared, strict=True)):
            return None
        copies = []
        tail = start // self.page_size
        for group, (pool, pages, page) in enumerate(zip(self.pools, sequence.pages, shared, strict=True)):
            assert sequence.num_pages + num_new - sequence.first[group] <= self.table_widths[group]
            if page:
                (target,) = pool.take(1)
                pool.release((page,))
                pages[tail - sequence.first[group]] = target
                self._write_row(group, sequence, tail, (target,))
                copies.append(PageCopy(group, page, target))
            new = pool.take(num_new)
            pages.extend(new)
            self._write_row(group, sequence, sequence.num_pages, new)
        sequence.num_pages += num_new
        sequence.num_tokens = end
        sequence.tail_shared = False
        return copies

    def largest_end(self, sequence: SequencePages, start: int, end: int) -> int:
        """The largest end <= `end` for which `allocate` succeeds now; `start` when there is none."""
        self._release_passed(sequence, start)
        for pool, page in zip(self.pools, self._shared_tail(sequence, start), strict=True):
            room = pool.num_available - bool(page)
            end = min(end, (sequence.num_pages + room) * self.page_size if room >= 0 else start)
        return max(start, end)

    def _shared_tail(self, sequence: SequencePages, start: int) -> list[int]:
        """Per group, the page that `start` falls into if another sequence holds it too, else 0."""
        tail = start // self.page_size
        if not sequence.tail_shared or tail >= sequence.num_pages:
            return [0] * len(self.pools)
        held = [pages[tail - first] for pages, first in zip(sequence.pages, sequence.first, strict=True)]
        return [page if pool.ref_counts[page] > 1 else 0 for pool, page in zip(self.pools, held, strict=True)]

    def _release_passed(self, sequence: SequencePages, start: int) -> None:
        """Release the pages that no query from `start` on can see."""
        for group, window in enumerate(self.windows):
            first, held = sequence.first[group], sequence.pages[group]
            passed = min(first_page_in_window(window, start, self.page_size) - first, len(held))
            if passed > 0:
                self.pools[group].release(held[:passed])
                columns = np.arange(first, first + passed) % self.table_widths[group]
                self.tables[group][sequence.slot, columns] = 0
                del held[:passed]
                sequence.first[group] += passed

    def register(self, sequence: SequencePages, page_hashes: Sequence[bytes], num_tokens: int) -> None:
        """Offer the pages that the first `num_tokens` positions fill, all scheduled and known, to the prefix index."""
        num_full = num_tokens // self.page_size
        for logical in range(sequence.num_registered, num_full):
            for pool, pages, first in zip(self.pools, sequence.pages, sequence.first, strict=True):
                if logical >= first:
                    pool.register(pages[logical - first], page_hashes[logical])
        sequence.num_registered = max(sequence.num_registered, num_full)

    def forget_prefixes(self) -> None:
        """Empty the prefix index (the weights changed). Call with no sequence seated."""
        assert not any(self._sequences)
        for pool in self.pools:
            pool.forget_all()

    # Numbers and proof

    def usage(self) -> KVUsage:
        return KVUsage(
            num_pages=sum(pool.num_usable for pool in self.pools),
            num_held=sum(pool.num_held for pool in self.pools),
            num_evictable=sum(pool.num_evictable for pool in self.pools),
            peak_held=sum(pool.peak_held for pool in self.pools),
        )

    def waste(self) -> float:
        """The share of held positions that no token has been scheduled to fill."""
        unfilled: list[dict[int, int]] = [{} for _ in self.pools]  # per group and last page; sharers have the same
        for sequence in filter(None, self._sequences):
            for positions, pages in zip(unfilled, sequence.pages, strict=True):
                if pages:
                    positions[pages[-1]] = sequence.num_pages * self.page_size - sequence.num_tokens
        num_held = sum(pool.num_held for pool in self.pools)
        return sum(sum(positions.values()) for positions in unfilled) / max(num_held * self.page_size, 1)

    def check_integrity(self, sequences: Iterable[SequencePages]) -> None:
        """AssertionError unless the pools, the seats and the tables agree with what `sequences` hold."""
        seated = list(sequences)
        assert sorted(s.slot for s in seated) == [slot for slot, s in enumerate(self._sequences) if s is not None]
        for group, (pool, window, width) in enumerate(zip(self.pools, self.windows, self.table_widths, strict=True)):
            pool.check_integrity(Counter(page for s in seated for page in s.pages[group]))
            expected = np.zeros_like(self.tables[group])
            for sequence in seated:
                first, pages = sequence.first[group], sequence.pages[group]
                assert self._sequences[sequence.slot] is sequence
                assert first + len(pages) == sequence.num_pages
                assert len(pages) <= width
                assert sequence.num_tokens <= sequence.num_pages * self.page_size < sequence.num_tokens + self.page_size
                assert window is not None or first == 0
                assert first <= first_page_in_window(window, sequence.num_tokens, self.page_size)
                for logical, page in enumerate(pages, start=first):
                    expected[sequence.slot, logical % width] = page
            assert np.array_equal(expected, self.tables[group]), f"group {group}: page tables differ from the books"
