"""The feed-forward block, gated (arXiv:2002.05202) or plain."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx

from jaxinfer.layers.linear import Linear
from jaxinfer.layers.parameters import Parameters
from jaxinfer.models.config import LayerConfig, ModelConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) when gated, down(act(up(x))) when not; x [T, D] -> [T, D]."""

    def __init__(self, make: Parameters, config: ModelConfig, layer: LayerConfig) -> None:
        embed, ffn = {"embed": config.hidden_size}, {"ffn": layer.ffn_dim}
        self.activation = config.activation
        self.gate = Linear(make, embed, ffn, bias=config.mlp_bias) if config.gated_mlp else None
        self.up = Linear(make, embed, ffn, bias=config.mlp_bias)
        self.down = Linear(make, ffn, embed, bias=config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(hidden)
