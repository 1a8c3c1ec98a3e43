"""The vocabulary in groups: a layout, and reductions over it that XLA compiles to vector code.

Rows of logits [S, V] are viewed as [S, G, W], W = ceil(V / G): token `member * W + group` is a member of its group.
Reductions over the vocabulary first fold the G members elementwise and then reduce the W values that are left. XLA's
CPU compiler vectorises such a fold; a reduction of something computed costs it five times as much, and a fused
(value, index) reduction twenty times. On accelerators the forms are equal. The order of a fold is written out, so a
row's sums never depend on how many rows share its batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

NUM_MEMBERS = 32  # a power of two


def num_groups(vocab_size: int) -> int:
    """W, for a vocabulary of that size."""
    return -(-vocab_size // NUM_MEMBERS)


def group(x: jax.Array, fill: float) -> jax.Array:
    """[S, V] -> [S, G, W], padded with `fill` where V is not a multiple of G."""
    num_rows, vocab_size = x.shape
    width = num_groups(vocab_size)
    if width * NUM_MEMBERS != vocab_size:
        x = jnp.pad(x, ((0, 0), (0, width * NUM_MEMBERS - vocab_size)), constant_values=fill)
    return x.reshape(num_rows, NUM_MEMBERS, width)


def fold(x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array] = operator.add) -> jax.Array:
    """Combine each group's members, in halves: [S, G, W] -> [S, W]."""
    while (num_members := x.shape[1]) > 1:
        half = num_members // 2
        x = combine(lax.slice_in_dim(x, 0, half, axis=1), lax.slice_in_dim(x, half, num_members, axis=1))
    return x.reshape(x.shape[0], x.shape[2])


def total_int(term: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Sum over the vocabulary of term(members of arrays): arrays [S, G, W], term [S, W] -> [S, W] int32; sum [S].

    The term is applied to one member at a time, so that one loop computes and adds.
    """
    parts = [
        term(*(lax.index_in_dim(x, member, axis=1, keepdims=False) for x in arrays)) for member in range(NUM_MEMBERS)
    ]
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return jnp.sum(parts[0], axis=-1)


def first_argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[S, N] -> (maximum [S], its first index [S] int32). With a NaN in the row, NaN and some index below N."""
    maximum = jnp.max(x, axis=-1)
    indices = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = jnp.min(jnp.where(x == lax.expand_dims(maximum, (1,)), indices, x.shape[1] - 1), axis=-1)
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
    chosen = jnp.take_along_axis(blocks, lax.expand_dims(first_block, (1, 2)), axis=1)[:, 0]
    return maximum, first_block * block + first_argmax(chosen)[1]
