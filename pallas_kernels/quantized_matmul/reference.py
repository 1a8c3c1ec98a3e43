"""Product with a quantized weight in plain jnp, float32, its numbers written out: the oracle for what is faster."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def quantized_matmul(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """Rows times the transpose of values * scales.

    x       [T, in], float32 or a 16-bit dtype
    values  [out, in], int8 or int4
    scales  [out, G]: of each run of in / G inputs of an output, G = 1 for one scale an output

    Returns [T, out] in x's dtype.
    """
    weight = values.astype(jnp.float32) * jnp.repeat(scales.astype(jnp.float32), values.shape[1] // scales.shape[1], 1)
    return jnp.einsum("ti,oi->to", x.astype(jnp.float32), weight, precision="highest").astype(x.dtype)
