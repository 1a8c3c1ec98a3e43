"""Attention without a cache, by blocks: memory grows with a sequence's length, not with its square."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.models.config import LayerConfig, ModelConfig
from jaxinfer.models.dense import Mix
from jaxinfer.ops.flash_attention import FlashCase, attend


def flash(mesh: Mesh) -> Mix:
    """`Mix` for programs on the mesh, with gradients."""

    def mix(
        config: ModelConfig, layer: LayerConfig, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None
    ) -> jax.Array:
        case = FlashCase(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            value_dim=v.shape[-1],
            scale=config.scale_of(layer),
            window=layer.window,
            soft_cap=config.attention_softcap,
            dtype=q.dtype.name,
        )
        mixed, lse = attend(case, q, k, v, mesh)
        if sinks is None:
            return mixed
        # A sink's weight is taken from all others alike.
        kept = jax.nn.sigmoid(lse - sinks.astype(jnp.float32))
        return (mixed * kept[..., None]).astype(q.dtype)

    return mix
