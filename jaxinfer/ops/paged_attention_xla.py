"""Paged attention in plain XLA: the default on CPU, and what every platform falls back on.

Its work follows the real lengths, not the padded shapes: loops with dynamic trip counts run over tiles of work.
A decode tile is one block of one sequence's keys; tiles of all decoding sequences are taken a batch at a time and their
partial softmaxes merged per sequence (flash decoding). A prefill tile is a block of one sequence's queries, which walks
the blocks of keys it can see with a running softmax (FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.ops.paged_attention_case import AttentionCase, RaggedBatch

_MASKED = -1e30  # finite, so that a fully masked tile yields numbers, which the merge then wipes out
_KEY_BLOCK = 64  # keys per tile, when pages are not larger
_QUERY_BLOCK = 64
_DECODE_TILES = 16  # decode tiles worked on at once


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metadata:
    """Where things are, for one group of layers, in one step. All int32.

    write_page, write_offset [T]  page and slot in it that each token's key and value go to
    num_decodes []                leading rows of exactly one token
    first_block [S]               first block of keys a decoding row can see
    decode_tiles [S + 1]          first decode tile of each row, and the number of all
    prefill_tiles [S + 1]         first prefill tile of each row, and the number of all
    """

    write_page: jax.Array
    write_offset: jax.Array
    num_decodes: jax.Array
    first_block: jax.Array
    decode_tiles: jax.Array
    prefill_tiles: jax.Array


def supports(case: AttentionCase) -> str | None:
    return None


def pool_shape(case: AttentionCase, num_pages: int) -> tuple[int, ...]:
    return (num_pages, 2, case.num_kv_heads, case.page_size, case.head_dim)


def _pages_per_block(case: AttentionCase) -> int:
    return max(1, _KEY_BLOCK // case.page_size)


def _starts(counts: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])


def _row_of(starts: jax.Array, items: jax.Array) -> jax.Array:
    """The row whose range [starts[row], starts[row + 1]) each item falls in; rows may be empty."""
    rows = jnp.sum(starts[1:] <= items[..., None], axis=-1, dtype=jnp.int32)
    return jnp.minimum(rows, starts.shape[0] - 2)


def prepare(case: AttentionCase, batch: RaggedBatch, group: int) -> Metadata:
    table = batch.page_tables[group]
    block = _pages_per_block(case) * case.page_size
    num_tokens = batch.sequence_ids.shape[0]
    row = jnp.minimum(batch.sequence_ids, table.shape[0] - 1)
    column = batch.positions // case.page_size % table.shape[1]
    page = jnp.where(jnp.arange(num_tokens) < batch.num_tokens, table[row, column], 0)
    query_len = jnp.diff(batch.query_start)
    decoding = jnp.cumprod(query_len == 1, dtype=jnp.int32)
    first_block = jnp.zeros_like(batch.kv_len)
    if case.window is not None:
        first_block = jnp.maximum(batch.kv_len - case.window, 0) // block
    query_tiles = -(-query_len // min(_QUERY_BLOCK, num_tokens))
    return Metadata(
        write_page=page,
        write_offset=batch.positions % case.page_size,
        num_decodes=jnp.sum(decoding, dtype=jnp.int32),
        first_block=first_block,
        decode_tiles=_starts(decoding * (-(-batch.kv_len // block) - first_block)),
        prefill_tiles=_starts((1 - decoding) * query_tiles),
    )


def run(
    case: AttentionCase,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: jax.Array,
    batch: RaggedBatch,
    group: int,
    metadata: Metadata,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    if k is not None and v is not None:
        pool = _write(case, jnp.stack([k, v], axis=1).astype(pool.dtype), pool, batch, metadata)
    table = batch.page_tables[group]
    scaled = (q * case.scale).astype(pool.dtype)
    start = jnp.zeros(case.num_heads) if sinks is None else sinks.astype(jnp.float32)
    start = (jnp.where(case.has_sinks, start, _MASKED), jnp.full(case.num_heads, float(case.has_sinks)))
    num_rows = min(table.shape[0], q.shape[0])
    out = _decode(case, scaled[:num_rows], pool, table, batch, metadata, start)
    if q.shape[0] > 1:
        prefill = _prefill(case, scaled, pool, table, batch, metadata, start)
        decoding = jnp.arange(num_rows)[:, None, None] < metadata.num_decodes
        out = prefill.at[:num_rows].set(jnp.where(decoding, out, prefill[:num_rows]))
    return out.astype(q.dtype), pool


def _write(case: AttentionCase, kv: jax.Array, pool: jax.Array, batch: RaggedBatch, metadata: Metadata) -> jax.Array:
    """Put kv [T, 2, K, H] into the pool."""
    if case.platform != "cpu":
        return pool.at[metadata.write_page, :, :, metadata.write_offset].set(kv)

    def write_token(token: jax.Array, pool: jax.Array) -> jax.Array:
        entry = lax.dynamic_slice(kv, (token, 0, 0, 0), (1, *kv.shape[1:]))
        where = (metadata.write_page[token], 0, 0, metadata.write_offset[token], 0)
        return lax.dynamic_update_slice(pool, entry[:, :, :, None], where)

    return lax.fori_loop(0, batch.num_tokens, write_token, pool)


def _gather(case: AttentionCase, pool: jax.Array, pages: jax.Array, written: jax.Array) -> jax.Array:
    """Blocks of keys and values from their pages.

    pages [..., n] -> [..., 2, K, n * B, H]; zero where written [..., n * B] is false, whatever the pages' last
    owner left.
    """
    heads = 2 * case.num_kv_heads
    chunks = pool.reshape(-1, case.page_size * case.head_dim)
    index = pages[..., None, :] * heads + jnp.arange(heads)[:, None]
    block = chunks.at[index].get(mode="promise_in_bounds")
    block = block.reshape(*pages.shape[:-1], 2, case.num_kv_heads, -1, case.head_dim)
    return jnp.where(written[..., None, None, :, None], block, 0)


def _cap(case: AttentionCase, logits: jax.Array) -> jax.Array:
    return logits if case.soft_cap is None else case.soft_cap * jnp.tanh(logits / case.soft_cap)


def _decode(
    case: AttentionCase,
    q: jax.Array,
    pool: jax.Array,
    table: jax.Array,
    batch: RaggedBatch,
    metadata: Metadata,
    start: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """q [R, N, H], one query a row -> [R, N, H] float32."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, group_size = case.num_kv_heads, case.group_size
    pages_per_block = _pages_per_block(case)
    block = pages_per_block * case.page_size
    num_tiles = min(_DECODE_TILES, max(2, num_rows))
    touched = min(num_tiles, num_rows)  # a run of tiles belongs to a run of rows
    grouped = q.reshape(num_rows, num_kv_heads, group_size, head_dim)
    total = metadata.decode_tiles[-1]

    def step(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        tile = i * num_tiles + jnp.arange(num_tiles)
        live = tile < total
        row = _row_of(metadata.decode_tiles, jnp.minimum(tile, total - 1))
        key_block = metadata.first_block[row] + tile - metadata.decode_tiles[row]
        columns = (key_block[:, None] * pages_per_block + jnp.arange(pages_per_block)) % table.shape[1]
        pages = jnp.where(live[:, None], table[row[:, None], columns], 0)
        position = key_block[:, None] * block + jnp.arange(block)
        seen = (position < batch.kv_len[row][:, None]) & live[:, None]
        kv = _gather(case, pool, pages, seen)
        if case.window is not None:
            seen &= position >= (batch.kv_len[row] - case.window)[:, None]
        logits = jnp.einsum("gkqh,gkbh->gkqb", grouped[row], kv[:, 0], preferred_element_type=jnp.float32)
        logits = jnp.where(seen[:, None, None], _cap(case, logits), _MASKED)
        tile_max = logits.max(-1)
        weights = jnp.exp(logits - tile_max[..., None])
        tile_sum = weights.sum(-1).reshape(num_tiles, num_heads)
        mixed = jnp.einsum(
            "gkqb,gkbh->gkqh", weights.astype(pool.dtype), kv[:, 1], preferred_element_type=jnp.float32
        ).reshape(num_tiles, num_heads, head_dim)
        tile_max = tile_max.reshape(num_tiles, num_heads)
        # A row with bad numbers stays alone with them: they reach its own maximum, never a sum over all rows' tiles.
        finite = jnp.isfinite(tile_max)
        tile_sum, mixed = jnp.where(finite, tile_sum, 0.0), jnp.where(finite[..., None], mixed, 0.0)

        first_row = jnp.minimum(row[0], num_rows - touched)
        belongs = ((row - first_row)[:, None] == jnp.arange(touched)) & live[:, None]
        old_max, old_sum, old_mixed = (lax.dynamic_slice_in_dim(part, first_row, touched) for part in state)
        new_max = jnp.maximum(old_max, jnp.where(belongs[..., None], tile_max[:, None], _MASKED).max(0))
        share = jnp.where(belongs[..., None], jnp.exp(tile_max[:, None] - new_max), 0.0)
        keep = jnp.exp(old_max - new_max)
        new = (
            new_max,
            old_sum * keep + (share * tile_sum[:, None]).sum(0),
            old_mixed * keep[..., None] + (share[..., None] * mixed[:, None]).sum(0),
        )
        return tuple(
            lax.dynamic_update_slice_in_dim(part, value, first_row, 0) for part, value in zip(state, new, strict=True)
        )

    state = tuple(jnp.broadcast_to(part, (num_rows, num_heads)) for part in start)
    state = (*state, jnp.zeros((num_rows, num_heads, head_dim)))
    _, weight, mixed = lax.fori_loop(0, -(-total // num_tiles), step, state)
    return mixed / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)[..., None]


def _prefill(
    case: AttentionCase,
    q: jax.Array,
    pool: jax.Array,
    table: jax.Array,
    batch: RaggedBatch,
    metadata: Metadata,
    start: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """q [T, N, H] -> [T, N, H] float32, the rows of more than one query filled in."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, group_size = case.num_kv_heads, case.group_size
    pages_per_block = _pages_per_block(case)
    block = pages_per_block * case.page_size
    num_queries = min(_QUERY_BLOCK, num_tokens)

    def tile(i: jax.Array, out: jax.Array) -> jax.Array:
        row = _row_of(metadata.prefill_tiles, i)
        end, length = batch.query_start[row + 1], batch.kv_len[row]
        own_first = batch.query_start[row] + (i - metadata.prefill_tiles[row]) * num_queries
        own_end = jnp.minimum(own_first + num_queries, end)
        first = jnp.minimum(own_first, num_tokens - num_queries)
        token = first + jnp.arange(num_queries)
        position = length - end + token
        queries = lax.dynamic_slice_in_dim(q, first, num_queries)
        queries = queries.reshape(num_queries, num_kv_heads, group_size, head_dim).transpose(1, 2, 0, 3)

        def key_block(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            old_max, old_sum, old_mixed = state
            columns = (j * pages_per_block + jnp.arange(pages_per_block)) % table.shape[1]
            key_position = j * block + jnp.arange(block)
            kv = _gather(case, pool, table[row, columns], key_position < length)
            seen = key_position <= position[:, None]
            if case.window is not None:
                seen &= key_position > position[:, None] - case.window
            logits = jnp.einsum("kgqh,kbh->kgqb", queries, kv[0], preferred_element_type=jnp.float32)
            logits = jnp.where(seen, _cap(case, logits), _MASKED)
            new_max = jnp.maximum(old_max, logits.max(-1))
            weights = jnp.exp(logits - new_max[..., None])
            keep = jnp.exp(old_max - new_max)
            mixed = jnp.einsum("kgqb,kbh->kgqh", weights.astype(pool.dtype), kv[1], preferred_element_type=jnp.float32)
            return new_max, old_sum * keep + weights.sum(-1), old_mixed * keep[..., None] + mixed

        first_block = jnp.zeros((), jnp.int32)
        if case.window is not None:
            first_block = jnp.maximum(length - end + own_first - case.window + 1, 0) // block
        last_block = (length - end + own_end - 1) // block
        heads = (num_kv_heads, group_size, num_queries)
        state = tuple(jnp.broadcast_to(part.reshape(num_kv_heads, group_size, 1), heads) for part in start)
        state = (*state, jnp.zeros((*heads, head_dim)))
        _, weight, mixed = lax.fori_loop(first_block, last_block + 1, key_block, state)
        mixed = (mixed / weight[..., None]).transpose(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
        own = ((token >= own_first) & (token < own_end))[:, None, None]
        mixed = jnp.where(own, mixed, lax.dynamic_slice_in_dim(out, first, num_queries))
        return lax.dynamic_update_slice_in_dim(out, mixed, first, 0)

    return lax.fori_loop(0, metadata.prefill_tiles[-1], tile, jnp.zeros(q.shape))
