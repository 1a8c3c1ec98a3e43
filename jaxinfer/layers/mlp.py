"""The feed-forward block, gated (arXiv:2002.05202) or plain."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.linear import Linear
from jaxinfer.layers.parameters import Parameters
from jaxinfer.models.config import ModelConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) when gated, down(act(up(x))) when not; x [T, D] -> [T, D].

    fused: gate and up are one matrix, `gate_up`, the rows of gate first.
    """

    def __init__(self, make: Parameters, config: ModelConfig, ffn_dim: int, *, fused: bool = False) -> None:
        embed, ffn = {"embed": config.hidden_size}, {"ffn": ffn_dim}
        self.activation = config.activation
        fused = fused and config.gated_mlp
        both = {"gate_up": 2 * ffn_dim}
        self.gate_up = Linear(make, embed, both, bias=config.mlp_bias) if fused else None
        self.gate = Linear(make, embed, ffn, bias=config.mlp_bias) if config.gated_mlp and not fused else None
        self.up = None if fused else Linear(make, embed, ffn, bias=config.mlp_bias)
        self.down = Linear(make, ffn, embed, bias=config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        if self.gate_up is not None:
            gate, up = jnp.split(self.gate_up(x), 2, axis=1)
            return self.down(act(gate) * up)
        assert self.up is not None
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))
