"""Self-attention: projections, head norms and rotation. Where keys and values are kept is the caller's choice."""

from __future__ import annotations

from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.linear import Linear
from jaxinfer.layers.norm import RMSNorm, rms_normalize
from jaxinfer.layers.rotary import Rotation, rotate
from jaxinfer.models.config import LayerConfig, ModelConfig

Cache = TypeVar("Cache")


class Attend(Protocol[Cache]):
    """Attention of one layer over a cache it may extend.

    q [T, N, H]; k and v [T, K, H], or None where the layer reads the keys and values of `layer.kv_source`.
    Returns the mixed values [T, N, H] and the cache with k and v in it. The softmax scale and cap are the model's.
    """

    def __call__(
        self, index: int, q: jax.Array, k: jax.Array | None, v: jax.Array | None, cache: Cache
    ) -> tuple[jax.Array, Cache]: ...


class Attention(nnx.Module):
    """x [T, D] -> [T, D] through `attend`."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.layer = layer
        embed = {"embed": config.hidden_size}
        q_heads = {"q_heads": layer.num_heads, "head_dim": layer.head_dim}
        kv_heads = {"kv_heads": layer.num_kv_heads, "head_dim": layer.head_dim}
        owns_kv = layer.kv_source is None
        owns_v = owns_kv and not layer.value_is_key

        def linear(inputs: dict[str, int], out: dict[str, int], bias: bool) -> Linear:
            return Linear(inputs, out, bias=bias, dtype=dtype, rngs=rngs)

        def head_norm(heads: dict[str, int]) -> RMSNorm | None:
            if config.qk_norm is None:
                return None
            axes = {"head_dim": layer.head_dim} if config.qk_norm == "head" else heads
            return RMSNorm(axes, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype)

        self.q = linear(embed, q_heads, config.qkv_bias)
        self.k = linear(embed, kv_heads, config.qkv_bias) if owns_kv else None
        self.v = linear(embed, kv_heads, config.qkv_bias) if owns_v else None
        self.o = linear(q_heads, embed, config.output_bias)
        self.q_norm = head_norm(q_heads)
        self.k_norm = head_norm(kv_heads) if owns_kv else None

    def __call__(
        self, index: int, x: jax.Array, rotations: Rotation | None, attend: Attend[Cache], cache: Cache
    ) -> tuple[jax.Array, Cache]:
        q, k, v = self.q(x), None, None
        if self.k is not None:
            k = self.k(x)
            v = k if self.v is None else self.v(x)
            if self.config.value_norm:
                v = rms_normalize(v, self.config.norm_eps).astype(v.dtype)
            if self.k_norm is not None:
                k = self.k_norm(k)
            if rotations is not None:
                k = rotate(k, rotations)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if rotations is not None:
            q = rotate(q, rotations)
        mixed, cache = attend(index, q, k, v, cache)
        return self.o(mixed.astype(x.dtype)), cache
