"""Paged attention on a Hopper GPU: the Mosaic GPU kernel of pallas_kernels, which writes and attends in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from jax import lax

from jaxinfer.ops.paged_attention_case import AttentionCase, RaggedBatch, pool_arrays
from jaxinfer.sharding.spmd import CONTEXT
from pallas_kernels.paged_attention import gpu_layout

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.gpu import Batch, Pool

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
    scales = None if case.kv_dtype is None else gpu_layout.scales_shape(case, num_pages)
    return pool_arrays(case, gpu_layout.pool_shape(case, num_pages), scales)


def prepare(case: AttentionCase, batch: RaggedBatch, group: int) -> Batch:
    from pallas_kernels.paged_attention import gpu

    num_tokens, place = batch.positions.shape[0], None if case.context == 1 else lax.axis_index(CONTEXT)
    return gpu.prepare(case, num_tokens, batch.page_tables[group], batch.query_start, batch.kv_len, place)


def run(
    case: AttentionCase,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Pool,
    batch: RaggedBatch,
    group: int,
    metadata: Batch,
    sinks: jax.Array | None = None,
) -> tuple[Any, Pool]:
    from pallas_kernels.paged_attention import gpu  # here, since a process on another platform need not load Pallas

    return gpu.paged_attention(case, q, k, v, pool, metadata, sinks)
