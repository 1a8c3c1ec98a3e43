"""Prefix cache: names for full pages of tokens, and the longest prefix the pools still hold. Imports no jax."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from jaxinfer.cache.pages import PagePool

HASH_BYTES = 32


def extend_page_hashes(hashes: list[bytes], token_ids: Sequence[int], page_size: int, salt: str) -> None:
    """Append the hashes of the full pages of `token_ids` that `hashes` does not cover yet.

    A page's hash covers its own tokens and all before them (the parent's hash) and the salt, so equal hashes mean
    equal keys and values; 256 bits of BLAKE2b, so that nobody can make two different pages share one.
    """
    for page in range(len(hashes), len(token_ids) // page_size):
        parent = hashes[-1] if page else blake2b(salt.encode(), digest_size=HASH_BYTES).digest()
        tokens = array("q", token_ids[page * page_size : (page + 1) * page_size])
        hashes.append(blake2b(parent + tokens.tobytes(), digest_size=HASH_BYTES).digest())


def first_page_in_window(window: int | None, position: int, page_size: int) -> int:
    """First logical page that a query at `position` reads; a query sees `window` positions, its own included."""
    return 0 if window is None else max(0, position - window + 1) // page_size


def longest_prefix(
    pools: Sequence[PagePool], windows: Sequence[int | None], hashes: Sequence[bytes], page_size: int
) -> int:
    """Pages of the longest prefix from which a sequence can go on.

    A full-attention group must hold every page of it, a window group those that the next position's window reaches.
    """
    length = len(hashes)
    for pool, window in zip(pools, windows, strict=True):
        if window is None:
            length = next((page for page in range(length) if pool.lookup(hashes[page]) is None), length)
    shrunk = True
    while shrunk:
        shrunk = False
        for pool, window in zip(pools, windows, strict=True):
            page = length - 1
            while window is not None and page >= first_page_in_window(window, length * page_size, page_size):
                if pool.lookup(hashes[page]) is None:  # no prefix that reads this page will do: end before it
                    length, shrunk = page, True
                page -= 1
    return length
