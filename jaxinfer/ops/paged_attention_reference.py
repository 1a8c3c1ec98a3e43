"""Paged attention by the reference: gathers every table in full, in float32. For tests and for doubting the others."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from jaxinfer.ops.paged_attention_case import AttentionCase, RaggedBatch, pool_arrays
from jaxinfer.sharding.spmd import CONTEXT
from pallas_kernels.paged_attention.reference import Pool, paged_attention_part


def supports(case: AttentionCase) -> str | None:
    return None


def abstract_pool(case: AttentionCase, num_pages: int) -> Any:
    slots = (num_pages, 2 if case.latent_dim is None else 1, case.num_kv_heads, case.page_size)
    return pool_arrays(case, (*slots, case.head_dim), slots)


def prepare(case: AttentionCase, batch: RaggedBatch, group: int) -> None:
    return None


def run(
    case: AttentionCase,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Pool,
    batch: RaggedBatch,
    group: int,
    metadata: None,
    sinks: jax.Array | None = None,
) -> tuple[Any, Pool]:
    out, lse, pool = paged_attention_part(
        q,
        k,
        v,
        pool,
        batch.page_tables[group],
        batch.query_start,
        batch.kv_len,
        scale=case.scale,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=sinks,
        latent_dim=case.latent_dim,
        context=case.context,
        place=0 if case.context == 1 else lax.axis_index(CONTEXT),
    )
    return (out.astype(q.dtype) if case.context == 1 else (out, lse)), pool
