"""The page pools on the device: one for each layer that owns keys and values."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jaxinfer.plan import Plan

# One per owning layer, in layer order: an array, or a QuantizedPool of two. Axis 0 is pages; the rest is the attention
# backend's own layout.
Pools = tuple[Any, ...]


def abstract_pools(plan: Plan, sharding: jax.sharding.NamedSharding) -> Pools:
    """Shapes and dtypes of the pools of a plan: every device's own pages, one device's after another's."""

    def on_all(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (sharding.mesh.size * leaf.shape[0], *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    pools: dict[int, Any] = {}
    for layer in plan.layers:
        own = layer.backend.abstract_pool(layer.case, plan.num_pages[layer.group])
        pools.setdefault(layer.pool, jax.tree.map(on_all, own))
    return tuple(pools[index] for index in range(len(pools)))


def empty_pools(abstract: Pools, make_zeros: Callable[[jax.ShapeDtypeStruct], jax.Array]) -> Pools:
    """Pools of zeros, as make_zeros makes each. On a Linux host they take memory only as pages of them are used."""
    return jax.tree.map(lambda leaf: _until_used(make_zeros(leaf)), abstract)


def _until_used(zeros: jax.Array) -> jax.Array:
    if next(iter(zeros.devices())).platform == "cpu" and hasattr(mmap, "MADV_DONTNEED"):
        zeros.block_until_ready()
        for shard in zeros.addressable_shards:
            _give_back(shard.data.unsafe_buffer_pointer(), zeros.dtype.itemsize * shard.data.size)
    return zeros


def _give_back(address: int, num_bytes: int) -> None:
    """Let the kernel take back memory that holds zeros; whoever reads it finds zeros, which is what is there now."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (address + num_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if whole > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), ctypes.c_int(mmap.MADV_DONTNEED))


def copy_pages(pools: Pools, group_of_pool: tuple[int, ...], sources: jax.Array, targets: jax.Array) -> Pools:
    """Copy page sources[g, i] to targets[g, i] in every pool of group g; pairs (0, 0) are padding."""
    return tuple(
        jax.tree.map(lambda leaf, g=g: leaf.at[targets[g]].set(leaf[sources[g]]), pool)
        for pool, g in zip(pools, group_of_pool, strict=True)
    )
