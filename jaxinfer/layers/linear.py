"""Dense projections. Weights keep the checkpoint's [out, in] order, so that loading need not transpose."""

from __future__ import annotations

import math

import jax
from flax import nnx

from jaxinfer.layers.parameters import Parameters
from jaxinfer.ops.matmul import matmul
from jaxinfer.ops.quantized_matmul import Quantized, quantized_matmul
from jaxinfer.sharding.spmd import sum_parts


class Linear(nnx.Module):
    """y[T, *out] = sum over in of x[T, *in] * weight[*out, *in] (+ bias[*out]).

    out, inputs: {logical axis name: size} of each side, in order, so that a head stays an axis of its own.
    quantized: False where the weight is never quantized, whatever the model's others are.
    Where the weight at hand is one device's part of the inputs, y is summed over the devices that have the others.
    """

    def __init__(
        self,
        make: Parameters,
        inputs: dict[str, int],
        out: dict[str, int],
        *,
        bias: bool = False,
        quantized: bool = True,
    ) -> None:
        self.inputs = tuple(inputs)
        self.input_size = math.prod(inputs.values())
        self.weight = make.projection({**out, **inputs}, inputs, quantized=quantized)
        self.bias = make.constant(out, 0.0) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = project(x, self.weight[...], len(self.inputs))
        if math.prod(self.weight.shape[-len(self.inputs) :]) < self.input_size:
            y = sum_parts(y, *self.inputs)
        return y if self.bias is None else y + self.bias[...]


def project(x: jax.Array, weight: jax.Array | Quantized, num_inputs: int = 1) -> jax.Array:
    """x [T, *in] times weight [*out, *in] -> [T, *out], as one matrix product; `num_inputs` counts the in axes."""
    flat, out_shape = x.reshape(x.shape[0], -1), weight.shape[:-num_inputs]
    num_out = math.prod(out_shape)
    if isinstance(weight, Quantized):
        y = quantized_matmul(flat, Quantized(*(leaf.reshape(num_out, -1) for leaf in weight)))
    else:
        y = matmul(flat, weight.reshape(num_out, -1))
    return y.reshape(x.shape[0], *out_shape)
