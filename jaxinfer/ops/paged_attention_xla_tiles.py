"""What plain XLA's paged attention does to a tile of keys: out of the pool, times queries, weighted and mixed.

The shape of the code follows what XLA's CPU compiler makes of it (paged_attention_xla.py says what that is).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.ops.matmul import uses_eigen
from jaxinfer.ops.paged_attention_case import AttentionCase
from pallas_kernels.paged_attention.quantized import QuantizedPool, value_scales

MASKED = -1e30  # finite, so that a fully masked tile yields numbers, which the merge then wipes out
FEW_ROWS = 2  # decode batches up to this size run tile by tile in one kernel
_MOST_VECTORS = 8  # queries per kv head and tile up to which each may be multiplied by itself
_TILE = 128  # keys, when pages are not larger

Pool = jax.Array | QuantizedPool
State = tuple[jax.Array, jax.Array, jax.Array]  # running max, sum of weights, weighted values
Scales = tuple[jax.Array, jax.Array] | None  # of a tile's keys and of its values, [tiles, K, block]; None: all are 1


def num_kinds(case: AttentionCase) -> int:
    """What the pool holds of a token and head: its key and its value, or a key that begins with its value."""
    return 2 if case.latent_dim is None else 1


def pages_per_tile(case: AttentionCase) -> int:
    return max(1, _TILE // case.page_size)


def tile_size(case: AttentionCase) -> int:
    """Keys of a tile."""
    return pages_per_tile(case) * case.page_size


def unhoisted(case: AttentionCase, values: jax.Array) -> jax.Array:
    """Ascending values as they are, in such a way that XLA's CPU compiler leaves the loop around them in pieces.

    It makes one single-threaded kernel of a loop that it takes for small, but not of one that sorts.
    """
    return lax.sort(values) if case.platform == "cpu" else values


def keys_and_values(case: AttentionCase, pool: Pool, pages: jax.Array) -> tuple[jax.Array, jax.Array, Scales]:
    """Of tiles: pages [tiles, n] -> two [tiles, K, n * B, H]. Keys that begin with their values are mixed whole: to cut
    off what comes out costs nothing, to cut what goes into a product costs a copy."""
    data, scales = pool.data if isinstance(pool, QuantizedPool) else pool, None
    if isinstance(pool, QuantizedPool):
        of_values = _gather_scales(case, pool, pages, num_kinds(case) - 1)
        scales = _gather_scales(case, pool, pages, 0), value_scales(of_values)
    if case.latent_dim is not None:
        both = _gather(case, data, pages, 0)
        return both, both, scales
    return _gather(case, data, pages, 0), _gather(case, data, pages, 1), scales


def _rows(case: AttentionCase, pool: jax.Array, pages: jax.Array, which: int) -> jax.Array:
    """Of keys (which 0) or values (1), what a pool [pages, kinds * K, ...] has of pages [tiles, n]: [tiles, K, n, ...].

    On CPU with two indices: to make one of them the pool would be reshaped, and its rows not copied with vectors.
    """
    heads = which * case.num_kv_heads + jnp.arange(case.num_kv_heads)
    if case.platform == "cpu":
        return pool.at[pages[:, None], heads[:, None]].get(mode="promise_in_bounds")
    index = pages[:, None] * pool.shape[1] + heads[:, None]
    return pool.reshape(-1, *pool.shape[2:]).at[index].get(mode="promise_in_bounds")


def _gather_scales(case: AttentionCase, pool: QuantizedPool, pages: jax.Array, which: int) -> jax.Array:
    """pages [tiles, n] -> [tiles, K, n * B]"""
    return _rows(case, pool.scales, pages, which).reshape(pages.shape[0], case.num_kv_heads, -1)


def _gather(case: AttentionCase, pool: jax.Array, pages: jax.Array, which: int) -> jax.Array:
    """Keys (which 0) or values (1) of tiles: pages [tiles, n] -> [tiles, K, n * B, H]."""
    rows = _rows(case, pool, pages, which)
    if case.platform == "cpu":  # or each number's place would be computed
        rows = lax.optimization_barrier(rows)
    rows = rows.reshape(pages.shape[0], case.num_kv_heads, -1, case.head_dim).astype(case.dtype)
    return lax.optimization_barrier(rows) if pages.shape[0] > 1 else rows


def logits_of(
    case: AttentionCase, q: jax.Array, keys: jax.Array, scales: Scales, seen: jax.Array, as_vectors: bool
) -> jax.Array:
    """q [tiles, K, Q, H], keys [tiles, K, block, H], seen [tiles, Q or 1, block] -> [tiles, K, Q, block] float32."""
    if as_vectors:
        heads = [jnp.einsum("gkh,gkbh->gkb", q[:, :, i], keys) for i in range(q.shape[2])]
        logits = jnp.stack(heads, axis=2).astype(jnp.float32)
    else:
        logits = jnp.einsum("gkqh,gkbh->gkqb", q, keys, preferred_element_type=jnp.float32)
    if scales is not None:
        logits *= scales[0][:, :, None]
    if case.soft_cap is not None:
        logits = case.soft_cap * jnp.tanh(logits / case.soft_cap)
    return jnp.where(seen[:, None], logits, MASKED)


def mix(weights: jax.Array, values: jax.Array, scales: Scales, as_vectors: bool) -> jax.Array:
    """weights [tiles, K, Q, block], values [tiles, K, block, H] -> [tiles, K, Q, H] float32."""
    if scales is not None:
        weights *= scales[1][:, :, None]
    weights = weights.astype(values.dtype)
    if as_vectors:
        heads = [jnp.einsum("gkb,gkbh->gkh", weights[:, :, i], values) for i in range(weights.shape[2])]
        return jnp.stack(heads, axis=2).astype(jnp.float32)
    return jnp.einsum("gkqb,gkbh->gkqh", weights, values, preferred_element_type=jnp.float32)


def by_vectors(case: AttentionCase, num_queries: int, num_rows: int, num_tokens: int) -> bool:
    """Whether a tile's queries are multiplied one by one: in a single kernel, and where Eigen would do the batch."""
    if case.platform != "cpu" or num_queries > _MOST_VECTORS:
        return False
    return num_rows <= FEW_ROWS or uses_eigen(num_tokens, case.platform, with_attention=True)


def walk(
    case: AttentionCase,
    queries: jax.Array,
    pool: Pool,
    pages_of: Callable[[jax.Array], jax.Array],
    sees: Callable[[jax.Array], jax.Array],
    tiles: tuple[jax.Array | int, jax.Array],
    state: State,
    as_vectors: bool,
) -> State:
    """A running softmax of queries [1, K, Q, H] over a sequence's tiles of keys, one after another.

    pages_of: what the sequence's page table has at columns. sees: of slots [block], whether the queries see their keys,
    [Q or 1, block]. tiles: the first, and the end. state: what to begin with, [1, K, Q] and [1, K, Q, H].
    """
    num_pages, block = pages_per_tile(case), tile_size(case)

    def step(i: jax.Array, state: State) -> State:
        old_max, old_sum, old_mixed = state
        pages = pages_of(unhoisted(case, i * num_pages + jnp.arange(num_pages)))[None]
        keys, values, scales = keys_and_values(case, pool, pages)
        logits = logits_of(case, queries, keys, scales, sees(i * block + jnp.arange(block))[None], as_vectors)
        new_max = jnp.maximum(old_max, logits.max(-1))
        weights = jnp.exp(logits - new_max[..., None])
        keep = jnp.exp(old_max - new_max)
        mixed = mix(weights, values, scales, as_vectors)
        return new_max, old_sum * keep + weights.sum(-1), old_mixed * keep[..., None] + mixed

    return lax.fori_loop(*tiles, step, state)
