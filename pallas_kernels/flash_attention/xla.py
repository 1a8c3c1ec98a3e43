"""Flash attention in plain XLA (FlashAttention, arXiv:2205.14135): blocks of queries, each over the blocks of keys that
it can see, with a running softmax in float32. The logits of one pair of blocks are all that is in memory at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.cases import FlashCase
from pallas_kernels.flash_attention.reference import Segments, check

BLOCK_QUERIES, BLOCK_KEYS = 256, 512
MASKED = -1e30  # finite: a block of which a query sees nothing yields numbers, which are then weighed with 0


def supports(case: FlashCase) -> str | None:
    """None, or the reason why this path cannot serve the case."""
    return case.fault()


def visible_blocks(
    case: FlashCase,
    first: jax.Array | int,
    num_queries: int,
    kv_start: jax.Array | int,
    block_keys: int,
    num_blocks: int,
) -> tuple[jax.Array, jax.Array]:
    """First and end of the blocks of keys that queries at first..first + num_queries - 1 may see; end >= first."""

    def clipped(key: jax.Array | int) -> jax.Array:
        return jnp.minimum(lax.div(jnp.maximum(jnp.int32(key), 0), jnp.int32(block_keys)), num_blocks)

    begin, end = jnp.int32(0), jnp.int32(num_blocks)
    if case.window is not None:
        begin = clipped(first - case.window + 1 - kv_start)
    if case.causal:
        end = jnp.maximum(clipped(first + num_queries - 1 - kv_start + block_keys), begin)
    return begin, end


def flash_attention(
    case: FlashCase,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_start: jax.Array | int = 0,
    kv_start: jax.Array | int = 0,
    segments: Segments | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The contract is reference.flash_attention's."""
    check(case, q, k, v, segments)
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    block_queries, block_keys = min(BLOCK_QUERIES, num_queries), min(BLOCK_KEYS, num_keys)
    q_blocks, kv_blocks = -(-num_queries // block_queries), -(-num_keys // block_keys)
    heads = (case.num_kv_heads, case.group_size)
    q = padded(q, q_blocks * block_queries).reshape(batch, -1, *heads, case.head_dim)
    k, v = padded(k, kv_blocks * block_keys), padded(v, kv_blocks * block_keys)
    if segments is not None:
        segments = padded(segments[0], q_blocks * block_queries), padded(segments[1], kv_blocks * block_keys)
    precision = "highest" if case.dtype == "float32" else None

    def query_block(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = index * block_queries
        queries = lax.dynamic_slice_in_dim(q, first, block_queries, 1)
        own = None if segments is None else lax.dynamic_slice_in_dim(segments[0], first, block_queries, 1)
        row = first + jnp.arange(block_queries)[:, None]
        position = q_start + row

        def key_block(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            old_most, old_weight, old_mixed = state
            first = index * block_keys
            keys, values = (lax.dynamic_slice_in_dim(array, first, block_keys, 1) for array in (k, v))
            logits = jnp.einsum(
                "btkgh,bjkh->bkgtj", queries, keys, precision=precision, preferred_element_type=jnp.float32
            )
            logits *= case.scale
            if case.soft_cap is not None:
                logits = case.soft_cap * jnp.tanh(logits / case.soft_cap)
            slot = first + jnp.arange(block_keys)
            distance = position - (kv_start + slot)
            seen = (slot < num_keys) & (row < num_queries)
            if case.causal:
                seen &= distance >= 0
            if case.window is not None:
                seen &= distance < case.window
            seen = jnp.broadcast_to(seen, (batch, block_queries, block_keys))
            if segments is not None:
                assert own is not None
                seen &= own[:, :, None] == lax.dynamic_slice_in_dim(segments[1], first, block_keys, 1)[:, None]
            logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
            most = jnp.maximum(old_most, logits.max(-1))
            weights, keep = jnp.exp(logits - most[..., None]), jnp.exp(old_most - most)
            values = jnp.where(seen.any(1)[:, :, None, None], values, 0)  # 0 times NaN is no 0
            mixed = jnp.einsum(
                "bkgtj,bjkh->bkgth",
                weights.astype(values.dtype),
                values,
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            return most, old_weight * keep + weights.sum(-1), old_mixed * keep[..., None] + mixed

        shape = (batch, *heads, block_queries)
        state = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, case.value_dim))
        blocks = visible_blocks(case, q_start + first, block_queries, kv_start, block_keys, kv_blocks)
        most, weight, mixed = lax.fori_loop(*blocks, key_block, state)
        out = mixed / jnp.where(weight == 0, 1.0, weight)[..., None]
        return out.astype(q.dtype), jnp.log(weight) + most

    out, lse = lax.map(query_block, jnp.arange(q_blocks))  # [blocks, batch, K, group, block, ...]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, case.num_heads, case.value_dim)
    lse = lse.transpose(1, 0, 4, 2, 3).reshape(batch, -1, case.num_heads)
    return out[:, :num_queries], lse[:, :num_queries]


def padded(array: jax.Array, length: int) -> jax.Array:
    """Zeros behind the second axis, up to the length."""
    return jnp.pad(array, ((0, 0), (0, length - array.shape[1]), *((0, 0),) * (array.ndim - 2)))
