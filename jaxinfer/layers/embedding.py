"""Token and position tables, and the logits they give."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.parameters import Parameters
from jaxinfer.sharding.spmd import find_stored, place_on, sum_parts


class Embedding(nnx.Module):
    """A table [rows, width]; `rows` and `width` are {logical axis name: size} of one axis each.

    Where the table at hand is one device's part of the rows, what is found is summed over the devices. Where it is a
    part of the columns, ids travel to the other parts, and what these find comes back.
    """

    def __init__(self, make: Parameters, rows: dict[str, int], width: dict[str, int]) -> None:
        ((self.rows, self.num_rows),) = rows.items()
        (self.num_columns,) = width.values()
        self.weight = make.normal({**rows, **width}, math.prod(width.values()) ** -0.5)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int32 [T] -> [T, width]."""
        if self.weight.shape[1] < self.num_columns:
            return find_stored(self._find, ids)
        return self._find(ids)

    def _find(self, ids: jax.Array) -> jax.Array:
        table = self.weight[...]
        if table.shape[0] == self.num_rows:
            return table[ids]
        own = ids - place_on(self.rows) * table.shape[0]
        is_own = (own >= 0) & (own < table.shape[0])
        return sum_parts(jnp.where(is_own[:, None], table[own], 0), self.rows)
