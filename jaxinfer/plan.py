"""Every choice of an engine, made once from the user's config, the model and the devices, and then frozen."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.cache.groups import KVGroup, group_of_layer, kv_groups
from jaxinfer.config import EngineConfig, parse_kv_cache_dtype
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layout import stage_bytes
from jaxinfer.models.model import Model
from jaxinfer.models.stages import Stage, param_shardings, stages
from jaxinfer.ops.paged_attention import AttentionCase, Backend, choose_backend
from jaxinfer.ops.paged_attention_context import describe as describe_travel
from jaxinfer.sharding.spmd import num_shards

log = logging.getLogger(__name__)

# Part of the memory that the KV cache takes when no flag says otherwise: nearly all that is free of an accelerator's,
# which serves nothing else; a little of a host's, which does.
ACCELERATOR_FRACTION = 0.85
HOST_FRACTION = 0.1
DEFAULT_PAGE_SIZE = 16
QUANTIZED_PAGE_SIZE = 32  # by default: as many bytes, and what kernels that read tiles of 8-bit numbers ask for


@dataclass(frozen=True)
class LayerPlan:
    """How one layer attends: which group's page table, whose pool, by which kernel."""

    group: int
    pool: int
    case: AttentionCase
    backend: Backend


@dataclass(frozen=True)
class Plan:
    """All that is static in a running engine. Token and sequence counts are padded to the buckets.

    Sequences, tokens and pages are those of one shard of the mesh (sharding/spmd.py) in one lane, heads those of one
    device. A page of the books has page_size tokens on each device of the axis `context`, tokens_per_page on all of
    them. Sequence buckets are coarse: a sampler takes long to compile, and a row too many costs it little.
    """

    model: ModelConfig
    dtype: np.dtype
    mesh: Mesh
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    groups: tuple[KVGroup, ...]
    table_widths: tuple[int, ...]
    num_pages: tuple[int, ...]
    layers: tuple[LayerPlan, ...]
    token_buckets: tuple[int, ...]
    sequence_buckets: tuple[int, ...]
    enable_prefix_caching: bool
    seed: int

    @property
    def num_shards(self) -> int:
        return num_shards(self.mesh)

    @property
    def tokens_per_page(self) -> int:
        return self.page_size * self.mesh.shape["context"]

    @property
    def stages(self) -> tuple[Stage, ...]:
        return stages(self.model, self.mesh)

    @property
    def num_lanes(self) -> int:
        """Batches in flight, each of sequences of its own: as many as stages, to keep them all busy."""
        return len(self.stages)

    @property
    def num_slots(self) -> int:
        """Sequences that run at the same time, on all shards in all lanes."""
        return self.num_lanes * self.num_shards * self.max_num_seqs

    @property
    def kv_cache_bytes(self) -> int:
        """Of all devices together."""
        costs = _page_bytes(self.layers, len(self.groups))
        num_devices = self.mesh.size // len(self.stages)  # that have a page of a layer
        return self.num_lanes * num_devices * sum(p * cost for p, cost in zip(self.num_pages, costs, strict=True))

    @property
    def page_bytes(self) -> list[int]:
        """Bytes of one page of each group, on one device: of all stages', the one where it takes the most."""
        return _largest_page_bytes(self.layers, self.stages, len(self.groups))

    def describe(self) -> str:
        """The plan in a few lines, for the log."""
        lines = [
            (
                f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}, mesh {dict(self.mesh.shape)}, "
                f"{self.dtype.name}, "
                + ("" if self.model.quantization is None else f"{self.model.quantization.name} weights, ")
                + f"keys and values {self.layers[0].case.kv_dtype or self.dtype.name}, "
                f"max_model_len {self.max_model_len}, max_num_seqs {self.max_num_seqs}, "
                f"max_num_batched_tokens {self.max_num_batched_tokens}"
                + ("" if self.num_shards == 1 else f", each of {self.num_shards} shards")
                + ("" if self.num_lanes == 1 else f", each of {self.num_lanes} lanes")
            ),
            *(
                f"stage {number}: layers {stage.layers.start} to {stage.layers.stop - 1}"
                for number, stage in enumerate(self.stages)
                if self.num_lanes > 1
            ),
            f"KV cache {self.kv_cache_bytes / 2**20:.0f} MiB, pages of {self.tokens_per_page} tokens: "
            + "; ".join(
                f"{pages} pages for {len(g.layers)} layers of {g.num_kv_heads} kv heads x {g.head_dim}"
                + ("" if g.latent_dim is None else f", values in their first {g.latent_dim} numbers")
                + ("" if g.window is None else f", window {g.window}, a ring of {width}")
                for g, pages, width in zip(self.groups, self.num_pages, self.table_widths, strict=True)
            ),
            *dict.fromkeys(
                f"layers of {layer.case.num_heads} heads and {layer.case.num_kv_heads} kv heads x {layer.case.head_dim}"
                " a device: " + describe_travel(layer.backend, layer.case, self.token_buckets[-1], self.max_num_seqs)
                for layer in self.layers
                if layer.case.context > 1
            ),
        ]
        return "\n".join(lines)


def resolve_dtype(requested: str, checkpoint: Any, platform: str) -> np.dtype:
    """The compute dtype. XLA's CPU code for 16-bit matrix products is many times slower than its float32 code."""
    stored = jnp.dtype(checkpoint or "float32")
    if requested != "auto":
        return jnp.dtype(requested)
    if platform == "cpu" and stored != jnp.float32:
        log.info(
            "the checkpoint is %s; computing in float32, which is faster on CPU (dtype=%s keeps it)", stored, stored
        )
        return jnp.dtype("float32")
    return stored


def resolve(config: EngineConfig, model: ModelConfig, dtype: np.dtype, mesh: Mesh) -> Plan:
    """Freeze every choice. ValueError, naming value, limit and fix, for what this model cannot do."""
    platform = mesh.devices.flat[0].platform
    on_cpu = platform == "cpu"
    max_model_len = config.max_model_len or model.max_position
    _check_positions("max_model_len", max_model_len, model)
    max_num_seqs = config.max_num_seqs or (32 if on_cpu else 256)
    max_num_batched_tokens = max(config.max_num_batched_tokens or (512 if on_cpu else 2048), max_num_seqs)
    kv_dtype = parse_kv_cache_dtype(config.kv_cache_dtype)
    page_size = config.page_size or default_page_size(kv_dtype)
    max_chunk = min(max_num_batched_tokens, max_model_len)

    groups = kv_groups(model)
    context = mesh.shape["context"]
    widths = tuple(group.table_width(max_model_len, max_chunk, context * page_size) for group in groups)
    layers = _layer_plans(model, groups, page_size, dtype, kv_dtype, mesh, config.attention_backend)
    costs = _largest_page_bytes(layers, stages(model, mesh), len(groups))
    num_pages = _pool_sizes(config, groups, widths, costs, max_num_seqs, model, dtype, mesh)
    return Plan(
        model=model,
        dtype=dtype,
        mesh=mesh,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        page_size=page_size,
        groups=groups,
        table_widths=widths,
        num_pages=num_pages,
        layers=layers,
        token_buckets=tuple(context * size for size in buckets(-(-max_num_batched_tokens // context))),
        sequence_buckets=(*(4**i for i in range(16) if 4**i < max_num_seqs), max_num_seqs),
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
    )


def resolve_fixed(
    model: ModelConfig,
    dtype: np.dtype,
    mesh: Mesh,
    *,
    max_num_seqs: int,
    max_model_len: int,
    max_chunk: int,
    page_size: int,
    kv_dtype: str | None,
    attention_backend: str | None,
) -> Plan:
    """The plan of a batch that is never scheduled: every one of a shard's max_num_seqs sequences has all the pages it
    can come to need, and there are no buckets. max_chunk: the most tokens that one step gives a sequence."""
    _check_positions("max_len", max_model_len, model)
    groups = kv_groups(model)
    tokens_per_page = mesh.shape["context"] * page_size
    widths = tuple(group.table_width(max_model_len, max_chunk, tokens_per_page) for group in groups)
    return Plan(
        model=model,
        dtype=dtype,
        mesh=mesh,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs * max_chunk,
        page_size=page_size,
        groups=groups,
        table_widths=widths,
        num_pages=tuple(max_num_seqs * width + 1 for width in widths),
        layers=_layer_plans(model, groups, page_size, dtype, kv_dtype, mesh, attention_backend),
        token_buckets=(),
        sequence_buckets=(),
        enable_prefix_caching=False,
        seed=0,
    )


def default_page_size(kv_dtype: str | None) -> int:
    return DEFAULT_PAGE_SIZE if kv_dtype is None else QUANTIZED_PAGE_SIZE


def _check_positions(name: str, max_len: int, model: ModelConfig) -> None:
    if model.learned_positions and max_len > model.max_position:
        raise ValueError(
            f"{name}={max_len} is more than the {model.max_position} positions this model has learned; "
            f"use at most {model.max_position}"
        )


def buckets(largest: int) -> tuple[int, ...]:
    """Padded sizes up to `largest`: powers of two, and from 16 on the middles between them (at most 1/3 padding)."""
    sizes = {largest}
    size = 1
    while size < largest:
        sizes.add(size)
        if size >= 16 and size * 3 // 2 < largest:
            sizes.add(size * 3 // 2)
        size *= 2
    return tuple(sorted(sizes))


def _layer_plans(
    model: ModelConfig,
    groups: tuple[KVGroup, ...],
    page_size: int,
    dtype: np.dtype,
    kv_dtype: str | None,
    mesh: Mesh,
    forced: str | None,
) -> tuple[LayerPlan, ...]:
    owners = sorted(layer for group in groups for layer in group.layers)
    tensor = mesh.shape["tensor"]
    chosen: dict[AttentionCase, Backend] = {}
    plans = []
    for index, (layer, group) in enumerate(zip(model.layers, group_of_layer(model), strict=True)):
        case = AttentionCase(
            num_heads=layer.num_heads // tensor,
            num_kv_heads=max(1, layer.num_kv_heads // tensor),
            head_dim=layer.head_dim,
            latent_dim=layer.latent_dim,
            context=mesh.shape["context"],
            page_size=page_size,
            window=layer.window,
            soft_cap=model.attention_softcap,
            scale=model.scale_of(layer),
            dtype=dtype.name,
            kv_dtype=kv_dtype,
            has_sinks=model.attention_sinks,
            platform=mesh.devices.flat[0].platform,
        )
        if case not in chosen:
            chosen[case], refusals = choose_backend(case, forced)
            log.info("attention of layer %d: %s", index, chosen[case].name)
            for name, reason in refusals.items():
                log.info("attention backend %s not used: %s", name, reason)
        owner = index if layer.kv_source is None else layer.kv_source
        plans.append(LayerPlan(group, owners.index(owner), case, chosen[case]))
    return tuple(plans)


def _page_bytes(layers: tuple[LayerPlan, ...], num_groups: int) -> list[int]:
    """Bytes of one page of each group, over the layers that own one, as their backends lay it out: with padding, and
    the scales of quantized keys and values."""
    owners = {layer.pool: layer for layer in layers}
    costs = [0] * num_groups
    for layer in owners.values():
        arrays = jax.tree.leaves(layer.backend.abstract_pool(layer.case, 1))
        costs[layer.group] += sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return costs


def _largest_page_bytes(layers: tuple[LayerPlan, ...], parts: tuple[Stage, ...], num_groups: int) -> list[int]:
    """Bytes of one page of each group, on a device of the stage where it takes the most."""
    costs = [_page_bytes(layers[part.layers.start : part.layers.stop], num_groups) for part in parts]
    return [max(own) for own in zip(*costs, strict=True)]


def _pool_sizes(
    config: EngineConfig,
    groups: tuple[KVGroup, ...],
    widths: tuple[int, ...],
    costs: list[int],
    max_num_seqs: int,
    model: ModelConfig,
    dtype: np.dtype,
    mesh: Mesh,
) -> tuple[int, ...]:
    """Pages of each group, page 0 included; costs: bytes of one page of each, on one device.

    Rings never need more than max_num_seqs full rings, so they get that, or half of the memory at most; the groups
    that grow with the sequence share the rest, the same number of pages each, and never more than every sequence at
    its longest would use.
    """
    most = [max_num_seqs * width + 1 for width in widths]
    growing = [g.window is None for g in groups]
    if config.num_pages is not None:
        first = growing[0]
        return tuple(config.num_pages + 1 if g == first else pages for g, pages in zip(growing, most, strict=True))
    parts = mesh.size * mesh.shape["stage"]  # as many lanes as stages share every device's memory
    memory = (config.kv_cache_bytes or _free_memory(model, dtype, mesh)) // parts
    ring_bytes = sum(cost * pages for cost, pages, g in zip(costs, most, growing, strict=True) if not g)
    ring_limit = memory // 2 if any(growing) else memory
    ring_share = min(1.0, ring_limit / ring_bytes) if ring_bytes else 0.0
    left = memory - int(ring_bytes * ring_share)
    growing_cost = sum(cost for cost, g in zip(costs, growing, strict=True) if g)
    pages = tuple(
        min(m, left // growing_cost) if g else int(m * ring_share) for m, g in zip(most, growing, strict=True)
    )
    if min(pages) < 2:
        raise ValueError(
            f"kv_cache_memory={memory * parts} bytes holds {min(pages)} pages of {max(costs) * parts} bytes; "
            f"give at least {2 * (growing_cost + ring_bytes // max_num_seqs) * parts} bytes or a smaller page_size"
        )
    return pages


def _free_memory(model: ModelConfig, dtype: np.dtype, mesh: Mesh) -> int:
    """Bytes the KV cache may take, over all devices of the mesh."""
    if mesh.devices.flat[0].platform == "cpu":
        # Of the whole, not of what happens to be free: programs are made for a pool's size, and kept.
        total, available = _host_memory()
        num_processes = mesh.size // len(mesh.local_devices)
        return num_processes * min(int(HOST_FRACTION * total), available // 2)
    free = []
    missing = _less_than_fullest(model, dtype, mesh)
    for device in mesh.local_devices:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            raise ValueError(f"{device} does not tell its memory; give kv_cache_memory or num_pages")
        free.append(stats["bytes_limit"] - stats["bytes_in_use"] - missing.get(device, 0))
    return mesh.size * int(ACCELERATOR_FRACTION * min(free))


def _less_than_fullest(model: ModelConfig, dtype: np.dtype, mesh: Mesh) -> dict[Any, int]:
    """How much less of the parameters a device holds than one of the fullest stage, which may be another process's."""
    parts = stages(model, mesh)
    if len(parts) == 1:
        return {}
    whole = Model(model, dtype)
    held = stage_bytes(whole, param_shardings(whole, mesh), mesh)
    return {
        device: max(held) - own for stage, own in zip(parts, held, strict=True) for device in stage.mesh.devices.flat
    }


def _host_memory() -> tuple[int, int]:
    """Bytes of physical memory, and those available for use where the kernel tells it (Linux)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return total, int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return total, total
