"""Paged attention on a TPU: the Mosaic kernel of pallas_kernels, which writes and attends in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from jax import lax

from jaxinfer.ops.paged_attention_case import AttentionCase, RaggedBatch, pool_arrays
from jaxinfer.sharding.spmd import CONTEXT
from pallas_kernels.paged_attention import tpu_layout

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.tpu import Pool, Rows


def supports(case: AttentionCase) -> str | None:
    if case.platform != "tpu":
        return f"the platform is {case.platform}, not tpu"
    return tpu_layout.supports(case)


def abstract_pool(case: AttentionCase, num_pages: int) -> Any:
    scales = None if case.kv_dtype is None else tpu_layout.scales_shape(case, num_pages)
    return pool_arrays(case, tpu_layout.pool_shape(case, num_pages), scales)


def prepare(case: AttentionCase, batch: RaggedBatch, group: int) -> tuple[Rows, ...]:
    from pallas_kernels.paged_attention import tpu

    place = None if case.context == 1 else lax.axis_index(CONTEXT)
    return tpu.prepare(batch.page_tables[group], batch.query_start, batch.kv_len, context=case.context, place=place)


def run(
    case: AttentionCase,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Pool,
    batch: RaggedBatch,
    group: int,
    metadata: tuple[Rows, ...],
    sinks: jax.Array | None = None,
) -> tuple[Any, Pool]:
    from pallas_kernels.paged_attention import tpu  # here, since a process on another platform need not load Pallas

    return tpu.paged_attention(case, q, k, v, pool, metadata, batch.num_tokens, sinks)
