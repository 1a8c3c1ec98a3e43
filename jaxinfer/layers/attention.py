"""Self-attention: projections, head norms and rotation. Where keys and values are kept is the caller's choice."""

from __future__ import annotations

from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.linear import Linear
from jaxinfer.layers.norm import RMSNorm, rms_normalize
from jaxinfer.layers.parameters import Parameters
from jaxinfer.layers.rotary import Rotation, rotate
from jaxinfer.models.config import LayerConfig, ModelConfig
from jaxinfer.sharding.spmd import place_on

Cache = TypeVar("Cache")


class Attend(Protocol[Cache]):
    """Attention of one layer over a cache it may extend.

    q [T, N, H]; k and v [T, K, H], or None where the layer reads the keys and values of `layer.kv_source`; v alone None
    where the first `layer.latent_dim` numbers of a key are its value.
    sinks [N], or None where the model has none: one more logit of each head, which mixes in nothing.
    Returns the mixed values [T, N, H or latent_dim] and the cache with k and v in it. The softmax scale and cap are the
    model's.
    """

    def __call__(
        self,
        index: int,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        sinks: jax.Array | None,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]: ...


class Attention(nnx.Module):
    """The layer's own part of attention: what comes before the softmax, and what comes after.

    fused: where the layer has a q, k and v of its own they are one matrix, `qkv`, its rows the heads of q, k and v.
    """

    def __init__(self, make: Parameters, config: ModelConfig, layer: LayerConfig, *, fused: bool = False) -> None:
        self.num_heads, self.num_kv_heads = layer.num_heads, layer.num_kv_heads
        self.norm_eps = config.norm_eps
        self.value_norm = config.value_norm
        embed = {"embed": config.hidden_size}
        q_heads = {"q_heads": layer.num_heads, "head_dim": layer.head_dim}
        kv_heads = {"kv_heads": layer.num_kv_heads, "head_dim": layer.head_dim}
        owns_kv = layer.kv_source is None
        owns_v = owns_kv and not layer.value_is_key

        def head_norm(heads: dict[str, int]) -> RMSNorm | None:
            if config.qk_norm is None:
                return None
            axes = {"head_dim": layer.head_dim} if config.qk_norm == "head" else heads
            return RMSNorm(make, axes, eps=config.norm_eps, offset=config.norm_offset)

        fused = fused and owns_v
        all_heads = {"qkv_heads": layer.num_heads + 2 * layer.num_kv_heads, "head_dim": layer.head_dim}
        self.qkv = Linear(make, embed, all_heads, bias=config.qkv_bias) if fused else None
        self.q = None if fused else Linear(make, embed, q_heads, bias=config.qkv_bias)
        self.k = Linear(make, embed, kv_heads, bias=config.qkv_bias) if owns_kv and not fused else None
        self.v = Linear(make, embed, kv_heads, bias=config.qkv_bias) if owns_v and not fused else None
        self.o = Linear(make, q_heads, embed, bias=config.output_bias)
        self.q_norm = head_norm(q_heads)
        self.k_norm = head_norm(kv_heads) if owns_kv else None
        self.sinks = make.constant({"q_heads": layer.num_heads}, 0.0) if config.attention_sinks else None

    def project(self, x: jax.Array, cos_sin: Rotation | None) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """x [T, D] -> q [T, N, H], k and v [T, K, H] (None where another layer's are read)."""
        q, k, v = self._products(x)
        if k is not None and v is not None:
            if self.value_norm:
                v = rms_normalize(v, self.norm_eps).astype(v.dtype)
            if self.k_norm is not None:
                k = self.k_norm(k)
            if cos_sin is not None:
                k = rotate(k, cos_sin)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if cos_sin is not None:
            q = rotate(q, cos_sin)
        return q, self._read_by(q, k), self._read_by(q, v)

    def _read_by(self, q: jax.Array, kv: jax.Array | None) -> jax.Array | None:
        """Of keys or values that every device has all heads of, the head that this device's queries read."""
        if kv is None or q.shape[1] == self.num_heads or kv.shape[1] < self.num_kv_heads:
            return kv
        first = place_on("q_heads") * q.shape[1] // (self.num_heads // self.num_kv_heads)
        return jax.lax.dynamic_slice_in_dim(kv, first, 1, axis=1)

    def _products(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        if self.qkv is not None:
            q, k, v = jnp.split(self.qkv(x), (self.num_heads, self.num_heads + self.num_kv_heads), axis=1)
            return q, k, v
        assert self.q is not None
        if self.k is None:
            return self.q(x), None, None
        k = self.k(x)
        return self.q(x), k, k if self.v is None else self.v(x)

    def combine(self, mixed: jax.Array) -> jax.Array:
        """The heads' mixed values [T, N, H] -> [T, D]."""
        return self.o(mixed)
