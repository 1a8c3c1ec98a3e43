"""The vocabulary in groups: a layout, and reductions over it that XLA compiles well.

Rows of logits [S, V] are viewed as [S, G, W], W = ceil(V / G): token `member * W + group` is a member of its group.
Reductions over the vocabulary first fold the G members and then reduce the W values that are left.

A reduction has two forms, picked when the program is compiled for its platform. Accelerators get the plain one, which
runs at memory speed there. XLA's CPU compiler does not vectorise a reduction of something computed (five times
slower) or one of (value, index) pairs (twenty times), but it does vectorise elementwise code; so on CPU the members
are combined pairwise, elementwise, in an order that does not depend on how many rows share the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def ungroup(x: jax.Array, vocab_size: int) -> jax.Array:
    """The inverse of `group`: [S, G, W] -> [S, V]."""
    return x.reshape(x.shape[0], -1)[:, :vocab_size]


def fold_max(x: jax.Array) -> jax.Array:
    """[S, G, W] -> [S, W]: each group's maximum; NaN where a member is NaN."""
    return jnp.max(x, axis=1)


def fold_sum(x: jax.Array) -> jax.Array:
    """[S, G, W] -> [S, W]: each group's sum."""

    def halve(x: jax.Array) -> jax.Array:
        while (num_members := x.shape[1]) > 1:
            half = num_members // 2
            x = lax.slice_in_dim(x, 0, half, axis=1) + lax.slice_in_dim(x, half, num_members, axis=1)
        return x.reshape(x.shape[0], x.shape[2])

    return lax.platform_dependent(x, cpu=halve, default=lambda x: jnp.sum(x, axis=1))


def total_int(term: Callable[..., jax.Array], arrays: Sequence[jax.Array], limit: jax.Array) -> jax.Array:
    """The sum over the vocabulary [S] int32 of term(*arrays, limit): arrays [S, G, W], limit [S].

    `term` gets arrays of one shape and returns int32 of that shape. It should be written with `lax` operations, which
    are traced many times faster than those of `jax.numpy`.
    """
    num_rows, _, width = arrays[0].shape

    def member_by_member() -> jax.Array:
        spread = lax.broadcast_in_dim(limit, (num_rows, 1, width), (0,))
        members = zip(*(lax.split(x, (1,) * NUM_MEMBERS, axis=1) for x in arrays), strict=True)
        parts = [term(*own, spread) for own in members]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0].reshape(num_rows, width)

    def at_once() -> jax.Array:
        return jnp.sum(term(*arrays, lax.broadcast_in_dim(limit, arrays[0].shape, (0,))), axis=1)

    return jnp.sum(lax.platform_dependent(cpu=member_by_member, default=at_once), axis=-1)


def first_argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[S, N] -> (maximum [S], its first index [S] int32), N small. With a NaN in the row, NaN and some index."""
    maximum = jnp.max(x, axis=-1)
    indices = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = jnp.min(jnp.where(x == lax.expand_dims(maximum, (1,)), indices, x.shape[1] - 1), axis=-1)
    return maximum, first


def argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[S, G, W] -> (maximum [S], the first token id that has it [S] int32). With a NaN in the row, NaN and some id.

    One pass over the vocabulary: the second reads one row of W tokens, the first of the G that holds the maximum.
    """
    maximum, member = first_argmax(jnp.max(x, axis=2))
    tokens = jnp.take_along_axis(x, lax.expand_dims(member, (1, 2)), axis=1)[:, 0]
    return maximum, member * x.shape[2] + first_argmax(tokens)[1]


def pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """[S, G, W] and group index [S] -> the group's members [S, G]. Finite values only."""

    def gather(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index, axis=2)[:, :, 0]

    def mask(x: jax.Array, index: jax.Array) -> jax.Array:  # a TPU gathers slowly along its lanes
        return jnp.sum(jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 2) == index, x, 0), axis=2)

    return lax.platform_dependent(x, lax.expand_dims(index, (1, 2)), tpu=mask, default=gather)
