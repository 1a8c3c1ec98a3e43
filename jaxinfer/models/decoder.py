"""The one decoder: its layers and its two ends. What differs between families is data in `ModelConfig`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.attention import Attention
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.latent_attention import LatentAttention
from jaxinfer.layers.linear import Linear, project
from jaxinfer.layers.mlp import ACTIVATIONS, MLP
from jaxinfer.layers.moe import MoE
from jaxinfer.layers.norm import RMSNorm, make_norm
from jaxinfer.layers.parameters import Parameters
from jaxinfer.layers.rotary import Rotation
from jaxinfer.models.config import LayerConfig, ModelConfig


class PerLayerInputs(nnx.Module):
    """A small extra embedding of each token for every layer, mixed with a projection of its main embedding (Gemma 3n
    and 4)."""

    def __init__(self, make: Parameters, config: ModelConfig) -> None:
        self.num_layers, self.dim = len(config.layers), config.per_layer_input_dim
        width = {"per_layer": self.num_layers * self.dim}
        self.embed_scale = math.sqrt(self.dim)
        self.projection_scale = config.hidden_size**-0.5
        self.embed = Embedding(make, {"vocab": config.per_layer_input_vocab}, width)
        self.projection = Linear(make, {"embed": config.hidden_size}, width, quantized=False)
        self.norm = RMSNorm(make, {"per_layer_dim": self.dim}, eps=config.norm_eps, offset=config.norm_offset)

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """tokens [T], x [T, D] their main embeddings -> [T, layers, Dp]."""
        shape = (tokens.shape[0], self.num_layers, self.dim)
        identity = (self.embed(tokens) * self.embed_scale).reshape(shape)
        context = self.norm((self.projection(x) * self.projection_scale).reshape(shape))
        return (context + identity) * 2**-0.5


class PerLayerResidual(nnx.Module):
    """What one layer makes of its per-layer input: norm(projection(act(gate(x)) * input))."""

    def __init__(self, make: Parameters, config: ModelConfig) -> None:
        embed, narrow = {"embed": config.hidden_size}, {"per_layer_dim": config.per_layer_input_dim}
        self.activation = config.activation
        self.gate = Linear(make, embed, narrow)
        self.projection = Linear(make, narrow, embed)
        self.norm = make_norm(make, config)

    def __call__(self, x: jax.Array, per_layer_input: jax.Array) -> jax.Array:
        """x [T, D], per_layer_input [T, Dp] -> what is added to x."""
        return self.norm(self.projection(ACTIVATIONS[self.activation](self.gate(x)) * per_layer_input))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward around the residual stream, normed before, after, or both.

    It is two functions, with attention over whatever holds the keys and values between them.
    """

    def __init__(self, make: Parameters, config: ModelConfig, layer: LayerConfig, *, fused: bool = False) -> None:
        before = config.norm_placement in ("pre", "sandwich")
        after = config.norm_placement in ("post", "sandwich")
        self.attention_norm = make_norm(make, config) if before else None
        if layer.latent is None:
            self.attention = Attention(make, config, layer, fused=fused)
        else:
            self.attention = LatentAttention(make, config, layer, layer.latent)
        self.attention_post_norm = make_norm(make, config) if after else None
        self.mlp_norm = make_norm(make, config) if before else None
        if layer.experts is None:
            self.mlp: MLP | MoE = MLP(make, config, layer.ffn_dim, fused=fused)
        else:
            self.mlp = MoE(make, config, layer, fused=fused)
        self.mlp_post_norm = make_norm(make, config) if after else None
        self.per_layer = PerLayerResidual(make, config) if config.per_layer_input_dim else None
        self.scalar = make.constant({"one": 1}, 1.0) if config.layer_scalar else None

    def before(self, x: jax.Array, cos_sin: Rotation | None) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """x [T, D] -> q [T, N, H], k and v [T, K, H] or None, as `Attend` takes them."""
        return self.attention.project(x if self.attention_norm is None else self.attention_norm(x), cos_sin)

    def after(
        self, x: jax.Array, mixed: jax.Array, per_layer_input: jax.Array | None, is_real: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [T, D] and the heads' mixed values, as `Attend` returns them -> the next layer's x, and how many tokens
        chose each expert, int32 [E], where there are any. is_real [T]: which tokens are not padding; None: all."""
        h = self.attention.combine(mixed.astype(x.dtype))
        x = x + (h if self.attention_post_norm is None else self.attention_post_norm(h))
        h, load = x if self.mlp_norm is None else self.mlp_norm(x), None
        if isinstance(self.mlp, MoE):
            h, load = self.mlp(h, is_real)
        else:
            h = self.mlp(h)
        x = x + (h if self.mlp_post_norm is None else self.mlp_post_norm(h))
        if self.per_layer is not None:
            assert per_layer_input is not None
            x = x + self.per_layer(x, per_layer_input)
        return (x if self.scalar is None else x * self.scalar[...]), load


class Ends(nnx.Module):
    """What comes before the first layer and after the last: tokens to the residual stream, and that to logits."""

    def __init__(self, make: Parameters, config: ModelConfig) -> None:
        self.config = config
        embed, vocab = {"embed": config.hidden_size}, {"vocab": config.vocab_size}
        self.embed = Embedding(make, vocab, embed)
        self.positions = Embedding(make, {"position": config.max_position}, embed) if config.learned_positions else None
        self.per_layer = PerLayerInputs(make, config) if config.per_layer_input_dim else None
        self.final_norm = make_norm(make, config)
        self.lm_head = None if config.tie_embeddings else Linear(make, embed, vocab, quantized=False)

    def begin(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """tokens, positions int32 [T] -> x [T, D], and the per-layer inputs [T, layers, Dp] or None."""
        x = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions)
        return x, None if self.per_layer is None else self.per_layer(tokens, x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [T, D], after the final norm -> float32 [T, V]."""
        y = project(hidden, self.embed.weight[...]) if self.lm_head is None else self.lm_head(hidden)
        y = y.astype(jnp.float32)
        cap = self.config.logits_softcap
        return y if cap is None else cap * jnp.tanh(y / cap)
