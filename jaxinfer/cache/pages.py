"""Books of one KV group's pages: who holds which page, which are free, which are only remembered. Imports no jax."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping


class PagePool:
    """Reference counts, free list and prefix index of `num_pages` pages (PagedAttention, arXiv:2309.06180).

    Page 0 is nobody's: padding writes go there. Every other page is exactly one of
      held       reference count > 0; it may be in the prefix index too,
      evictable  reference count 0, still in the prefix index; taken back least recently released first,
      free       reference count 0, content forgotten.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages} leaves no page to use, page 0 is reserved; use at least 2")
        self.num_pages = num_pages
        self.ref_counts = [0] * num_pages
        self.peak_held = 0
        self.num_freed = 0  # how often a page became available; a request that waits for pages watches it
        self._free = list(range(num_pages - 1, 0, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_pages

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out now."""
        return len(self._free) + len(self._evictable)

    @property
    def num_held(self) -> int:
        return self.num_usable - self.num_available

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    def take(self, count: int) -> list[int]:
        """`count` pages with reference count 1, free ones first; the caller has checked `num_available`."""
        assert count <= self.num_available
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._evictable.popitem(last=False)
                self._forget(page)
            self.ref_counts[page] = 1
            pages.append(page)
        self.peak_held = max(self.peak_held, self.num_held)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each page; evictable pages are held again."""
        for page in pages:
            assert page
            assert self.ref_counts[page] or self._hash_of[page] is not None
            if not self.ref_counts[page]:
                del self._evictable[page]
            self.ref_counts[page] += 1
        self.peak_held = max(self.peak_held, self.num_held)

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer for each page. Give a sequence's pages last first: a prefix outlives what follows it."""
        for page in pages:
            count = self.ref_counts[page] - 1
            assert page
            assert count >= 0
            self.ref_counts[page] = count
            if count == 0:
                self.num_freed += 1
                if self._hash_of[page] is None:
                    self._free.append(page)
                else:
                    self._evictable[page] = None

    def lookup(self, page_hash: bytes) -> int | None:
        """The page that holds this content, held or evictable."""
        return self._page_of.get(page_hash)

    def register(self, page: int, page_hash: bytes) -> None:
        """Make a held, full page findable. Of two pages with the same content the first one stays the known one."""
        assert self.ref_counts[page] > 0
        if self._hash_of[page] is None and page_hash not in self._page_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def forget_all(self) -> None:
        """Empty the prefix index: evictable pages become free."""
        self._free.extend(self._evictable)
        self._evictable.clear()
        self._page_of.clear()
        self._hash_of = [None] * self.num_pages

    def _forget(self, page: int) -> None:
        page_hash = self._hash_of[page]
        assert page_hash is not None
        del self._page_of[page_hash]
        self._hash_of[page] = None

    def check_integrity(self, holders: Mapping[int, int]) -> None:
        """AssertionError unless every page is in exactly one state and held by exactly `holders[page]` sequences."""
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a page is twice in the free list"
        assert not free & evictable, f"pages {free & evictable} are both free and evictable"
        assert 0 not in free | evictable | set(holders), "the reserved page 0 was handed out"
        assert self.ref_counts[0] == 0
        assert self._hash_of[0] is None
        for page in range(1, self.num_pages):
            count = self.ref_counts[page]
            assert count == holders.get(page, 0), f"page {page}: count {count}, holders {holders.get(page, 0)}"
            assert (count == 0) == (page in free or page in evictable), f"page {page}: count {count}, state wrong"
            known = self._hash_of[page] is not None
            assert not (known and page in free), f"page {page} is free but in the prefix index"
            assert known or page not in evictable, f"page {page} is evictable but not in the prefix index"
        assert self._page_of == {h: p for p, h in enumerate(self._hash_of) if h is not None}
        assert self.num_held <= self.peak_held <= self.num_usable
