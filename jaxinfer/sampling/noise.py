"""The random numbers of a draw: a function of the request's seed, the sample's index and the output position only."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def exponentials(seed: jax.Array, sample_index: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """Standard exponential variates [S, count] float32, from each row's seed, sample index and position [S] uint32.

    31 random bits each, mapped so that small values, which decide an exponential race, keep full float32 precision.
    """
    keys = jax.random.wrap_key_data(jnp.stack([seed, sample_index], axis=-1), impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, position)
    bits = jax.vmap(lambda key: jax.random.bits(key, (count,)))(keys)
    uniform = (bits >> 1).astype(jnp.int32).astype(jnp.float32) * 2.0**-31 + 2.0**-32
    return -jnp.log1p(-jnp.minimum(uniform, 1.0 - 2.0**-24))
