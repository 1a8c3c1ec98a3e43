"""Where modules get their parameters from: shapes alone, or random numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Parameters:
    """Makes parameters, of one dtype unless asked otherwise.

    Without a seed they are jax.ShapeDtypeStructs: nothing is computed or stored.
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
            return self._abstract(axes, self.dtype)
        self._key, own = jax.random.split(self._key)
        return nnx.Param(scale * jax.random.normal(own, shape, self.dtype), axes=tuple(axes))

    def constant(self, axes: dict[str, int], value: float, dtype: Any = None) -> nnx.Param:
        """All `value`. dtype: None for the others' one."""
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        if self._key is None:
            return self._abstract(axes, dtype)
        return nnx.Param(jnp.full(tuple(axes.values()), value, dtype), axes=tuple(axes))

    def _abstract(self, axes: dict[str, int], dtype: Any) -> nnx.Param:
        return nnx.Param(jax.ShapeDtypeStruct(tuple(axes.values()), dtype), axes=tuple(axes))
