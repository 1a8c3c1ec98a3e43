"""Normalisation over the last axes, in float32: RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.parameters import Parameters
from jaxinfer.models.config import ModelConfig
from jaxinfer.sharding.spmd import mean_parts


def rms_normalize(x: jax.Array, eps: float, num_axes: int = 1, shared: Sequence[str] = ()) -> jax.Array:
    """x / rms(x) over the last `num_axes` axes, returned in float32.

    shared: logical axes of them that other devices have the other parts of.
    """
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(x * x, axis=tuple(range(-num_axes, 0)), keepdims=True)
    if shared:
        mean_square = mean_parts(mean_square, *shared)
    return x * jax.lax.rsqrt(mean_square + eps)


class RMSNorm(nnx.Module):
    """y = x / rms(x) * (weight + offset). `axes` {logical name: size} are those normalised over."""

    def __init__(self, make: Parameters, axes: dict[str, int], *, eps: float, offset: float) -> None:
        self.eps = eps
        self.offset = offset
        self.axes, self.shape = tuple(axes), tuple(axes.values())
        self.weight = make.constant(axes, 1.0 - offset)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...].astype(jnp.float32) + self.offset
        shared = () if weight.shape == self.shape else self.axes
        return (rms_normalize(x, self.eps, weight.ndim, shared) * weight).astype(x.dtype)


class LayerNorm(nnx.Module):
    """y = (x - mean) / std * weight (+ bias), over the last axis."""

    def __init__(self, make: Parameters, axes: dict[str, int], *, eps: float, bias: bool) -> None:
        self.eps = eps
        self.weight = make.constant(axes, 1.0)
        self.bias = make.constant(axes, 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        y = y * self.weight[...].astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def make_norm(make: Parameters, config: ModelConfig) -> RMSNorm | LayerNorm:
    """The model's own norm over the model width [D]."""
    axes = {"embed": config.hidden_size}
    if config.norm == "layer":
        return LayerNorm(make, axes, eps=config.norm_eps, bias=config.norm_bias)
    return RMSNorm(make, axes, eps=config.norm_eps, offset=config.norm_offset)
