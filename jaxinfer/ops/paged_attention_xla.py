"""Paged attention in plain XLA: the default on CPU, and what every platform falls back on.

Its work follows the real lengths, not the padded shapes: loops with dynamic trip counts run over tiles of work.
A decode tile is one block of one sequence's keys; tiles of all decoding sequences are taken some at a time, and their
partial softmaxes merged per sequence (flash decoding); before that, leading keys that all of them have in the same
pages are read once for all (Hydragen, arXiv:2402.05099). A prefill tile is a block of one sequence's queries, which
walks the blocks of keys it can see with a running softmax (FlashAttention, arXiv:2205.14135).

The shape of the code follows what XLA's CPU compiler makes of it:
- a slice of a dot's operand is a copy, so keys and values are gathered apart;
- a gather of whole (page, head) rows is vectorised and runs on all cores, but not fused with what reshapes it;
- a loop the compiler takes for small becomes one single-threaded kernel: right for one sequence and for writing tokens,
  wrong for a batch;
- a product of a matrix and a vector is inlined code, that of two matrices a library call of some 20 microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.ops.paged_attention_case import (
    AttentionCase,
    RaggedBatch,
    is_here,
    newest_slot,
    num_slots,
    pool_arrays,
)
from jaxinfer.ops.paged_attention_xla_tiles import (
    FEW_ROWS,
    MASKED,
    Pool,
    State,
    by_vectors,
    keys_and_values,
    logits_of,
    mix,
    num_kinds,
    pages_per_tile,
    tile_size,
    unhoisted,
    walk,
)
from jaxinfer.sharding.spmd import CONTEXT
from pallas_kernels.paged_attention.quantized import QuantizedPool, quantize

_PREFILL_QUERIES = 128
_TILES_AT_ONCE = 8  # decode tiles whose products are one batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metadata:
    """Where things are on this device, for one group of layers, in one step. All int32.

    write_page, write_offset [T]  page, and slot in it, that each token's key and value go to; page 0 where elsewhere
    num_decodes []                leading rows of exactly one token
    num_shared []                 leading tiles of keys that all these rows have in the same pages; no others hold them
    num_tiles []                  decode tiles in use
    tile_row [W]                  row of each decode tile; a row's tiles are neighbours, rows are in order
    tile_pages [W, pages]         its pages
    tile_first, tile_end [W]      its visible keys, counted from the tile's first; tiles not in use end at 0
    prefill_tiles [S + 1]         first prefill tile of each row, and the number of all
    """

    write_page: jax.Array
    write_offset: jax.Array
    num_decodes: jax.Array
    num_shared: jax.Array
    num_tiles: jax.Array
    tile_row: jax.Array
    tile_pages: jax.Array
    tile_first: jax.Array
    tile_end: jax.Array
    prefill_tiles: jax.Array


Parts = tuple[jax.Array, ...]  # mixed values [rows, N, H], and [rows, N, 1] the log of the sum of weights if asked for


def supports(case: AttentionCase) -> str | None:
    return None


def abstract_pool(case: AttentionCase, num_pages: int) -> Any:
    """Keys and values head by head: [pages, kinds * K, B * H], since a CPU copies one long axis with vectors (and not
    that of an array which is reshaped for it); a TPU keeps the last two axes in tiles, so there B and H stay apart."""
    slots = (num_pages, num_kinds(case) * case.num_kv_heads, case.page_size)
    long = (*slots[:2], case.page_size * case.head_dim)
    return pool_arrays(case, (*slots, case.head_dim) if case.platform == "tpu" else long, slots)


def prepare(case: AttentionCase, batch: RaggedBatch, group: int) -> Metadata:
    table = batch.page_tables[group]
    num_tokens, num_sequences = batch.positions.shape[0], table.shape[0]
    row = jnp.minimum(batch.sequence_ids, num_sequences - 1)
    slot = newest_slot(case, batch.positions)
    page = table[row, slot // case.page_size % table.shape[1]]
    is_kept = (jnp.arange(num_tokens) < batch.num_tokens) & is_here(case, batch.positions)
    query_len = jnp.diff(batch.query_start)
    decoding = jnp.cumprod(query_len == 1, dtype=jnp.int32)
    query_tiles = -(-query_len // min(_PREFILL_QUERIES, num_tokens))
    num_rows = min(num_tokens, num_sequences)
    num_shared = _num_shared(case, batch.kv_len, decoding, table, num_tokens)
    num_tiles, tiles = _decode_tiles(case, batch.kv_len, decoding, table, num_rows, num_shared)
    return Metadata(
        write_page=jnp.where(is_kept, page, 0),
        write_offset=slot % case.page_size,
        num_decodes=jnp.sum(decoding, dtype=jnp.int32),
        num_shared=num_shared,
        num_tiles=num_tiles,
        **tiles,
        prefill_tiles=_starts((1 - decoding) * query_tiles),
    )


def run(
    case: AttentionCase,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Pool,
    batch: RaggedBatch,
    group: int,
    metadata: Metadata,
    sinks: jax.Array | None = None,
) -> tuple[Any, Pool]:
    if k is not None:
        pool = write(case, k, v, pool, batch, metadata)
    table = batch.page_tables[group]
    num_rows = min(table.shape[0], q.shape[0])
    scaled = (q * case.scale).astype(case.dtype)
    start = (jnp.full(case.num_heads, MASKED), jnp.zeros(case.num_heads))
    if case.has_sinks:
        assert sinks is not None
        start = _with_sinks(case, start, sinks)
    shares = _shares(case, q.shape[0], table.shape[0])
    state = _decode_shared(case, scaled[:num_rows], pool, table, metadata, start, shares)
    vectors = by_vectors(case, case.group_size, num_rows, q.shape[0])
    out = _decode(case, scaled[:num_rows], pool, metadata, state, vectors)
    if q.shape[0] > 1:
        prefill = _prefill(case, scaled, pool, table, batch, metadata, start)
        decoding = jnp.arange(num_rows)[:, None, None] < metadata.num_decodes
        out = tuple(
            of_many.at[:num_rows].set(jnp.where(decoding, of_one, of_many[:num_rows]))
            for of_many, of_one in zip(prefill, out, strict=True)
        )
    mixed = out[0][..., : case.latent_dim]
    return (mixed.astype(q.dtype) if case.context == 1 else (mixed, out[1][..., 0])), pool


def _with_sinks(
    case: AttentionCase, start: tuple[jax.Array, jax.Array], sinks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Max and sum [N] that a softmax with sinks [N] begins with; where devices share the keys, on the first."""
    sunk = (sinks.astype(jnp.float32), jnp.ones(case.num_heads))
    if case.context == 1:
        return sunk
    is_first = lax.axis_index(CONTEXT) == 0
    return jnp.where(is_first, sunk[0], start[0]), jnp.where(is_first, sunk[1], start[1])


def _log_sum(case: AttentionCase, most: jax.Array, weight: jax.Array) -> Parts:
    """Where devices share the keys: the log [..., 1] of a softmax's sum of weights, relative to `most`.

    A query that saw no key here has -inf or some -1e30, and counts for nothing when the parts are merged.
    """
    return () if case.context == 1 else ((most + jnp.log(weight))[..., None],)


def _starts(counts: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])


def _row_of(starts: jax.Array, items: jax.Array) -> jax.Array:
    """The row in whose range [starts[row], starts[row + 1]) each item falls; rows may be empty."""
    rows = jnp.sum(starts[1:] <= items[..., None], axis=-1, dtype=jnp.int32)
    return jnp.minimum(rows, starts.shape[0] - 2)


def _tiles_at_once(case: AttentionCase, num_rows: int) -> int:
    if case.platform != "cpu":
        return 32
    return 1 if num_rows <= FEW_ROWS else _TILES_AT_ONCE


def write(
    case: AttentionCase, k: jax.Array, v: jax.Array | None, pool: Pool, batch: RaggedBatch, metadata: Metadata
) -> Pool:
    """The part of `run` that puts k and v [T, K, H] into the pool."""
    kv = jnp.concatenate([k] if v is None else [k, v], axis=1)  # [T, kinds * K, H]
    if not isinstance(pool, QuantizedPool):
        return _put(case, kv.astype(pool.dtype), pool, batch, metadata)
    data, scales = quantize(kv, pool.data.dtype.name)
    return QuantizedPool(
        _put(case, data, pool.data, batch, metadata),
        _put(case, scales[..., None], pool.scales, batch, metadata),
    )


def _put(case: AttentionCase, kv: jax.Array, pool: jax.Array, batch: RaggedBatch, metadata: Metadata) -> jax.Array:
    """kv [T, kinds * K, H] into a pool of vectors, or [T, kinds * K, 1] into one of their scales."""
    num_heads, size = kv.shape[1:]
    if case.platform != "cpu":  # by rows of one head: to write a token's heads at once, XLA would turn the pool around
        first = metadata.write_page[:, None] * num_heads * case.page_size
        row = first + jnp.arange(num_heads) * case.page_size + metadata.write_offset[:, None]
        rows = pool.reshape(-1, size).at[row.reshape(-1)].set(kv.reshape(-1, size))
        return rows.reshape(pool.shape)

    def write_token(token: jax.Array, pool: jax.Array) -> jax.Array:
        entry = lax.dynamic_slice_in_dim(kv, token, 1)
        return lax.dynamic_update_slice(
            pool, entry, (metadata.write_page[token], 0, metadata.write_offset[token] * size)
        )

    return lax.fori_loop(0, batch.num_tokens, write_token, pool)


def _shares(case: AttentionCase, num_tokens: int, num_sequences: int) -> bool:
    """Whether to look for keys that rows share: in batches, where the first keys are never forgotten, and in programs
    that serve decodes alone; in others a prompt's chunk is most of the work, and the code would be so much more."""
    return FEW_ROWS < num_tokens <= num_sequences and case.window is None


def _num_shared(
    case: AttentionCase, kv_len: jax.Array, decoding: jax.Array, table: jax.Array, num_tokens: int
) -> jax.Array:
    """How many leading tiles all decoding rows have in the same pages, none of them a row's newest token's."""
    if not _shares(case, num_tokens, table.shape[0]):
        return jnp.zeros((), jnp.int32)
    is_same = jnp.all((table == table[0]) | (decoding[:, None] == 0), axis=0)
    num_pages = jnp.min(jnp.where(is_same, table.shape[1], jnp.arange(table.shape[1])))
    least = jnp.min(num_slots(case, kv_len - 1), where=decoding > 0, initial=jnp.iinfo(jnp.int32).max)
    shared = jnp.minimum(num_pages // pages_per_tile(case), least // tile_size(case))
    return jnp.where(decoding[1] > 0, shared, 0)


def _decode_tiles(
    case: AttentionCase,
    kv_len: jax.Array,
    decoding: jax.Array,
    table: jax.Array,
    num_rows: int,
    num_shared: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cut the decoding rows' own keys into tiles: their number, and the tile arrays of Metadata."""
    width, num_pages, block = table.shape[1], pages_per_tile(case), tile_size(case)
    at_once = _tiles_at_once(case, num_rows)
    first_block = jnp.broadcast_to(num_shared, kv_len.shape)
    if case.window is not None:
        first_block = jnp.maximum(num_slots(case, kv_len - case.window), 0) // block
    num_blocks = -(-num_slots(case, kv_len) // block) - first_block
    if case.context > 1:  # without keys here a row has a tile all the same: rows of neighbouring tiles are neighbours
        num_blocks = jnp.maximum(num_blocks, 1)
    starts = _starts((decoding * num_blocks)[:num_rows])
    total = starts[-1]
    capacity = num_rows * (-(-width // num_pages) + 1)
    capacity = -(-capacity // at_once) * at_once

    def fill(i: jax.Array, tiles: dict[str, jax.Array]) -> dict[str, jax.Array]:
        tile = i * at_once + jnp.arange(at_once)
        used = jnp.minimum(tile, total - 1)
        row = _row_of(starts, used)
        key_block = first_block[row] + used - starts[row]
        columns = (key_block[:, None] * num_pages + jnp.arange(num_pages)) % width
        end = num_slots(case, kv_len[row]) - key_block * block
        first = jnp.zeros_like(end)
        if case.window is not None:
            first = num_slots(case, kv_len[row] - case.window) - key_block * block
        some = {
            "tile_row": row,
            "tile_pages": table[row[:, None], columns],
            "tile_first": first,
            "tile_end": jnp.where(tile < total, end, 0),
        }
        return {name: lax.dynamic_update_slice_in_dim(tiles[name], some[name], i * at_once, 0) for name in tiles}

    tiles = {name: jnp.zeros(capacity, jnp.int32) for name in ("tile_row", "tile_first", "tile_end")}
    tiles["tile_pages"] = jnp.zeros((capacity, num_pages), jnp.int32)
    return total, lax.fori_loop(0, -(-total // at_once), fill, tiles)


def _decode_shared(
    case: AttentionCase,
    q: jax.Array,
    pool: Pool,
    table: jax.Array,
    metadata: Metadata,
    start: tuple[jax.Array, jax.Array],
    shares: bool,
) -> State:
    """q [R, N, H], one query a row, start: max and sum [N] to begin with -> max and sum [R, N] and values [R, N, H] of
    the tiles that the rows share, which all rows' queries walk together."""
    heads = (q.shape[0], case.num_kv_heads, case.group_size)

    def nothing() -> State:
        most, weight = (jnp.broadcast_to(part, q.shape[:2]) for part in start)
        return most, weight, jnp.zeros(q.shape)

    def of_tiles() -> State:
        def by_head(rows: jax.Array) -> jax.Array:  # [R, N, ...] -> [1, K, R * G, ...]
            rows = rows.reshape(*heads, *rows.shape[2:]).swapaxes(0, 1)
            return rows.reshape(1, heads[1], heads[0] * heads[2], *rows.shape[3:])

        def by_row(state: jax.Array) -> jax.Array:  # and back
            state = state.reshape(heads[1], heads[0], heads[2], *state.shape[3:]).swapaxes(0, 1)
            return state.reshape(*q.shape[:2], *state.shape[3:])

        most, weight, mixed = map(by_head, nothing())
        most, weight, mixed = walk(
            case,
            by_head(q),
            pool,
            lambda columns: table[0, columns],
            lambda slot: jnp.ones((1, slot.shape[0]), bool),
            (0, metadata.num_shared),
            (most, weight, mixed),
            as_vectors=False,
        )
        return by_row(most), by_row(weight), by_row(mixed)

    return lax.cond(metadata.num_shared > 0, of_tiles, nothing) if shares else nothing()


def _decode(case: AttentionCase, q: jax.Array, pool: Pool, metadata: Metadata, state: State, vectors: bool) -> Parts:
    """q [R, N, H], one query a row, state: what they make of the keys they share -> [R, N, H] and [R, N, 1] float32."""
    num_rows, num_heads, head_dim = q.shape
    at_once = _tiles_at_once(case, num_rows)
    touched = min(at_once, num_rows)  # so many neighbouring rows at most that the tiles of one step belong to
    grouped = q.reshape(num_rows, case.num_kv_heads, case.group_size, head_dim)
    slot = jnp.arange(tile_size(case))

    def step(i: jax.Array, state: State) -> State:
        row, pages, first, end = (
            lax.dynamic_slice_in_dim(part, i * at_once, at_once)
            for part in (metadata.tile_row, metadata.tile_pages, metadata.tile_first, metadata.tile_end)
        )
        if at_once > 1:
            row = unhoisted(case, row)
        seen = (slot >= first[:, None]) & (slot < end[:, None])
        keys, values, scales = keys_and_values(case, pool, pages)
        logits = logits_of(case, grouped[row], keys, scales, seen[:, None], vectors)
        tile_max = logits.max(-1)
        weights = jnp.exp(logits - tile_max[..., None])
        tile_sum = weights.sum(-1).reshape(at_once, num_heads)
        mixed = mix(weights, values, scales, vectors)
        mixed, tile_max = mixed.reshape(at_once, num_heads, head_dim), tile_max.reshape(at_once, num_heads)

        first_row = jnp.minimum(row[0], num_rows - touched)
        belongs = (row - first_row)[:, None] == jnp.arange(touched)  # a tile not in use is masked to a share of 0
        old_max, old_sum, old_mixed = (lax.dynamic_slice_in_dim(part, first_row, touched) for part in state)
        new_max = jnp.maximum(old_max, jnp.where(belongs[..., None], tile_max[:, None], MASKED).max(0))
        share = jnp.exp(tile_max[:, None] - new_max)
        keep = jnp.exp(old_max - new_max)
        # Chosen, not multiplied by 0: a NaN of one row's tile must not reach the other rows.
        own_sum = jnp.where(belongs[..., None], share * tile_sum[:, None], 0)
        own_mixed = jnp.where(belongs[..., None, None], share[..., None] * mixed[:, None], 0)
        new_sum = old_sum * keep + own_sum.sum(0)
        new_mixed = old_mixed * keep[..., None] + own_mixed.sum(0)
        return (
            lax.dynamic_update_slice_in_dim(state[0], new_max, first_row, 0),
            lax.dynamic_update_slice_in_dim(state[1], new_sum, first_row, 0),
            lax.dynamic_update_slice_in_dim(state[2], new_mixed, first_row, 0),
        )

    most, weight, mixed = lax.fori_loop(0, -(-metadata.num_tiles // at_once), step, state)
    return mixed / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)[..., None], *_log_sum(case, most, weight)


def _prefill(
    case: AttentionCase,
    q: jax.Array,
    pool: Pool,
    table: jax.Array,
    batch: RaggedBatch,
    metadata: Metadata,
    start: tuple[jax.Array, jax.Array],
) -> Parts:
    """q [T, N, H], start as in `_decode` -> as there, the rows of more than one query filled in."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, group_size = case.num_kv_heads, case.group_size
    block, num_queries = tile_size(case), min(_PREFILL_QUERIES, num_tokens)
    heads = (1, num_kv_heads, group_size * num_queries)
    vectors = by_vectors(case, group_size * num_queries, num_tokens, num_tokens)

    def tile(i: jax.Array, out: Parts) -> Parts:
        row = _row_of(metadata.prefill_tiles, i)
        end, length = batch.query_start[row + 1], batch.kv_len[row]
        own_first = batch.query_start[row] + (i - metadata.prefill_tiles[row]) * num_queries
        own_end = jnp.minimum(own_first + num_queries, end)
        first = jnp.minimum(own_first, num_tokens - num_queries)  # the last tile may begin in another row's tokens
        token = first + jnp.arange(num_queries)
        position = length - end + token
        oldest = jnp.zeros((), jnp.int32)
        if case.window is not None:
            oldest = jnp.maximum(newest_slot(case, length - end + own_first - case.window) + 1, 0)
        queries = lax.dynamic_slice_in_dim(q, first, num_queries)
        queries = queries.reshape(num_queries, num_kv_heads, group_size, head_dim).transpose(1, 2, 0, 3)
        queries = queries.reshape(1, num_kv_heads, group_size * num_queries, head_dim)

        def sees(slot: jax.Array) -> jax.Array:
            seen = slot <= newest_slot(case, position)[:, None]
            if case.window is not None:
                seen &= slot > newest_slot(case, position - case.window)[:, None]
            return jnp.tile(seen, (group_size, 1))

        newest = newest_slot(case, length - end + own_end - 1)
        most, weight = (jnp.repeat(part, num_queries).reshape(heads) for part in start)
        most, weight, mixed = walk(
            case,
            queries,
            pool,
            lambda columns: table[row, columns % table.shape[1]],
            sees,
            (oldest // block, newest // block + 1),
            (most, weight, jnp.zeros((*heads, head_dim))),
            vectors,
        )
        own = ((token >= own_first) & (token < own_end))[:, None, None]

        def put(out: jax.Array, part: jax.Array) -> jax.Array:
            part = part.reshape(num_kv_heads, group_size, num_queries, -1)
            part = part.transpose(2, 0, 1, 3).reshape(num_queries, num_heads, -1)
            part = jnp.where(own, part, lax.dynamic_slice_in_dim(out, first, num_queries))
            return lax.dynamic_update_slice_in_dim(out, part, first, 0)

        return tuple(map(put, out, (mixed / weight[..., None], *_log_sum(case, most, weight))))

    out = (jnp.zeros(q.shape), *_log_sum(case, jnp.zeros(q.shape[:2]), jnp.zeros(q.shape[:2])))
    return lax.fori_loop(0, metadata.prefill_tiles[-1], tile, out)
