"""Attention whose keys the devices of the mesh's axis `context` share: what travels between them, by its cost.

Every device has its own rows of a step and its own keys. Either the queries travel (pass-Q of arXiv:2411.01783): every
device attends from all rows to the keys that it has, and the parts are merged by their log-sum-exp. Or the keys do:
every device gets all that the step's rows see, and attends from its own rows alone. A step's own keys and values travel
in both, to whoever keeps them.

The former moves as much for any number of cached tokens, the latter grows with them; a step takes the cheaper form,
kind of layer by kind of layer. Keys that travel need no more memory than the queries and sums would, since then they
are not cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.ops.paged_attention_case import AttentionCase, RaggedBatch
from jaxinfer.sharding.spmd import CONTEXT, all_parts, by_device, most_of_shards, own_part, own_pieces
from pallas_kernels.merge_attention.reference import merge_own_rows

if TYPE_CHECKING:
    from jaxinfer.ops.paged_attention import Backend


class Part(NamedTuple):
    """A RaggedBatch of one device's own rows. A sequence is there once for each of the device's pieces."""

    positions: jax.Array
    sequence_ids: jax.Array
    query_start: jax.Array
    kv_len: jax.Array
    page_tables: tuple[jax.Array, ...]
    num_tokens: jax.Array
    num_sequences: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TravelingKeys:
    """How keys travel in a step. is_cheaper bool []: whether they do. pages int32 [rounds, pages]: those whose keys the
    step's rows see, in rounds of as many as travel together; num_rounds int32 []: how many of these are needed. part:
    this device's rows, with page tables that number the pages. metadata: of the backend, for them."""

    is_cheaper: jax.Array
    pages: jax.Array
    num_rounds: jax.Array
    part: Part
    metadata: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """metadata: of the backend, for all rows and this device's keys. keys: None where they never travel."""

    metadata: Any
    keys: TravelingKeys | None


def query_bytes(case: AttentionCase, num_tokens: int) -> float:
    """What a device receives in a layer where queries travel: they, and float32 sums of what all devices mixed."""
    width = case.head_dim * np.dtype(case.dtype).itemsize + 4 * (case.latent_dim or case.head_dim)
    return num_tokens * case.num_heads * width * (case.context - 1) / case.context


def key_bytes(case: AttentionCase) -> float:
    """What a device receives in a layer for each key, and its value, that travels."""
    kinds = 2 if case.latent_dim is None else 1
    vector = case.head_dim * jnp.dtype(case.kv_dtype or case.dtype).itemsize + (0 if case.kv_dtype is None else 4)
    return kinds * case.num_kv_heads * vector * (case.context - 1) / case.context


def rounds(backend: Backend, case: AttentionCase, num_tokens: int, num_sequences: int) -> tuple[int, int]:
    """In how many rounds keys travel at most, in a step of num_tokens, and of how many pages of all devices: beyond
    that queries are cheaper. No rounds: they always are.

    A round is as many keys as the step has tokens. A step that has no more tokens than rows is made of decodes, which
    have too few queries.
    """
    if backend.write is None or num_tokens <= num_sequences:
        return 0, 0
    tokens_per_page = case.page_size * case.context
    num_pages = max(1, num_tokens // tokens_per_page)
    return int(query_bytes(case, num_tokens) / (key_bytes(case) * tokens_per_page * num_pages)), num_pages


def describe(backend: Backend, case: AttentionCase, num_tokens: int, num_sequences: int) -> str:
    """What travels in a step of num_tokens, and why, in a line."""
    most_rounds, num_pages = rounds(backend, case, num_tokens, num_sequences)
    queries, key = query_bytes(case, num_tokens) / 2**20, key_bytes(case) / 2**10
    limit = most_rounds * num_pages * case.page_size * case.context
    told = f"in a step of {num_tokens} tokens queries travel, {queries:.3g} MiB a layer; "
    if not limit:
        return told + f"keys, {key:.3g} KiB each, never do"
    return told + f"where it sees no more than {limit} keys they do, {key:.3g} KiB each"


def prepare(backend: Backend, case: AttentionCase, batch: RaggedBatch, group: int) -> Prepared:
    """See paged_attention.prepare."""
    table = batch.page_tables[group]
    most_rounds, num_pages = rounds(backend, case, batch.positions.shape[0], table.shape[0])
    keys = None
    if most_rounds:
        keys = _prepare_keys(backend, case, batch, table, min(most_rounds, -(-table.size // num_pages)), num_pages)
    return Prepared(backend.prepare(case, batch, group), keys)


def _prepare_keys(
    backend: Backend, case: AttentionCase, batch: RaggedBatch, table: jax.Array, most_rounds: int, num_pages: int
) -> TravelingKeys:
    most, width, query_len = most_rounds * num_pages, table.shape[1], jnp.diff(batch.query_start)
    first = jnp.zeros_like(batch.kv_len)  # by row, the oldest page that is seen
    if case.window is not None:
        first = jnp.maximum(batch.kv_len - query_len + 1 - case.window, 0) // _whole(case).page_size
    count = jnp.where(query_len > 0, -(-batch.kv_len // _whole(case).page_size) - first, 0)
    stop = jnp.cumsum(count, dtype=jnp.int32)
    start = stop - count

    number = jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(stop, number, side="right"), table.shape[0] - 1)
    pages = table[row, (first[row] + number - start[row]) % width]
    column = jnp.arange(width, dtype=jnp.int32)
    renumbered = jnp.minimum(start[:, None] + (column - first[:, None]) % width, most - 1)
    part = _own_rows(batch, renumbered)
    needed = most_of_shards(stop[-1])  # all shards take the same branch, and as many rounds
    return TravelingKeys(
        is_cheaper=needed <= most,
        pages=pages.reshape(most_rounds, num_pages),
        num_rounds=-(-needed // num_pages),
        part=part,
        metadata=backend.prepare(_whole(case), part, 0),
    )


def _whole(case: AttentionCase) -> AttentionCase:
    """The case of keys that have travelled: a page of all devices, whose slots are in the order of positions."""
    return replace(case, context=1, page_size=case.page_size * case.context)


def _own_rows(batch: RaggedBatch, table: jax.Array) -> Part:
    """This device's rows, as a batch."""
    starts, length = own_pieces(batch.positions.shape[0])
    begin, end = (
        jnp.clip(side - starts[:, None], 0, length) for side in (batch.query_start[:-1], batch.query_start[1:])
    )
    later = batch.query_start[1:] - (starts[:, None] + end)  # tokens of a row that come after a piece
    stop = jnp.cumsum((end - begin).reshape(-1), dtype=jnp.int32)
    return Part(
        positions=own_part(batch.positions),
        sequence_ids=own_part(batch.sequence_ids),
        query_start=jnp.concatenate([jnp.zeros(1, jnp.int32), stop]),
        kv_len=jnp.where(end > begin, batch.kv_len - later, 0).reshape(-1),
        page_tables=(jnp.tile(table, (len(starts), 1)),),
        num_tokens=stop[-1],
        num_sequences=batch.num_sequences,
    )


def run(
    backend: Backend,
    case: AttentionCase,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Any,
    batch: RaggedBatch,
    group: int,
    prepared: Prepared,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """See paged_attention.attend."""
    k, v = jax.tree.map(all_parts, (k, v))

    def send_queries(q: jax.Array, pool: Any, k: jax.Array | None, v: jax.Array | None) -> tuple[jax.Array, Any]:
        (mixed, lse), pool = backend.run(case, all_parts(q), k, v, pool, batch, group, prepared.metadata, sinks)
        out, _ = merge_own_rows(by_device(mixed, case.context), by_device(lse, case.context), CONTEXT)
        return out.astype(q.dtype), pool

    keys = prepared.keys
    if keys is None:
        return send_queries(q, pool, k, v)
    if k is not None:
        assert backend.write is not None
        pool = backend.write(case, k, v, pool, batch, prepared.metadata)

    def send_keys(q: jax.Array, pool: Any) -> jax.Array:
        seen = _sent_to_all(backend, case, pool, keys)
        return backend.run(_whole(case), q, None, None, seen, keys.part, 0, keys.metadata, sinks)[0]

    return lax.cond(keys.is_cheaper, send_keys, lambda q, pool: send_queries(q, pool, None, None)[0], q, pool), pool


def _sent_to_all(backend: Backend, case: AttentionCase, pool: Any, keys: TravelingKeys) -> Any:
    """A pool of the pages that are seen, each with the slots of all devices, in the order of positions."""
    num_pages = keys.pages.shape[1]
    wanted = backend.abstract_pool(_whole(case), keys.pages.size)

    def travel(number: jax.Array, seen: Any) -> Any:
        def of(leaf: jax.Array, seen: jax.Array) -> jax.Array:
            page = seen.shape[1:]
            slot_axis = next(axis for axis, size in enumerate(page, 1) if size != leaf.shape[axis])
            sent = leaf[keys.pages[number]]
            slots = sent.reshape(*sent.shape[:slot_axis], case.page_size, -1, *sent.shape[slot_axis + 1 :])
            whole = lax.all_gather(slots, CONTEXT, axis=slot_axis + 1)
            return lax.dynamic_update_slice_in_dim(seen, whole.reshape(num_pages, *page), number * num_pages, 0)

        return jax.tree.map(of, pool, seen)

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted)
    return lax.fori_loop(0, keys.num_rounds, travel, nothing)
