"""Programs over a mesh, written as what one device does (`jax.shard_map`): nothing moves between devices unasked.

The devices form shards, one for each place on the axes of SHARDS; a shard has sequences, pages and sampler slots of its
own, and its devices share the work on them. Arrays come in these kinds:

    parameters   cut as sharding/rules.py says, and gathered over `fsdp` just before they are used (`gather_stored`)
    PER_SHARD    axis 0 is shards: a batch, a sampler's slots, rows to sample from; all devices of a shard have its own
    ROWS         the same, and axis 1, tokens, is cut over `context`: all that is computed token by token
    PER_PLACE    axis 0 is shards and their places on `context`: what attention is told of the keys a place has
    PER_DEVICE   axis 0 is cut over all devices: page pools, which nobody but a device's own kernel reads
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxinfer.sharding.mesh import AXES
from jaxinfer.sharding.rules import STORED_APART, mesh_axes

SHARDS = ("data", "fsdp", "expert")
CONTEXT = "context"
PER_SHARD = PartitionSpec(SHARDS)
ROWS = PartitionSpec(SHARDS, CONTEXT)
PER_PLACE = PartitionSpec((*SHARDS, CONTEXT))
PER_DEVICE = PartitionSpec(AXES)


def num_shards(mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in SHARDS)


def processes(mesh: Mesh) -> set[int]:
    """Those that have some of the devices."""
    return {device.process_index for device in mesh.devices.flat}


def spans_processes(mesh: Mesh) -> bool:
    """Whether the devices are several processes'."""
    return len(processes(mesh)) > 1


def has_part(mesh: Mesh) -> bool:
    """Whether some of the devices are this process's."""
    return jax.process_index() in processes(mesh)


def elsewhere(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.Array:
    """An array that lies on other processes' devices alone."""
    return jax.make_array_from_single_device_arrays(shape, sharding, [], dtype=dtype)


# TPUs whose SparseCores gather while the TensorCore computes, when they are asked to.
_GATHERING = ("TPU v6 lite", "TPU7x")


def gather_options(mesh: Mesh) -> dict[str, str]:
    """XLA's options for a program that gathers parameters, so that it computes meanwhile."""
    is_gathering = any(mesh.shape[axis] > 1 for axis in STORED_APART)
    if is_gathering and mesh.devices.flat[0].device_kind in _GATHERING:
        return {"xla_tpu_enable_sparse_core_collective_offload_all_gather": "true"}
    return {}


def specs(arrays: Any) -> Any:
    """How arrays are cut, in their own structure; one that lies on a single device is whole."""

    def spec(array: Any) -> PartitionSpec:
        return array.sharding.spec if isinstance(array.sharding, NamedSharding) else PartitionSpec()

    return jax.tree.map(spec, arrays)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """PartitionSpecs to NamedShardings, in the same structure."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree, is_leaf=_is_spec)


def each_device(function: Callable[..., Any], mesh: Mesh, inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    """`function`, given and giving one device's parts, as a function of whole arrays.

    inputs, outputs: a PartitionSpec, or a structure of them, for every argument and result. Arrays whose first axis is
    cut into shards, or their places, come without that axis, and are given back so.
    """
    return jax.shard_map(
        _without_shard_axis(function, inputs, outputs), mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )


def each_shard(function: Callable[..., Any], mesh: Mesh, num_inputs: int) -> Callable[..., Any]:
    """`function` of PER_SHARD arguments and results; how a shard's devices share its work is left to XLA."""
    inputs = (PER_SHARD,) * num_inputs
    return jax.shard_map(
        _without_shard_axis(function, inputs, PER_SHARD),
        mesh=mesh,
        in_specs=inputs,
        out_specs=PER_SHARD,
        axis_names=set(SHARDS),
        check_vma=False,
    )


def _without_shard_axis(function: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        results = function(*map(_own, inputs, arguments))
        return _given_back(outputs, results) if _is_spec(outputs) else tuple(map(_given_back, outputs, results))

    return run


def _own(spec: Any, argument: Any) -> Any:
    return jax.tree.map(lambda array: array[0], argument) if _has_shard_axis(spec) else argument


def _given_back(spec: Any, result: Any) -> Any:
    return jax.tree.map(lambda array: array[None], result) if _has_shard_axis(spec) else result


def _has_shard_axis(spec: Any) -> bool:
    return _is_spec(spec) and len(spec) > 0 and spec[0] in (SHARDS, PER_PLACE[0])


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def any_row(flags: jax.Array) -> jax.Array:
    """Whether any flag is set: on this device, or inside `each_shard` on any shard, so that all take the same branch.

    XLA may put exchanges among all devices into a branch, and waits for ever for those that did not take it.
    """
    return most_of_shards(jnp.any(flags))


def most_of_shards(x: jax.Array) -> jax.Array:
    """The largest that any shard has, inside `each_device` and `each_shard`; elsewhere x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    several = set(SHARDS) <= set(mesh.manual_axes) and num_shards(mesh) > 1  # XLA's CPU compiler keeps those of one
    return jax.lax.pmax(x, SHARDS) if several else x


# On one device of a mesh, inside each_device:


def gather_stored(params: Any, cuts: Any) -> Any:
    """Parameters whole again along the axes they are only stored apart by; `cuts` are their PartitionSpecs."""

    def whole(spec: PartitionSpec, part: jax.Array) -> jax.Array:
        for dimension, axis in enumerate(spec):
            if axis in STORED_APART:
                part = jax.lax.all_gather(part, axis, axis=dimension, tiled=True)
        return part

    return jax.tree.map(whole, cuts, params, is_leaf=_is_spec)


def find_stored(find: Callable[[jax.Array], jax.Array], ids: jax.Array) -> jax.Array:
    """What find(ids [T]) finds in a table of which devices keep different columns: whole rows [T, D], while no more of
    the table moves than they."""
    (axis,) = STORED_APART
    found = find(jax.lax.all_gather(ids, axis, tiled=True))
    return jax.lax.all_to_all(found, axis, split_axis=0, concat_axis=1, tiled=True)


def gather_after(x: jax.Array, params: Any, cuts: Any) -> tuple[jax.Array, Any]:
    """x, and `gather_stored(params, cuts)` begun no sooner than x is there: while a layer works on x the next one's
    parameters are gathered, and never more than that one's."""
    if any(axis in STORED_APART for spec in jax.tree.leaves(cuts, is_leaf=_is_spec) for axis in spec):
        x, params = jax.lax.optimization_barrier((x, params))
    return x, gather_stored(params, cuts)


def sum_parts(x: jax.Array, *axes: str) -> jax.Array:
    """The sum of what the devices that share these logical axes have."""
    return jax.lax.psum(x, mesh_axes(axes))


def mean_parts(x: jax.Array, *axes: str) -> jax.Array:
    """The mean of what the devices that share these logical axes have."""
    return jax.lax.pmean(x, mesh_axes(axes))


def all_rows(x: jax.Array, axis: str) -> jax.Array:
    """The rows [T, ...] of all devices that share a logical axis, one device's after another's."""
    return jax.lax.all_gather(x, mesh_axes((axis,)), axis=0, tiled=True)


def sum_own_rows(x: jax.Array, axis: str) -> jax.Array:
    """Of `all_rows` of the devices that share a logical axis, the sum of this device's own rows."""
    return jax.lax.psum_scatter(x, mesh_axes((axis,)), scatter_dimension=0, tiled=True)


def place_on(axis: str) -> jax.Array:
    """Which part of a logical axis is this device's, int32 []."""
    return jax.lax.axis_index(mesh_axes((axis,)))


# The rows of a batch [T, ...] lie on the C devices of `context` in 2 C pieces: the device at place c has the c-th piece
# and the c-th from the end, so that of one long chunk, whose last rows see twice as much of it as the middle ones, all
# have as much to do (zig-zag, arXiv:2407.21783). Where rows can not be cut so it has one piece.
# (A collective of one device would be kept by XLA's CPU compiler.)


def own_pieces(num_rows: int) -> tuple[jax.Array, int]:
    """Where this device's pieces of T rows begin, int32 [1 or 2], and how long each is."""
    size, place = jax.lax.axis_size(CONTEXT), jax.lax.axis_index(CONTEXT)
    if num_rows % (2 * size):
        return jnp.stack([place]) * (num_rows // size), num_rows // size
    length = num_rows // (2 * size)
    return jnp.stack([place, 2 * size - 1 - place]) * length, length


def own_part(rows: jax.Array) -> jax.Array:
    """Of rows [T, ...] that every device has, this device's own [T / C, ...]."""
    if jax.lax.axis_size(CONTEXT) == 1:
        return rows
    starts, length = own_pieces(rows.shape[0])
    return jnp.concatenate([jax.lax.dynamic_slice_in_dim(rows, start, length) for start in starts])


def all_parts(own: jax.Array) -> jax.Array:
    """The rows [T, ...] of which each device has [T / C, ...], on every device."""
    size = jax.lax.axis_size(CONTEXT)
    return own if size == 1 else in_order(jax.lax.all_gather(own, CONTEXT, tiled=True), size)


def in_order(rows: jax.Array, size: int) -> jax.Array:
    """Rows [T, ...] as `size` devices have them, one's after another's, in the batch's order."""
    if rows.shape[0] % (2 * size):
        return rows
    pairs = rows.reshape(size, 2, -1, *rows.shape[1:])
    return jnp.concatenate([pairs[:, 0], pairs[::-1, 1]]).reshape(rows.shape)


def by_device(rows: jax.Array, size: int) -> jax.Array:
    """The inverse of `in_order`."""
    if rows.shape[0] % (2 * size):
        return rows
    pieces = rows.reshape(2 * size, -1, *rows.shape[1:])
    return jnp.stack([pieces[:size], pieces[: size - 1 : -1]], axis=1).reshape(rows.shape)


def rows_at(own: jax.Array, places: jax.Array) -> jax.Array:
    """Those at `places` [R] of all rows [T, D], of which each device has [T / C, D]: [R, D], on every device."""
    size = jax.lax.axis_size(CONTEXT)
    if size == 1:
        return own[places]
    starts, length = own_pieces(size * own.shape[0])
    offset = places - starts[:, None]  # [pieces, R], in each of this device's pieces
    is_here = (offset >= 0) & (offset < length)
    index = jnp.sum(jnp.where(is_here, offset + length * jnp.arange(len(starts))[:, None], 0), axis=0)
    return jax.lax.psum(jnp.where(is_here.any(0)[:, None], own[index], 0), CONTEXT)
