"""The page pools on the device: one array per layer that owns keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxinfer.plan import Plan

# One array per owning layer, in layer order. Axis 0 is pages; the rest is the attention backend's own layout.
Pools = tuple[Any, ...]


def abstract_pools(plan: Plan, sharding: jax.sharding.Sharding) -> Pools:
    """Shapes and dtypes of the pools of a plan."""
    pools: dict[int, Any] = {}
    for layer in plan.layers:
        shape = layer.backend.pool_shape(layer.case, plan.num_pages[layer.group])
        pools.setdefault(layer.pool, jax.ShapeDtypeStruct(shape, plan.dtype, sharding=sharding))
    return tuple(pools[index] for index in range(len(pools)))


def empty_pools(abstract: Pools) -> Pools:
    """Pools of zeros, made on the device."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract)


def copy_pages(pools: Pools, group_of_pool: tuple[int, ...], sources: jax.Array, targets: jax.Array) -> Pools:
    """Copy page sources[g, i] to targets[g, i] in every pool of group g; pairs (0, 0) are padding."""
    return tuple(pool.at[targets[g]].set(pool[sources[g]]) for pool, g in zip(pools, group_of_pool, strict=True))
