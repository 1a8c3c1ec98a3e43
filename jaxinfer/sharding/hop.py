"""Arrays from one mesh's devices to the same places of another's: what a stage hands to the next.

Where one process has the devices of both, jax copies. Elsewhere each pair of devices exchanges, in a program over both
meshes: a collective, which all processes that have a part in it send, in the same order as whatever else they share.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.sharding.mesh import AXES
from jaxinfer.sharding.spmd import has_part, spans_processes

_SIDES = "stage"  # of the joint mesh: the source's devices, and the target's


class Hop:
    """The way from `source` to `target`, two meshes of one shape, of one stage each.

    has_part: whether some of the devices are this process's. is_exchange: whether they are several processes'.
    """

    def __init__(self, source: Mesh, target: Mesh) -> None:
        devices = np.concatenate([source.devices, target.devices], axis=AXES.index(_SIDES))
        self._both = Mesh(devices, AXES, axis_types=target.axis_types)
        self._target = target
        self.has_part, self.is_exchange = has_part(self._both), spans_processes(self._both)

    def copy(self, arrays: Any) -> Any:
        """The arrays on the target, where this process has all devices; nothing waits for them."""
        here = jax.tree.map(lambda array: NamedSharding(self._target, array.sharding.spec), arrays)
        return jax.device_put(arrays, here)

    def lower(self, leaves: Any) -> jax.stages.Lowered:
        """The program of `exchange`; leaves: the arrays' shapes, and how they will lie on the target."""
        specs = jax.tree.map(lambda leaf: _on_both(leaf.sharding.spec), leaves)

        def swap(parts: Any) -> Any:
            return jax.tree.map(lambda part: jax.lax.ppermute(part, _SIDES, [(0, 1)]), parts)

        run = jax.shard_map(swap, mesh=self._both, in_specs=(specs,), out_specs=specs, check_vma=False)
        return jax.jit(run).lower(jax.tree.map(self._joint, leaves))

    def exchange(self, program: Any, leaves: Any, arrays: Any, room: Any) -> Any:
        """The arrays on the target; nothing waits for them. Sent by every process with a part in it.

        arrays: None where this process has no device of the source. room: arrays of their shapes on the target, which
        are not read; None where it has no device of that, and then the result is None.
        """
        given = [jax.tree.leaves(side) for side in (arrays, room) if side is not None]
        flat, structure = jax.tree.flatten(leaves)
        both = [
            jax.make_array_from_single_device_arrays(
                whole.shape, whole.sharding, [shard.data for array in own for shard in array.addressable_shards]
            )
            for whole, *own in zip(map(self._joint, flat), *given, strict=True)
        ]
        moved = jax.tree.leaves(program(jax.tree.unflatten(structure, both)))
        return None if room is None else jax.tree.unflatten(structure, list(map(self._on_target, flat, moved)))

    def _joint(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """Of the parts of both sides, the source's first along axis 0."""
        shape = (2 * leaf.shape[0], *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(self._both, _on_both(leaf.sharding.spec)))

    def _on_target(self, leaf: Any, moved: jax.Array) -> jax.Array:
        devices = leaf.sharding.addressable_devices
        parts = [shard.data for shard in moved.addressable_shards if shard.device in devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _on_both(spec: PartitionSpec) -> PartitionSpec:
    """How the parts of both sides make one array: one side's after the other's along axis 0, cut as they are."""
    first, *rest = spec if len(spec) else (None,)
    names = () if first is None else (first,) if isinstance(first, str) else first
    return PartitionSpec((_SIDES, *names), *rest)
