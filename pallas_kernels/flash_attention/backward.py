"""Gradients of flash attention in plain XLA (FlashAttention-2, arXiv:2307.08691, section 3.1.2): weights are computed
again, block by block, from the log-sum-exp that the forward pass has left.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.cases import FlashCase
from pallas_kernels.flash_attention.xla import BLOCK_KEYS, BLOCK_QUERIES, padded, visible_blocks


def gradients(
    case: FlashCase,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of q, k and v, in their dtypes, for whole sequences without segments.

    q, k, v: as given to reference.flash_attention; out, lse: as it returned them; d_out, d_lse: their cotangents.
    """
    assert not case.has_segments
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    block_queries, block_keys = min(BLOCK_QUERIES, num_queries), min(BLOCK_KEYS, num_keys)
    q_blocks, kv_blocks = -(-num_queries // block_queries), -(-num_keys // block_keys)
    precision = "highest" if case.dtype == "float32" else None
    # What a logit's gradient has of its own row: the weights' mean gradient, less that of their log-sum-exp.
    of_row = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse

    def by_block(array: jax.Array) -> jax.Array:
        """[batch, T, N, ...] -> [blocks, batch, K, group, block, ...]"""
        array = padded(array, q_blocks * block_queries)
        array = array.reshape(batch, q_blocks, block_queries, case.num_kv_heads, case.group_size, *array.shape[3:])
        return jnp.moveaxis(array, (1, 2), (0, 4))

    keys, values = padded(k, kv_blocks * block_keys), padded(v, kv_blocks * block_keys)

    def product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=jnp.float32)

    def query_block(sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        index, q, d_out, lse, of_row = block
        first = index * block_queries
        row = first + jnp.arange(block_queries)[:, None]

        def key_block(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = state
            first = index * block_keys
            k, v = (lax.dynamic_slice_in_dim(array, first, block_keys, 1) for array in (keys, values))
            logits = product("bkgth,bjkh->bkgtj", q, k) * case.scale
            slope = case.scale
            if case.soft_cap is not None:
                capped = jnp.tanh(logits / case.soft_cap)
                logits, slope = case.soft_cap * capped, case.scale * (1 - capped**2)
            slot = first + jnp.arange(block_keys)
            seen = (slot < num_keys) & (row < num_queries)
            if case.causal:
                seen &= row >= slot
            if case.window is not None:
                seen &= row - slot < case.window
            weights = jnp.where(seen, jnp.exp(logits - lse[..., None]), 0.0)
            d_weights = product("bkgth,bjkh->bkgtj", d_out, v)
            d_logits = (weights * (d_weights - of_row[..., None]) * slope).astype(q.dtype)
            d_q += product("bkgtj,bjkh->bkgth", d_logits, k)
            d_k = _added(d_k, product("bkgtj,bkgth->bjkh", d_logits, q), first)
            d_v = _added(d_v, product("bkgtj,bkgth->bjkh", weights.astype(d_out.dtype), d_out), first)
            return d_q, d_k, d_v

        blocks = visible_blocks(case, first, block_queries, 0, block_keys, kv_blocks)
        d_q, d_k, d_v = lax.fori_loop(*blocks, key_block, (jnp.zeros(q.shape), *sums))
        return (d_k, d_v), d_q

    nothing = jnp.zeros(keys.shape), jnp.zeros(values.shape)
    blocks = jnp.arange(q_blocks), *map(by_block, (q, d_out, lse, of_row))
    (d_k, d_v), d_q = lax.scan(query_block, nothing, blocks)
    d_q = jnp.moveaxis(d_q, (0, 4), (1, 2)).reshape(batch, -1, *q.shape[2:])[:, :num_queries]
    return d_q.astype(q.dtype), d_k[:, :num_keys].astype(k.dtype), d_v[:, :num_keys].astype(v.dtype)


def _added(total: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    """total [batch, J, ...] with a part of it, from `first` on, added."""
    so_far = lax.dynamic_slice_in_dim(total, first, part.shape[1], 1)
    return lax.dynamic_update_slice_in_dim(total, so_far + part, first, 1)
