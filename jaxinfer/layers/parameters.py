"""Where modules get their parameters from: shapes alone, or random numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Parameters:
    """Makes parameters of one dtype. Without a seed they are jax.ShapeDtypeStructs: nothing is computed or stored.

    Every parameter carries `axes`, its dimensions' logical names (None: never split), which sharding, loading and the
    memory budget read.
    """

    def __init__(self, dtype: Any, seed: int | None = None) -> None:
        self.dtype = jnp.dtype(dtype)
        self._key = None if seed is None else jax.random.key(seed)

    def normal(self, axes: dict[str, int], scale: float) -> nnx.Param:
        """Normally distributed around 0 with standard deviation `scale`."""
        shape = tuple(axes.values())
        if self._key is None:
            return self._abstract(axes)
        self._key, own = jax.random.split(self._key)
        return nnx.Param(scale * jax.random.normal(own, shape, self.dtype), axes=tuple(axes))

    def constant(self, axes: dict[str, int], value: float) -> nnx.Param:
        if self._key is None:
            return self._abstract(axes)
        return nnx.Param(jnp.full(tuple(axes.values()), value, self.dtype), axes=tuple(axes))

    def _abstract(self, axes: dict[str, int]) -> nnx.Param:
        return nnx.Param(jax.ShapeDtypeStruct(tuple(axes.values()), self.dtype), axes=tuple(axes))
