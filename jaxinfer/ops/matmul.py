"""x [T, in] times weight [out, in]: the product under every projection.

What this costs on CPU depends on how it is written. One row times a weight runs at memory speed, on all cores. For more
rows XLA calls a library, which reads the weight many times on one core, unless the weight is cut along its rows into
blocks and multiplied as a batch with the weight on the left: one block a core, and where rows are few, so that memory
is the limit, four. For a middling number of rows Eigen is the faster library (and only with blocks), for few and for
many rows it is the one XLA calls by default.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

_BLOCKED_ROWS = range(2, 512)
_FEW_ROWS = 8
_EIGEN_ROWS = range(17, 512)
# Eigen is slow at paged attention's many small products, which outweigh the others in steps of few tokens.
_EIGEN_ROWS_WITH_ATTENTION = range(33, 512)
_CORES = os.cpu_count() or 1


def compiler_options(
    num_rows: int, platform: str, *, with_attention: bool = False, with_experts: bool = False
) -> dict[str, str]:
    """XLA's options for a program whose products have `num_rows` rows.

    with_experts: grouped products are among them, at which Eigen takes 1.5 to 2.5 times as long.
    """
    eigen = uses_eigen(num_rows, platform, with_attention=with_attention) and not with_experts
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if eigen else {}


def uses_eigen(num_rows: int, platform: str, *, with_attention: bool = False) -> bool:
    """Whether Eigen is the library behind the products of a program of `num_rows` rows."""
    return platform == "cpu" and num_rows in (_EIGEN_ROWS_WITH_ATTENTION if with_attention else _EIGEN_ROWS)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, in], weight [out, in] -> [T, out], in their common dtype."""
    if x.shape[0] in _BLOCKED_ROWS and weight.shape[0] % _CORES == 0:
        return jax.lax.platform_dependent(x, weight, cpu=_blocked, default=_plain)
    return _plain(x, weight)


def _plain(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


def _blocked(x: jax.Array, weight: jax.Array) -> jax.Array:
    num_blocks = 4 * _CORES
    if x.shape[0] > _FEW_ROWS or weight.shape[0] % num_blocks:
        num_blocks = _CORES
    blocks = weight.reshape(num_blocks, -1, weight.shape[1])
    columns = jnp.broadcast_to(x.T, (num_blocks, *x.T.shape))
    y = jax.lax.dot_general(blocks, columns, (((2,), (1,)), ((0,), (0,))))
    return y.reshape(weight.shape[0], x.shape[0]).T
