"""The engine's step as pure functions over a cache that the caller holds: `prefill` and `decode` for one's own `jit`.

There is no scheduler: every sequence owns the pages of its longest length (of a window's length, where a layer has a
window), and a batch is made on the device, from arrays. What runs over it is runner/step.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.cache.pool import Pools, abstract_pools
from jaxinfer.config import parse_kv_cache_dtype
from jaxinfer.models.model import Model, Params
from jaxinfer.plan import Plan, default_page_size, resolve_fixed
from jaxinfer.runner import step
from jaxinfer.runner.batch import BatchLayout
from jaxinfer.runner.segments import Segment, attention_kinds
from jaxinfer.sharding.rules import param_shardings
from jaxinfer.sharding.spmd import PER_DEVICE, PER_SHARD, SHARDS, each_device, num_shards


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of S sequences, and how many tokens each has: a pytree of arrays.

    pools    one per layer that keeps keys and values, an array or a QuantizedPool: pages, cut over all devices
    lengths  int32 [S]; it may be lowered, to begin anew (0) or to forget the newest tokens (max_prefill_len at most)

    The rest is static; see LoadedModel.make_cache.
    """

    pools: Pools
    lengths: jax.Array
    max_len: int = field(metadata={"static": True})
    max_prefill_len: int = field(metadata={"static": True})
    page_size: int = field(metadata={"static": True})
    kv_dtype: str | None = field(metadata={"static": True})
    attention_backend: str | None = field(metadata={"static": True})


def make_cache(
    model: Model,
    mesh: Mesh,
    num_sequences: int,
    max_len: int,
    *,
    max_prefill_len: int | None,
    page_size: int | None,
    kv_cache_dtype: str,
    attention_backend: str | None,
) -> KVCache:
    """An empty cache on the mesh; LoadedModel.make_cache says what it is asked for."""
    kv_dtype = parse_kv_cache_dtype(kv_cache_dtype)
    page_size = default_page_size(kv_dtype) if page_size is None else page_size
    max_prefill_len = max_len if max_prefill_len is None else max_prefill_len
    sizes = {
        "num_sequences": num_sequences,
        "max_len": max_len,
        "max_prefill_len": max_prefill_len,
        "page_size": page_size,
    }
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
    shards = num_shards(mesh)
    if num_sequences % shards:
        raise ValueError(
            f"num_sequences={num_sequences} is not a multiple of the {shards} shards of mesh {dict(mesh.shape)} "
            f"(data x fsdp x expert); use {-(-num_sequences // shards) * shards}"
        )
    lengths: Any = jax.ShapeDtypeStruct((num_sequences,), jnp.int32)
    empty = KVCache((), lengths, max_len, min(max_prefill_len, max_len), page_size, kv_dtype, attention_backend)
    pools = abstract_pools(_plan(model, mesh, empty), NamedSharding(mesh, PER_DEVICE))
    abstract = replace(empty, pools=pools)

    def zeros() -> KVCache:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)

    return jax.jit(zeros, out_shardings=cache_shardings(mesh, abstract))()


def cache_shardings(mesh: Mesh, cache: KVCache) -> KVCache:
    """The NamedSharding of every array of the cache, in its structure."""
    pages, per_sequence = NamedSharding(mesh, PER_DEVICE), NamedSharding(mesh, PER_SHARD)
    return replace(cache, pools=jax.tree.map(lambda _: pages, cache.pools), lengths=per_sequence)


def extend(
    model: Model, mesh: Mesh, params: Params, cache: KVCache, tokens: jax.Array, counts: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Give every sequence its next tokens: the logits after its last one, and the cache with them in it.

    tokens int32 [S, T], of which the first counts[s] (int32 [S]) are of sequence s. A sequence that is given none, or
    more than T or than max_len leaves room for, stays as it was, and its logits are NaN. Returns logits float32 [S, V].
    """
    _check(cache, tokens, counts)
    return _extend(model, mesh, params, cache, tokens, counts)


def _check(cache: KVCache, tokens: jax.Array, counts: jax.Array) -> None:
    num_sequences = cache.lengths.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != num_sequences or not tokens.shape[1]:
        raise ValueError(f"tokens has shape {tokens.shape}; give [{num_sequences}, T], a row for each sequence")
    if counts.shape != (num_sequences,):
        raise ValueError(f"lengths has shape {counts.shape}; give [{num_sequences}], a number for each sequence")
    for name, array in (("tokens", tokens), ("lengths", counts)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {array.dtype}; give integers")
    if tokens.shape[1] > cache.max_prefill_len:
        raise ValueError(
            f"tokens has {tokens.shape[1]} tokens for each sequence, and the cache is made for {cache.max_prefill_len} "
            "at once; give them in several calls, or make the cache with a larger max_prefill_len"
        )


def _plan(model: Model, mesh: Mesh, cache: KVCache) -> Plan:
    return resolve_fixed(
        model.config,
        model.dtype,
        mesh,
        max_num_seqs=cache.lengths.shape[0] // num_shards(mesh),
        max_model_len=cache.max_len,
        max_chunk=cache.max_prefill_len,
        page_size=cache.page_size,
        kv_dtype=cache.kv_dtype,
        attention_backend=cache.attention_backend,
    )


@partial(jax.jit, static_argnums=(0, 1))  # traced once for all calls inside the caller's own program
def _extend(
    model: Model, mesh: Mesh, params: Params, cache: KVCache, tokens: jax.Array, counts: jax.Array
) -> tuple[jax.Array, KVCache]:
    plan = _plan(model, mesh, cache)
    is_taken = (counts > 0) & (counts <= tokens.shape[1]) & (counts <= cache.max_len - cache.lengths)
    counts = jnp.where(is_taken, counts, 0).astype(jnp.int32)

    def by_shard(array: jax.Array) -> jax.Array:
        return array.reshape(plan.num_shards, -1, *array.shape[1:])

    cuts = jax.tree.map(
        lambda sharding: sharding.spec, param_shardings(model.abstract_params, model.logical_axes, mesh)
    )
    head = cuts["embed" if model.config.tie_embeddings else "lm_head"]["weight"][:1]
    run = each_device(
        partial(_on_device, model, plan, cuts),
        mesh,
        (cuts, PER_DEVICE, PER_SHARD, PER_SHARD, PER_SHARD),
        (PartitionSpec(SHARDS, None, *head), PER_DEVICE),
    )
    logits, pools = run(params, cache.pools, *map(by_shard, (cache.lengths, tokens.astype(jnp.int32), counts)))
    logits = jnp.where(is_taken[:, None], logits.reshape(-1, logits.shape[-1]), jnp.nan)
    lengths = jax.lax.with_sharding_constraint(cache.lengths + counts, NamedSharding(mesh, PER_SHARD))
    logits = jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, PartitionSpec(SHARDS, *head)))
    return logits, replace(cache, pools=pools, lengths=lengths)


def _on_device(
    model: Model,
    plan: Plan,
    cuts: Params,
    params: Params,
    pools: Pools,
    cached: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, Pools]:
    """One device's part, all layers in one program: logits float32 [S, this device's part of V], and its pools."""
    context = plan.mesh.shape["context"]
    num_tokens = -(-tokens.size // context) * context  # every device has the same number of rows
    layout = BatchLayout(num_tokens, tokens.shape[0], plan.table_widths)
    buffer = pack(layout, cached, tokens, counts)
    (ends, layers), (ends_cuts, layers_cuts) = _ends_and_layers(params), _ends_and_layers(cuts)
    slots = jnp.zeros(1, jnp.int32)  # all tokens are in the batch; none is taken from a slot
    stream, prepared = step.begin(model, plan, layout, ends_cuts, ends, slots, buffer)
    kinds = tuple(range(len(attention_kinds(plan))))
    whole = Segment(tuple(range(len(layers))), tuple(range(len(pools))), kinds, function=None)
    x, pools, _ = step.run_layers(
        model, plan, layout, whole, layers_cuts, layers, stream.x, pools,
        stream.rotations, stream.per_layer, prepared, None, buffer,
    )  # fmt: skip
    _, hidden = step.end(model, layout, ends_cuts, ends, x, buffer)
    return step.logits(model, layout.num_sequences, ends_cuts, ends, hidden), pools


def _ends_and_layers(params: Params) -> tuple[Params, tuple[Any, ...]]:
    ends = {name: value for name, value in params.items() if name != "layers"}
    return ends, tuple(params["layers"][str(index)] for index in range(len(params["layers"])))


def pack(layout: BatchLayout, cached: jax.Array, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """The next counts[s] tokens of sequences that have cached[s]: the flat buffer of batch.pack, made on the device.

    tokens [S, T], counts and cached [S], all int32. Sequences of one token come first, those of none last.
    """
    num_sequences, width = tokens.shape
    rank = jnp.where(counts == 1, 0, jnp.where(counts > 1, 1, 2))
    order = jnp.argsort(rank, stable=True).astype(jnp.int32)  # of each row of the batch, its sequence
    row_counts = counts[order]
    stop = jnp.cumsum(row_counts, dtype=jnp.int32)
    start = stop - row_counts

    token = jnp.arange(layout.num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(stop, token, side="right").astype(jnp.int32)  # S where the token is padding
    is_real = row < num_sequences
    sequence = order[jnp.minimum(row, num_sequences - 1)]
    offset = token - start[jnp.minimum(row, num_sequences - 1)]
    fields = {
        "tokens": jnp.where(is_real, tokens[sequence, jnp.minimum(offset, width - 1)], 0),
        "token_slots": jnp.full(layout.num_tokens, -1, jnp.int32),
        "positions": jnp.where(is_real, cached[sequence] + offset, 0),
        "sequence_ids": row,
        "query_start": jnp.concatenate([jnp.zeros(1, jnp.int32), stop]),
        "kv_len": jnp.where(row_counts > 0, cached[order] + row_counts, 0),
        "logits_tokens": jnp.zeros_like(order).at[order].set(jnp.maximum(stop - 1, 0)),  # in the caller's order
        "num_tokens": stop[-1],
        "num_sequences": jnp.sum(counts > 0, dtype=jnp.int32),
    }
    for group, pages in enumerate(layout.table_widths):
        fields[f"page_table_{group}"] = 1 + order[:, None] * pages + jnp.arange(pages, dtype=jnp.int32)
    return jnp.concatenate([jnp.ravel(fields[name]) for name in layout.shapes])
