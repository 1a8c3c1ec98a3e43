"""Paged attention on a Hopper GPU: the Mosaic GPU kernel of pallas_kernels, which writes and attends in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from jaxinfer.ops.paged_attention_case import AttentionCase, RaggedBatch, pool_arrays
from pallas_kernels.paged_attention import gpu_layout

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.gpu import Tiles

CAPABILITY = "9.0"  # Hopper: the kernel is made of its instructions, which no other generation has


def supports(case: AttentionCase) -> str | None:
    if case.platform != "gpu":
        return f"the platform is {case.platform}, not gpu"
    capability = _capability()
    if capability != CAPABILITY:
        return f"the GPU's compute capability is {capability}, not {CAPABILITY} (Hopper)"
    return gpu_layout.supports(case)


def _capability() -> str:
    device = jax.devices()[0]
    return getattr(device, "compute_capability", None) or f"unknown ({device.device_kind})"


def abstract_pool(case: AttentionCase, num_pages: int) -> Any:
    return pool_arrays(case, gpu_layout.pool_shape(case, num_pages), None)


def prepare(case: AttentionCase, batch: RaggedBatch, group: int) -> tuple[jax.Array, tuple[Tiles, ...]]:
    from pallas_kernels.paged_attention import gpu

    num_tokens = batch.positions.shape[0]
    return gpu.prepare(case, num_tokens, batch.page_tables[group], batch.query_start, batch.kv_len)


def run(
    case: AttentionCase,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: jax.Array,
    batch: RaggedBatch,
    group: int,
    metadata: tuple[jax.Array, tuple[Tiles, ...]],
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.paged_attention import gpu  # here, since a process on another platform need not load Pallas

    return gpu.paged_attention(case, q, k, v, pool, metadata, sinks)
