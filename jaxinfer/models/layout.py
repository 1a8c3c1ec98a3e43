"""Whether a model can be laid out on a mesh: asked before anything is read or compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.model import Model, Params
from jaxinfer.models.stages import cut_points, stages
from jaxinfer.quantization import num_bytes


def check_layout(config: ModelConfig, mesh: Mesh) -> None:
    """ValueError, naming value, limit and fix, for a mesh that this model can not be spread over."""
    sizes: Mapping[str, int] = mesh.shape
    _check_stages(config, sizes["stage"])
    tensor = sizes["tensor"]
    for index, layer in enumerate(config.layers):
        shared_dim = 0 if layer.experts is None else layer.experts.shared_ffn_dim
        for name, size in (
            ("num_heads", layer.num_heads),
            ("ffn_dim", layer.ffn_dim),
            ("shared_ffn_dim", shared_dim),
        ):
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


def _check_stages(config: ModelConfig, count: int) -> None:
    num_layers, most = len(config.layers), len(cut_points(config))
    if count > num_layers:
        raise ValueError(f"mesh axis stage={count}: this model has {num_layers} layers; use at most {most}")
    if count > most:
        raise ValueError(
            f"mesh axis stage={count}: layers that read the keys of others must be on their stage, which leaves this "
            f"model in {most} pieces; use at most {most}"
        )


def _divisors(config: ModelConfig) -> str:
    """The sizes of the axis `tensor` that this model can be cut into."""

    def fits(size: int) -> bool:
        return all(
            layer.num_heads % size == 0
            and layer.ffn_dim % size == 0
            and (layer.experts is None or layer.experts.shared_ffn_dim % size == 0)
            and (layer.num_kv_heads % size == 0 or size % layer.num_kv_heads == 0)
            for layer in config.layers
        )

    largest = max(layer.num_heads for layer in config.layers)
    return ", ".join(str(size) for size in range(1, largest + 1) if fits(size))


def check_memory(model: Model, shardings: Params, mesh: Mesh) -> None:
    """ValueError where a device has not the memory for its part of the parameters: by how much, and what would help.

    shardings: how each parameter lies. A device that does not tell its memory is taken to have enough.
    """
    limit = memory_limit(mesh)
    if limit is None:
        return
    held = stage_bytes(model, shardings, mesh)
    needed = max(held)
    where = "every device" if len(held) == 1 else "a device of the fullest stage"
    axes = "tensor or fsdp" if len(held) == len(cut_points(model.config)) else "tensor, fsdp or stage"
    if needed > limit:
        raise ValueError(
            f"the parameters take {needed / 2**30:.3g} GiB on {where} of mesh {dict(mesh.shape)}, "
            f"{(needed - limit) / 2**30:.3g} GiB more than the {limit / 2**30:.3g} GiB it has; "
            f"spread them over {math.ceil(needed / limit)} times as many devices by {axes}"
        )


def stage_bytes(model: Model, shardings: Params, mesh: Mesh) -> list[int]:
    """Bytes of the parameters on one device of each stage."""
    parts = stages(model.config, mesh)
    return [bytes_per_device(stage.part(model.abstract_params), stage.part(shardings)) for stage in parts]


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes of one device's memory; None where it does not tell."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def bytes_per_device(abstract: Any, shardings: Any) -> int:
    """Bytes of one device's part of the parameters."""
    parts = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype), abstract, shardings
    )
    return num_bytes(jax.tree.leaves(parts))
