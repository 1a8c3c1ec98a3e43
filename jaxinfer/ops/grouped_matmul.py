"""Rows in ragged groups, each group times a matrix of its own: the product under every expert.

On TPU and GPU this is XLA's ragged product. On CPU XLA multiplies every row with every matrix, so here a loop takes one
block of a group's rows at a time: a matrix is read once for each block, and not at all where its group is empty.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax import lax

_CORES = os.cpu_count() or 1
_MOST_ROWS = 128  # of a block: beyond that a product is no faster
_CUT_ROWS = 32  # up to so many rows a product is faster with the matrix cut into one block a core, and on the left

_RAGGED = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])


def grouped_matmul(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """x [R, in], the rows of group 0, then of group 1, ...; weight [G, out, in]; group_sizes int32 [G] -> [R, out].

    Groups may be empty. Rows past the last group come out finite where x is, and mean nothing.
    """
    return lax.platform_dependent(x, weight, group_sizes, cpu=_by_blocks, default=_ragged)


def _ragged(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot_general(x, weight, group_sizes, _RAGGED)


def _by_blocks(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    num_rows, (num_groups, out, _) = x.shape[0], weight.shape
    size = block_rows(num_rows, num_groups)
    first_block = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(-(-group_sizes // size), dtype=jnp.int32)])
    first_row = jnp.cumsum(group_sizes) - group_sizes
    padded = jnp.pad(x, ((0, size - 1), (0, 0)))

    def multiply(block: jax.Array, y: jax.Array) -> jax.Array:
        group = jnp.sum(first_block[1:] <= block)
        start = first_row[group] + (block - first_block[group]) * size
        rows = lax.dynamic_slice_in_dim(padded, start, size)
        product = _product(rows, lax.dynamic_index_in_dim(weight, group, keepdims=False))
        # A group's last block also writes rows of the groups after it, whose own blocks come later.
        return lax.dynamic_update_slice_in_dim(y, product, start, 0)

    y = jnp.zeros((num_rows + size - 1, out), x.dtype)
    return lax.fori_loop(0, first_block[-1], multiply, y)[:num_rows]


def block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: a power of two of about what a group has, were all alike."""
    size = 1
    while size < _MOST_ROWS and size * num_groups < num_rows:
        size *= 2
    return size


def _product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """rows [B, in], matrix [out, in] -> [B, out]."""
    num_rows, out = rows.shape[0], matrix.shape[0]
    if num_rows == 1 or num_rows > _CUT_ROWS or out % _CORES:
        return lax.dot_general(rows, matrix, (((1,), (1,)), ((), ())))
    parts = matrix.reshape(_CORES, out // _CORES, -1)
    columns = jnp.broadcast_to(rows.T, (_CORES, *rows.T.shape))
    return lax.dot_general(parts, columns, (((2,), (1,)), ((0,), (0,)))).reshape(out, num_rows).T
