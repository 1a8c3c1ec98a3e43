"""Where modules get their parameters from: shapes alone, or random numbers."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.ops.quantized_matmul import Quantized, quantize
from jaxinfer.quantization import Quantization


class QuantizedWeight(nnx.Module):
    """A weight that is read as a Param is, and gives a Quantized."""

    def __init__(self, values: nnx.Param, scales: nnx.Param) -> None:
        self.values, self.scales = values, scales

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: EllipsisType) -> Quantized:
        return Quantized(self.values[...], self.scales[...])


class Parameters:
    """Makes parameters, of one dtype unless asked otherwise.

    Without a seed they are jax.ShapeDtypeStructs: nothing is computed or stored.
    Every parameter carries `axes`, its dimensions' logical names (None: never split), which sharding, loading and the
    memory budget read. quantization: how the weights of projections are kept; None: as all the others.
    """

    def __init__(self, dtype: Any, seed: int | None = None, quantization: Quantization | None = None) -> None:
        self.dtype = jnp.dtype(dtype)
        self.quantization = quantization
        self._key = None if seed is None else jax.random.key(seed)

    def projection(
        self, axes: dict[str, int], inputs: Collection[str], *, quantized: bool = True
    ) -> nnx.Param | QuantizedWeight:
        """A weight whose products are as large as what is multiplied; `inputs` are those of its axes it sums over.

        quantized: False where it is never quantized, whatever the model's others are.
        """
        weight = self._normal(axes, math.prod(axes[axis] for axis in inputs) ** -0.5)
        if self.quantization is None or not quantized:
            return nnx.Param(weight, axes=tuple(axes))
        scales = self.quantization.scales_of(axes, inputs)
        make = partial(quantize, bits=self.quantization.bits, scales_shape=tuple(scales.values()))
        made = jax.eval_shape(make, weight) if self._key is None else make(weight)
        cut = tuple(axis if size > 1 else None for axis, size in scales.items())
        return QuantizedWeight(nnx.Param(made.values, axes=tuple(axes)), nnx.Param(made.scales, axes=cut))

    def normal(self, axes: dict[str, int], scale: float) -> nnx.Param:
        """Normally distributed around 0 with standard deviation `scale`."""
        return nnx.Param(self._normal(axes, scale), axes=tuple(axes))

    def _normal(self, axes: dict[str, int], scale: float) -> Any:
        shape = tuple(axes.values())
        if self._key is None:
            return jax.ShapeDtypeStruct(shape, self.dtype)
        self._key, own = jax.random.split(self._key)
        return scale * jax.random.normal(own, shape, self.dtype)

    def constant(self, axes: dict[str, int], value: float, dtype: Any = None) -> nnx.Param:
        """All `value`. dtype: None for the others' one."""
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        shape = tuple(axes.values())
        made = jax.ShapeDtypeStruct(shape, dtype) if self._key is None else jnp.full(shape, value, dtype)
        return nnx.Param(made, axes=tuple(axes))
