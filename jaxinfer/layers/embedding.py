"""Token and position tables, and the logits they give."""

from __future__ import annotations

import math

import jax
from flax import nnx

from jaxinfer.layers.parameters import Parameters


class Embedding(nnx.Module):
    """A table [rows, width]; `rows` and `width` are {logical axis name: size} of one axis each."""

    def __init__(self, make: Parameters, rows: dict[str, int], width: dict[str, int]) -> None:
        self.weight = make.normal({**rows, **width}, math.prod(width.values()) ** -0.5)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.weight[...][ids]
