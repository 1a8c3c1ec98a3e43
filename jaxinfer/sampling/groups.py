"""The vocabulary in groups: layout and reductions that XLA compiles to vector code.

Rows of logits [S, V] are viewed as [S, G, W], W = ceil(V / G): token `j * W + g` is member j of group g. Reductions
over the vocabulary first fold the G members elementwise and then reduce the W group values. XLA's CPU compiler
vectorises the fold, while a reduction of a computed [S, V] costs it five times as much; on accelerators the two are
equal. The fold's order is written out, so a row's float sums do not depend on how many rows share its batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

NUM_MEMBERS = 32


def group(x: jax.Array, fill: float) -> jax.Array:
    """[S, V] -> [S, G, W], padded with `fill` where V is not a multiple of G."""
    num_rows, vocab_size = x.shape
    width = -(-vocab_size // NUM_MEMBERS)
    if width * NUM_MEMBERS != vocab_size:
        x = jnp.pad(x, ((0, 0), (0, width * NUM_MEMBERS - vocab_size)), constant_values=fill)
    return x.reshape(num_rows, NUM_MEMBERS, width)


def fold(x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array] = operator.add) -> jax.Array:
    """[S, G, W] -> [S, W]: the members of each group combined pairwise, in a fixed order."""
    parts = [x[:, j] for j in range(x.shape[1])]
    while len(parts) > 1:
        pairs = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def total(x: jax.Array) -> jax.Array:
    """[S, G, W] -> [S]: the sum over the vocabulary."""
    return jnp.sum(fold(x), axis=-1)


def first_argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[S, N] -> (maximum [S], its first index [S] int32). A row with a NaN has maximum NaN and index N - 1 or less.

    Two plain reductions: XLA's CPU code for the fused (value, index) reduction is 20 times slower.
    """
    maximum = jnp.max(x, axis=-1)
    indices = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = jnp.min(jnp.where(x == maximum[:, None], indices, x.shape[1] - 1), axis=-1)
    return maximum, first


def argmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[S, V] -> (maximum [S], its first token id [S] int32), in one pass over the vocabulary.

    The second pass reads one contiguous block of each row: the first one that holds the maximum.
    """
    num_rows, vocab_size = logits.shape
    block = max((b for b in range(16, 513) if vocab_size % b == 0), default=0)
    if not block:
        return first_argmax(logits)
    blocks = logits.reshape(num_rows, vocab_size // block, block)
    maximum, first_block = first_argmax(jnp.max(blocks, axis=-1))
    chosen = jnp.take_along_axis(blocks, first_block[:, None, None], axis=1)[:, 0]
    return maximum, first_block * block + first_argmax(chosen)[1]
