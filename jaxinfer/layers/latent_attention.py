"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), in the form that caches a latent for all heads.

Head n's key is [k_up_n latent, rotated], its value v_up_n latent. k_up is taken to the other side of the product of
query and key, v_up to after the mixing: attention then is that of many queries over one kv head, whose key is [latent,
rotated] and whose value is the latent, and a token keeps nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.linear import Linear
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.parameters import Parameters
from jaxinfer.layers.rotary import Rotation, rotate
from jaxinfer.models.config import LatentConfig, LayerConfig, ModelConfig

_NORM_EPS = 1e-6  # of the latents' norms; DeepSeek's code leaves it at this whatever the model's other norms have


class LatentAttention(nnx.Module):
    """The layer's own part of attention, as `layers.attention.Attention` has it."""

    def __init__(self, make: Parameters, config: ModelConfig, layer: LayerConfig, latent: LatentConfig) -> None:
        self.rank, self.key_dim, self.interleaved = latent.rank, latent.key_dim, latent.interleaved
        embed, heads = {"embed": config.hidden_size}, {"q_heads": layer.num_heads}
        q_latent, kv_latent = {"q_latent": latent.q_rank or 0}, {"latent": latent.rank}
        down, bias = {"latent": latent.rank + latent.rope_dim}, config.qkv_bias
        values = {**heads, "head_dim": latent.value_dim}

        has_q_latent = latent.q_rank is not None
        self.q_down = Linear(make, embed, q_latent, bias=bias) if has_q_latent else None
        self.q_norm = RMSNorm(make, q_latent, eps=_NORM_EPS, offset=0.0) if has_q_latent else None
        query = {**heads, "head_dim": latent.key_dim + latent.rope_dim}
        self.q = Linear(make, q_latent if has_q_latent else embed, query)
        self.kv_down = Linear(make, embed, down, bias=bias)
        self.kv_norm = RMSNorm(make, kv_latent, eps=_NORM_EPS, offset=0.0)
        self.k_up = Linear(make, kv_latent, {**heads, "head_dim": latent.key_dim}, quantized=False)
        self.v_up = Linear(make, kv_latent, values, quantized=False)
        self.o = Linear(make, values, embed, bias=config.output_bias)

    def project(self, x: jax.Array, cos_sin: Rotation | None) -> tuple[jax.Array, jax.Array, None]:
        """x [T, D] -> q [T, N, rank + rope_dim] and k [T, 1, rank + rope_dim], the latent first; there is no v."""
        assert cos_sin is not None
        low = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q = self.q(low)
        q_latent = jnp.einsum("tnk,nkr->tnr", q[..., : self.key_dim], self.k_up.weight[...])
        q_rotated = rotate(q[..., self.key_dim :], cos_sin, interleaved=self.interleaved)
        kv = self.kv_down(x)[:, None]
        latent = self.kv_norm(kv[..., : self.rank])
        k_rotated = rotate(kv[..., self.rank :], cos_sin, interleaved=self.interleaved)
        return jnp.concatenate([q_latent, q_rotated], -1), jnp.concatenate([latent, k_rotated], -1), None

    def combine(self, mixed: jax.Array) -> jax.Array:
        """The heads' mixed latents [T, N, rank] -> [T, D]."""
        return self.o(jnp.einsum("tnr,nvr->tnv", mixed, self.v_up.weight[...]))
