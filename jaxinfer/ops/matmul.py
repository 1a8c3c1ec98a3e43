"""x [T, in] times weight [out, in]: the product under every projection.

XLA's CPU code multiplies one row by a weight at memory speed, on all cores, and a tall x at the speed of a library's
matrix product. In between (a decode batch) it would read the weight once per few rows on one core; there the weight is
cut along its rows into one block a core and multiplied as a batch, weight on the left.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

_BLOCKED_ROWS = range(2, 65)
_BLOCKS = os.cpu_count() or 1


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, in], weight [out, in] -> [T, out], in their common dtype."""
    if x.shape[0] in _BLOCKED_ROWS and weight.shape[0] % _BLOCKS == 0:
        return jax.lax.platform_dependent(x, weight, cpu=_blocked, default=_plain)
    return _plain(x, weight)


def _plain(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def _blocked(x: jax.Array, weight: jax.Array) -> jax.Array:
    blocks = weight.reshape(_BLOCKS, -1, weight.shape[1])
    columns = jnp.broadcast_to(x.T, (_BLOCKS, *x.T.shape))
    y = jax.lax.dot_general(blocks, columns, (((2,), (1,)), ((0,), (0,))))
    return y.reshape(weight.shape[0], x.shape[0]).T
