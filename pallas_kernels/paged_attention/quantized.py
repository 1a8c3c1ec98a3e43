"""Keys and values in 8 bits, each vector, of a token and head, with a scale of its own.

x is kept as data * scale, scale = max |x| / the largest number of data's dtype: symmetric, taken from the vector alone,
so that nothing is calibrated and no token's key depends on another's. A logit is then the product of query and data
times the key's scale, and what is mixed are data with weights that the values' scales were multiplied into: scales
touch a number for each pair of query and key, not each number of a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
_LEAST = 1e-30  # vectors of smaller numbers are kept as zeros, so that 1 / scale is finite


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedPool:
    """A layer's pool: data int8 or float8, scales float32. Axis 0 of both is pages, the rest the backend's own layout.

    A key that begins with its value has one scale for both. A scale that is not finite says that the key is not. Values
    are finite (whoever writes sees to it).
    """

    data: Any
    scales: Any


def quantize(x: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """x [..., H] -> data [..., H] in dtype, a key of LARGEST, and scales float32 [...]."""
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=-1)
    inverse = jnp.where((most >= _LEAST) & jnp.isfinite(most), LARGEST[dtype] / most, 0)
    data = jnp.where(inverse[..., None] > 0, x * inverse[..., None], 0)  # chosen: 0 times infinity is not 0
    data = jnp.round(data) if dtype == "int8" else data
    return data.astype(dtype), jnp.where(most >= _LEAST, most, 0 * most) / LARGEST[dtype]


def value_scales(scales: jax.Array) -> jax.Array:
    """Scales as weights are multiplied with: 0 where a slot holds none, or those of a key that is not finite."""
    return jnp.where(jnp.abs(scales) < jnp.inf, scales, 0)
