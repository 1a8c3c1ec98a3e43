"""Attention without a cache: every key and value of the sequence at hand. The slow, obvious twin of the engine."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.layers.attention import Attend
from jaxinfer.models.config import ModelConfig

KeysAndValues = dict[int, tuple[jax.Array, jax.Array]]


def dense_attend(config: ModelConfig) -> Attend[KeysAndValues]:
    """Causal attention of one whole sequence; the "cache" is a dict of the keys and values computed so far."""

    def attend(
        index: int,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        sinks: jax.Array | None,
        cache: KeysAndValues,
    ) -> tuple[jax.Array, KeysAndValues]:
        layer = config.layers[index]
        if k is not None:
            cache = {**cache, index: (k, k[..., : layer.latent_dim] if v is None else v)}
        keys, values = cache[index if layer.kv_source is None else layer.kv_source]
        length = q.shape[0]
        grouped = q.reshape(length, layer.num_kv_heads, -1, layer.head_dim)
        scores = jnp.einsum("tkgh,jkh->kgtj", grouped, keys, preferred_element_type=jnp.float32)
        scores = scores * config.scale_of(layer)
        if config.attention_softcap is not None:
            scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
        behind = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
        visible = behind >= 0 if layer.window is None else (behind >= 0) & (behind < layer.window)
        scores = jnp.where(visible, scores, -jnp.inf)
        if sinks is not None:
            sink = sinks.astype(jnp.float32).reshape(layer.num_kv_heads, -1, 1, 1)
            scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :length]
        mixed = jnp.einsum("kgtj,jkh->tkgh", weights, values.astype(jnp.float32))
        return mixed.reshape(length, layer.num_heads, -1).astype(q.dtype), cache

    return attend
