"""Ragged paged attention in plain jnp, float32, gathering everything: slow, and the oracle for every faster backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.quantized import QuantizedPool, quantize

Pool = jax.Array | QuantizedPool


def paged_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Pool,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_len: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    latent_dim: int | None = None,
) -> tuple[jax.Array, Pool]:
    """Write k and v into their pages, then let every query see its sequence's keys up to its own position.

    q            [T, N, H]; tokens query_start[s] to query_start[s + 1] are row s's, the newest of its kv_len[s]
    k, v         [T, K, H], or None when the pool holds this step's keys and values already
    pool         [pages, 2, K, B, H], keys at [:, 0] and values at [:, 1]; page 0 takes the writes of padding tokens.
                 Quantized: data so, and scales [pages, 2, K, B]
    page_table   int32 [S, P]; logical page j of row s is page_table[s, j % P], so a window's table may be a ring
    query_start  int32 [S + 1]; kv_len int32 [S]
    window       a query at i sees keys j with i - window < j <= i; None: all j <= i
    soft_cap     logits become soft_cap * tanh(logits / soft_cap)
    sinks        [N] logits that take part in the softmax and mix in nothing
    latent_dim   the first so many numbers of a key are its value (multi-head latent attention, arXiv:2405.04434, in its
                 absorbed form): v is None, the pool [pages, 1, K, B, H], and what comes out [T, N, latent_dim]

    Returns the mixed values [T, N, H] in q's dtype, zero for padding tokens, and the pool.
    """
    out, _, pool = paged_attention_part(
        q, k, v, pool, page_table, query_start, kv_len,
        scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, latent_dim=latent_dim,
    )  # fmt: skip
    return out.astype(q.dtype), pool


def paged_attention_part(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Pool,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_len: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    latent_dim: int | None = None,
    context: int = 1,
    place: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array, Pool]:
    """The part of the same attention that is over the keys of positions place, place + context, place + 2 context, ...

    They are all that the pool holds and is given: the n-th is in slot n of its sequence. The sinks are of place 0.
    Returns the mixed values in float32, the log of the sum of exponentials float32 [T, N], -inf where a query saw no
    key, and the pool. pallas_kernels/merge_attention merges the parts.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_sequences, table_width = page_table.shape
    _, _, num_kv_heads, page_size, _ = (pool.data if isinstance(pool, QuantizedPool) else pool).shape
    tokens = jnp.arange(num_tokens)
    real = tokens < query_start[-1]
    row = jnp.minimum(jnp.searchsorted(query_start[1:], tokens, side="right"), num_sequences - 1)
    position = kv_len[row] - query_start[row + 1] + tokens

    if k is not None:
        new = jnp.stack([k] if v is None else [k, v], axis=1)
        slot = position // context
        page = page_table[row, slot // page_size % table_width]
        page = jnp.where(real & (position % context == place), page, 0)
        where = page, slice(None), slice(None), slot % page_size
        if isinstance(pool, QuantizedPool):
            data, scales = quantize(new, pool.data.dtype.name)
            pool = QuantizedPool(pool.data.at[where].set(data), pool.scales.at[where].set(scales))
        else:
            pool = pool.at[where].set(new.astype(pool.dtype))

    # Each slot of a table holds the newest position that falls on it, which is past the end only in the last page.
    column = jnp.arange(table_width)
    last_page = (kv_len[:, None] - 1 - place) // context // page_size
    logical_page = last_page - (last_page - column) % table_width
    key_slot = (logical_page[:, :, None] * page_size + jnp.arange(page_size)).reshape(num_sequences, -1)
    key_position = key_slot * context + place
    written = (key_slot >= 0) & (key_position < kv_len[:, None])
    if isinstance(pool, QuantizedPool):
        gathered = pool.data[page_table].astype(jnp.float32) * pool.scales[page_table][..., None]
    else:
        gathered = pool[page_table].astype(jnp.float32)
    gathered = gathered.transpose(0, 2, 3, 1, 4, 5)  # [S, 1 or 2, K, P, B, H]
    gathered = gathered.reshape(num_sequences, -1, num_kv_heads, table_width * page_size, head_dim)
    keys, values = gathered[row, 0], gathered[row, -1, ..., :latent_dim]

    grouped = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("tkgh,tkjh->tkgj", grouped, keys, precision="highest") * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    seen = written[row] & (key_position[row] <= position[:, None])
    if window is not None:
        seen &= key_position[row] > position[:, None] - window
    seen &= real[:, None]
    values = jnp.where(seen[:, None, :, None], values, 0.0)  # 0 times what a page's last owner left may be NaN
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    if sinks is not None:
        sinks = jnp.where(jnp.asarray(place) == 0, sinks, -jnp.inf)
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1), (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, sink], axis=-1)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    weights /= jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = jnp.einsum("tkgj,tkjh->tkgh", weights[..., : keys.shape[2]], values, precision="highest")
    lse = (peak + jnp.log(total)).reshape(num_tokens, num_heads)
    return out.reshape(num_tokens, num_heads, -1), lse, pool
