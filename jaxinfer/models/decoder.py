"""The one decoder. What differs between families is data in `ModelConfig`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.attention import Attend, Attention, Cache
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.linear import Linear, project
from jaxinfer.layers.mlp import ACTIVATIONS, MLP
from jaxinfer.layers.norm import RMSNorm, make_norm
from jaxinfer.layers.rotary import Rotation, rotation
from jaxinfer.models.config import LayerConfig, ModelConfig, RopeConfig


class PerLayerInputs(nnx.Module):
    """A small extra embedding of each token for every layer, mixed with a projection of its main embedding (Gemma 3n
    and 4)."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.num_layers, self.dim = len(config.layers), config.per_layer_input_dim
        width = {"per_layer": self.num_layers * self.dim}
        self.embed_scale = math.sqrt(self.dim)
        self.projection_scale = config.hidden_size**-0.5
        self.embed = Embedding({"vocab": config.per_layer_input_vocab}, width, dtype=dtype, rngs=rngs)
        self.projection = Linear({"embed": config.hidden_size}, width, bias=False, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm({"per_layer_dim": self.dim}, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype)

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """tokens [T], x [T, D] their main embeddings -> [T, layers, Dp]."""
        shape = (tokens.shape[0], self.num_layers, self.dim)
        identity = (self.embed(tokens) * self.embed_scale).reshape(shape)
        context = self.norm((self.projection(x) * self.projection_scale).reshape(shape))
        return (context + identity) * 2**-0.5


class PerLayerResidual(nnx.Module):
    """What one layer makes of its per-layer input: norm(projection(act(gate(x)) * input))."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        embed, narrow = {"embed": config.hidden_size}, {"per_layer_dim": config.per_layer_input_dim}
        self.activation = config.activation
        self.gate = Linear(embed, narrow, bias=False, dtype=dtype, rngs=rngs)
        self.projection = Linear(narrow, embed, bias=False, dtype=dtype, rngs=rngs)
        self.norm = make_norm(config, dtype)

    def __call__(self, x: jax.Array, per_layer_input: jax.Array) -> jax.Array:
        """x [T, D], per_layer_input [T, Dp] -> what is added to x."""
        return self.norm(self.projection(ACTIVATIONS[self.activation](self.gate(x)) * per_layer_input))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward around the residual stream, normed before, after, or both."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        before = config.norm_placement in ("pre", "sandwich")
        after = config.norm_placement in ("post", "sandwich")
        self.rope = layer.rope
        self.attention_norm = make_norm(config, dtype) if before else None
        self.attention = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.attention_post_norm = make_norm(config, dtype) if after else None
        self.mlp_norm = make_norm(config, dtype) if before else None
        self.mlp = MLP(config, layer, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = make_norm(config, dtype) if after else None
        self.per_layer = PerLayerResidual(config, dtype=dtype, rngs=rngs) if config.per_layer_input_dim else None
        self.scalar = nnx.Param(jnp.ones((1,), dtype), axes=(None,)) if config.layer_scalar else None

    def __call__(
        self,
        index: int,
        x: jax.Array,
        rotations: dict[RopeConfig, Rotation],
        per_layer_input: jax.Array | None,
        attend: Attend[Cache],
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        h = x if self.attention_norm is None else self.attention_norm(x)
        h, cache = self.attention(index, h, None if self.rope is None else rotations[self.rope], attend, cache)
        x = x + (h if self.attention_post_norm is None else self.attention_post_norm(h))
        h = x if self.mlp_norm is None else self.mlp_norm(x)
        h = self.mlp(h)
        x = x + (h if self.mlp_post_norm is None else self.mlp_post_norm(h))
        if self.per_layer is not None:
            assert per_layer_input is not None
            x = x + self.per_layer(x, per_layer_input)
        if self.scalar is not None:
            x = x * self.scalar[...]
        return x, cache


class Decoder(nnx.Module):
    """Token ids [T] -> hidden states [T, D] -> logits [T, V]."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        embed, vocab = {"embed": config.hidden_size}, {"vocab": config.vocab_size}
        self.embed = Embedding(vocab, embed, dtype=dtype, rngs=rngs)
        self.positions = (
            Embedding({"position": config.max_position}, embed, dtype=dtype, rngs=rngs)
            if config.learned_positions
            else None
        )
        self.per_layer = PerLayerInputs(config, dtype=dtype, rngs=rngs) if config.per_layer_input_dim else None
        self.layers = nnx.List([DecoderLayer(config, layer, dtype=dtype, rngs=rngs) for layer in config.layers])
        self.final_norm = make_norm(config, dtype)
        self.lm_head = None if config.tie_embeddings else Linear(embed, vocab, bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend[Cache], cache: Cache, *, context_len: int
    ) -> tuple[jax.Array, Cache]:
        """tokens, positions int32 [T] -> final hidden states [T, D], and the cache with this step's keys and values.

        `context_len`: the longest sequence this program serves; see layers/rotary.py.
        """
        x = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions)
        per_layer = None if self.per_layer is None else self.per_layer(tokens, x)
        ropes = {layer.rope for layer in self.config.layers if layer.rope is not None}
        rotations = {rope: rotation(rope, positions, context_len) for rope in ropes}
        for index, layer in enumerate(self.layers):
            own_input = None if per_layer is None else per_layer[:, index]
            x, cache = layer(index, x, rotations, own_input, attend, cache)
        return self.final_norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [T, D] -> float32 [T, V]."""
        y = project(hidden, self.embed.weight[...]) if self.lm_head is None else self.lm_head(hidden)
        y = y.astype(jnp.float32)
        cap = self.config.logits_softcap
        return y if cap is None else cap * jnp.tanh(y / cap)
