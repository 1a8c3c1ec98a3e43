"""Token and position tables, and the logits they give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class Embedding(nnx.Module):
    """A table [rows, width]; `rows` and `width` are {logical axis name: size} of one axis each."""

    def __init__(self, rows: dict[str, int], width: dict[str, int], *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        shape = (*rows.values(), *width.values())
        self.weight = nnx.Param(
            shape[-1] ** -0.5 * jax.random.normal(rngs.params(), shape, dtype), axes=(*rows, *width)
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.weight[...][ids]
