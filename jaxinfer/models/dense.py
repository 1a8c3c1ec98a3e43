"""Attention without a cache: every key and value of the sequences at hand. The slow, obvious twin of the engine."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from jaxinfer.layers.attention import Attend
from jaxinfer.models.config import LayerConfig, ModelConfig

KeysAndValues = dict[int, tuple[jax.Array, jax.Array]]


class Mix(Protocol):
    """Causal attention of one layer over whole sequences.

    q [batch, T, N, H], k [batch, T, K, H], v [batch, T, K, Hv], sinks [N] or None -> [batch, T, N, Hv] in q's dtype.
    """

    def __call__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        sinks: jax.Array | None,
    ) -> jax.Array: ...


def attend_whole(config: ModelConfig, batch: int, mix: Mix) -> Attend[KeysAndValues]:
    """Attention of the rows of `batch` sequences of one length; the "cache" is a dict of what has been computed."""

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
        q, keys, values = (array.reshape(batch, -1, *array.shape[1:]) for array in (q, keys, values))
        mixed = mix(config, layer, q, keys, values, sinks)
        return mixed.reshape(-1, *mixed.shape[2:]), cache

    return attend


def dense(
    config: ModelConfig, layer: LayerConfig, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    """`Mix`, with the logits of all pairs of tokens in memory."""
    batch, length = q.shape[:2]
    grouped = q.reshape(batch, length, layer.num_kv_heads, -1, layer.head_dim)
    scores = jnp.einsum("btkgh,bjkh->bkgtj", grouped, k, preferred_element_type=jnp.float32)
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
    mixed = jnp.einsum("bkgtj,bjkh->btkgh", weights, v.astype(jnp.float32))
    return mixed.reshape(batch, length, layer.num_heads, -1).astype(q.dtype)
