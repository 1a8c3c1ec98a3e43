"""Logical axes to mesh axes: the only place that knows both.

Modules name what a dimension is ("q_heads"); this table says which mesh axis cuts it. Tensor parallelism cuts heads,
the feed-forward width and the vocabulary (Megatron-LM, arXiv:1909.08053); fsdp cuts the model width, so a weight is
spread over both. A logical axis mapped to None is never cut. Nothing is computed along `fsdp`: what it cuts is gathered
before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STORED_APART = ("fsdp",)

RULES: Mapping[str, str | None] = {
    "embed": "fsdp",
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "router": None,
    "head_dim": None,
    "latent": None,
    "q_latent": None,
    "position": None,
    "per_layer": None,
    "per_layer_dim": None,
    "one": None,
}


# What is kept whole by every device where it can not be cut evenly: little, or not worth refusing a model for.
_WHOLE_IF_UNEVEN = ("vocab",)


def mesh_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes that devices share these logical axes by."""
    found = (RULES[axis] for axis in axes)
    return tuple(axis for axis in found if axis is not None and axis not in STORED_APART)


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, name: str = "array") -> PartitionSpec:
    """The PartitionSpec of an array of this shape whose dimensions are these logical axes (None: never cut).

    Fewer kv heads than tensor-parallel devices are replicated, and so is a vocabulary that they do not divide; vectors
    are not cut by fsdp.
    ValueError, naming the array, for an unknown logical axis, for two dimensions cut by one mesh axis, and for a size
    that a mesh axis does not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: axes {tuple(axes)} do not fit shape {tuple(shape)}; name every dimension once")
    parts: list[str | None] = []
    cut_by: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ValueError(f"{name}: {axis!r} is not a logical axis; they are {', '.join(RULES)}")
        mesh_axis = None if axis is None else RULES[axis]
        ways = 1 if mesh_axis is None else mesh.shape.get(mesh_axis, 1)
        is_vector = len(shape) == 1 and mesh_axis in STORED_APART  # gathering it would take longer than reading it
        is_whole = is_vector or (axis == "kv_heads" and size < ways) or (axis in _WHOLE_IF_UNEVEN and size % ways != 0)
        if axis is None or mesh_axis is None or ways == 1 or is_whole:
            parts.append(None)
            continue
        if mesh_axis in cut_by:
            raise ValueError(
                f"{name}: axes {cut_by[mesh_axis]!r} and {axis!r} would both be cut by mesh axis {mesh_axis!r}; "
                f"an array can use a mesh axis once"
            )
        if size % ways:
            raise ValueError(
                f"{name}: {axis}={size} is not a multiple of mesh axis {mesh_axis}={ways}; "
                f"use a {mesh_axis} size that divides {size}"
            )
        cut_by[mesh_axis] = axis
        parts.append(mesh_axis)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def param_shardings(abstract: Mapping[str, Any], axes: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The NamedSharding of every parameter, in the nested dict's own structure.

    abstract: nested dict of arrays or ShapeDtypeStructs. axes: the same nesting, a tuple of logical axes per parameter.
    """

    def sharding(path: Any, leaf: Any, leaf_axes: Sequence[str | None]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(leaf_axes, leaf.shape, mesh, name))

    return jax.tree_util.tree_map_with_path(sharding, abstract, axes)
