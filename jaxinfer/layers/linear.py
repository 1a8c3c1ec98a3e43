"""Dense projections. Weights keep the checkpoint's [out, in] order, so that loading need not transpose."""

from __future__ import annotations

import math

import jax
from flax import nnx

from jaxinfer.layers.parameters import Parameters
from jaxinfer.ops.matmul import matmul
from jaxinfer.sharding.spmd import sum_parts


class Linear(nnx.Module):
    """y[T, *out] = sum over in of x[T, *in] * weight[*out, *in] (+ bias[*out]).

    out, inputs: {logical axis name: size} of each side, in order, so that a head stays an axis of its own.
    Where the weight at hand is one device's part of the inputs, y is summed over the devices that have the others.
    """

    def __init__(self, make: Parameters, inputs: dict[str, int], out: dict[str, int], *, bias: bool = False) -> None:
        self.inputs = tuple(inputs)
        self.input_size = math.prod(inputs.values())
        self.weight = make.normal({**out, **inputs}, self.input_size**-0.5)
        self.bias = make.constant(out, 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = project(x, self.weight[...], len(self.inputs))
        if math.prod(self.weight.shape[-len(self.inputs) :]) < self.input_size:
            y = sum_parts(y, *self.inputs)
        return y if self.bias is None else y + self.bias[...]


def project(x: jax.Array, weight: jax.Array, num_inputs: int = 1) -> jax.Array:
    """x [T, *in] times weight [*out, *in] -> [T, *out], as one matrix product; `num_inputs` counts the in axes."""
    out_shape = weight.shape[: weight.ndim - num_inputs]
    flat = x.reshape(x.shape[0], -1)
    matrix = weight.reshape(-1, flat.shape[1])
    y = matmul(flat, matrix)
    return y.reshape(x.shape[0], *out_shape)
