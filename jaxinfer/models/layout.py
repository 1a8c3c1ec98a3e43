"""Whether a model can be laid out on a mesh: asked before anything is read or compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxinfer.models.config import ModelConfig

# Axes that programs are not yet written for.
_UNUSED_AXES = ("stage", "context")


def check_layout(config: ModelConfig, mesh: Mesh) -> None:
    """ValueError, naming value, limit and fix, for a mesh that this model can not be spread over."""
    sizes: Mapping[str, int] = mesh.shape
    for axis in _UNUSED_AXES:
        if sizes[axis] > 1:
            raise ValueError(
                f"mesh axis {axis}={sizes[axis]}: models are not spread over {axis!r}; use data, fsdp, expert, tensor"
            )
    tensor = sizes["tensor"]
    for index, layer in enumerate(config.layers):
        for name, size in (("num_heads", layer.num_heads), ("ffn_dim", layer.ffn_dim)):
            if size % tensor:
                raise ValueError(
                    f"mesh axis tensor={tensor} does not divide {name}={size} of layer {index}; "
                    f"use one of {_divisors(config)}"
                )
        if layer.num_kv_heads % tensor and tensor % layer.num_kv_heads:
            raise ValueError(
                f"mesh axis tensor={tensor} neither divides num_kv_heads={layer.num_kv_heads} of layer {index} nor is "
                f"a multiple of it; use one of {_divisors(config)}"
            )
    experts = {layer.experts.num_experts for layer in config.layers if layer.experts is not None}
    if sizes["expert"] > 1 and not experts:
        raise ValueError(f"mesh axis expert={sizes['expert']}: this model has no experts; use data")
    for num_experts in experts:
        if num_experts % sizes["expert"]:
            raise ValueError(
                f"mesh axis expert={sizes['expert']} does not divide the model's {num_experts} experts; "
                "use a size that does"
            )
    if config.hidden_size % sizes["fsdp"]:
        raise ValueError(
            f"mesh axis fsdp={sizes['fsdp']} does not divide the model's width of {config.hidden_size}; "
            "use a size that does"
        )


def _divisors(config: ModelConfig) -> str:
    """The sizes of the axis `tensor` that this model can be cut into."""

    def fits(size: int) -> bool:
        return all(
            layer.num_heads % size == 0
            and layer.ffn_dim % size == 0
            and (layer.num_kv_heads % size == 0 or size % layer.num_kv_heads == 0)
            for layer in config.layers
        )

    largest = max(layer.num_heads for layer in config.layers)
    return ", ".join(str(size) for size in range(1, largest + 1) if fits(size))


def check_memory(abstract: Any, shardings: Any, mesh: Mesh) -> None:
    """ValueError where a device has not the memory for its part of the parameters: by how much, and what would help.

    abstract: shapes and dtypes; shardings: how each lies on the mesh. A device that does not tell its memory is taken
    to have enough.
    """
    limit = memory_limit(mesh)
    if limit is None:
        return
    needed = bytes_per_device(abstract, shardings)
    if needed > limit:
        raise ValueError(
            f"the parameters take {needed / 2**30:.3g} GiB on every device of mesh {dict(mesh.shape)}, "
            f"{(needed - limit) / 2**30:.3g} GiB more than the {limit / 2**30:.3g} GiB it has; "
            f"spread them over {math.ceil(needed / limit)} times as many devices by tensor or fsdp"
        )


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes of one device's memory; None where it does not tell."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def bytes_per_device(abstract: Any, shardings: Any) -> int:
    """Bytes of one device's part of the parameters."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, abstract, shardings
    )
    return sum(jax.tree.leaves(sizes))
