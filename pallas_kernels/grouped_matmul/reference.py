"""Grouped matrix product in plain jnp, float32, a matrix for every row: slow, and the oracle for what is faster."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Every row times its group's matrix.

    x            [R, in], the rows of group 0, then those of group 1, ...
    weight       [G, in, out]
    group_sizes  int32 [G]; a group may be empty, and rows past the last group belong to none

    Returns [R, out] in x's dtype, zero for rows of no group.
    """
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])
    group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), weight.shape[0] - 1)
    own = weight.astype(jnp.float32)[group]
    y = jnp.einsum("rd,rdf->rf", x.astype(jnp.float32), own, precision="highest")
    return jnp.where(row[:, None] < ends[-1], y, 0.0).astype(x.dtype)
