"""Ragged paged attention for TPUs (Mosaic): writes a step's keys and values into their pages and attends, in one call.

The kernel is one program without a grid. It walks the rows of the batch in order; a row of one query (a decode) is one
tile of work, a longer one (a chunk of a prompt) is cut into tiles of queries. A tile walks the blocks of pages that its
queries can see with a running softmax (FlashAttention, arXiv:2205.14135), in float32. What moves through memory:

- Blocks are copied page by page into a ring of buffers. A cursor of its own runs ahead of the work, across tiles and
  rows, so that copies are always under way, in short sequences too. Only pages that hold visible keys are copied, and
  a padding row costs nothing, since the cursors step from one row with tokens to the next.
- The key and value of a decode are put into the last block, which is in scratch memory anyway, and the rows of a tile
  around them are copied back while attention goes on. Those of chunks are written before attention begins, tile by
  tile, several under way; only the first and the last tile of a chunk are read first.
- Queries, outputs and new keys keep the model's order [tokens, heads, lanes], in which any range of tokens can be
  copied; the kernel sorts them by head with strided loads of 32-bit rows.

Where the devices of a mesh share the keys of a sequence, one by one (striped attention, arXiv:2311.09431), each runs
the kernel over the keys it has, writes those of this step's that are its own, and gives its part of the softmax.

Of a quantized pool (quantized.py) blocks in scratch memory have 8 bits a number, and a head's part of one is widened as
it goes to the matrix unit. A page's scales are copied with it; once a block they are sorted by head into rows of keys,
which logits and weights are multiplied with.

Page tables are in scalar memory. Where a batch's tables do not fit there, the rows are served in groups, by one call
each, which pass pool and output on in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.arguments import check
from pallas_kernels.paged_attention.quantized import QuantizedPool, quantize
from pallas_kernels.paged_attention.tpu_kernel import MASKED, Kernel
from pallas_kernels.paged_attention.tpu_layout import (
    LANES,
    PIECE,
    PIECES,
    Blocks,
    Case,
    Layout,
    choose_blocks,
    pool_shape,
    round_up,
    scales_shape,
    supports,
)

__all__ = ["Pool", "Rows", "chip_name", "paged_attention", "pool_shape", "prepare", "scales_shape", "supports"]

Pool = jax.Array | QuantizedPool

TABLE_BYTES = 512 * 1024  # of scalar memory (1 MiB) for the page tables of one call


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Some rows of the batch, as the scalar unit reads them. All int32; R rows, P pages each.

    table [R * P]           page tables, flat, so that scalar memory is not padded
    query_start [R + 2]     first token of each row
    kv_len [R + 1]          tokens of each sequence once this step's are written
    next_row [R + 1]        the first row with tokens at or after each; R where there is none
    next_chunk [R + 1]      the same for rows of more than one token, with some to write
    place []                which of the devices that share the keys this one is; None where they do not
    """

    table: jax.Array
    query_start: jax.Array
    kv_len: jax.Array
    next_row: jax.Array
    next_chunk: jax.Array
    place: jax.Array | None = None


def prepare(
    page_table: jax.Array,
    query_start: jax.Array,
    kv_len: jax.Array,
    *,
    context: int = 1,
    place: jax.Array | None = None,
) -> tuple[Rows, ...]:
    """What the kernel reads of a batch, the same for all layers: page_table [S, P], query_start [S + 1], kv_len [S].

    context: so many devices share the keys of a sequence; this one, at `place`, has those of positions place,
    place + context, ... in its slots 0, 1, ...
    """
    num_rows, width = page_table.shape
    if query_start.shape != (num_rows + 1,) or kv_len.shape != (num_rows,):
        raise ValueError(
            f"query_start {query_start.shape} and kv_len {kv_len.shape} do not fit page_table {page_table.shape}; "
            f"give {(num_rows + 1,)} and {(num_rows,)}"
        )
    per_call = TABLE_BYTES // (4 * width)
    if per_call == 0:
        raise ValueError(
            f"a page table of {width} pages is {4 * width} bytes, more than the {TABLE_BYTES} of scalar memory for it; "
            "use a larger page_size or a smaller max_model_len"
        )
    groups = []
    for first in range(0, num_rows, per_call):
        count = min(per_call, num_rows - first)
        starts = lax.slice_in_dim(query_start, first, first + count + 1)
        lengths, ends = jnp.diff(starts), kv_len[first : first + count]
        written = lengths if place is None else _slots(ends, context, place) - _slots(ends - lengths, context, place)
        groups.append(
            Rows(
                table=page_table[first : first + count].reshape(-1),
                query_start=jnp.concatenate([starts, starts[-1:]]),
                kv_len=jnp.concatenate([ends, jnp.zeros(1, jnp.int32)]),
                next_row=_next(lengths > 0),
                next_chunk=_next((lengths > 1) & (written > 0)),
                place=place,
            )
        )
    return tuple(groups)


def _slots(length: jax.Array, context: int, place: jax.Array) -> jax.Array:
    """How many of a sequence's first keys this device has."""
    return (length + (context - 1) - place) // context


def _next(wanted: jax.Array) -> jax.Array:
    """For each index and one past the last, the first wanted index at or after it; the count where there is none."""
    count = wanted.shape[0]
    index = jnp.where(wanted, jnp.arange(count, dtype=jnp.int32), count)
    return jnp.concatenate([lax.cummin(index, reverse=True), jnp.full(1, count, jnp.int32)])


def chip_name() -> str:
    """The TPU that is compiled for, as its tuned table is called; "default" where that is no TPU (interpret mode)."""
    return str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else "default"


def paged_attention(
    case: Case,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Pool,
    rows: tuple[Rows, ...],
    num_tokens: jax.Array,
    sinks: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[Any, Pool]:
    """Write k and v into their pages, then let every query see its sequence's keys up to its own position.

    q [T, N, H]; k and v [T, K, H], or None when the pool holds this step's keys and values already; v is None in a case
    with a latent_dim, whose keys begin with their values.
    pool: of `pool_shape` (quantized: and `scales_shape`), updated in place where the caller donated it. rows: of
    `prepare`.
    num_tokens int32 []: real tokens; sinks [N] when the case has them.
    blocks: other sizes than the chip's table gives. interpret: as of `pallas_call`.
    Returns ([T, N, H or latent_dim] in q's dtype, zero for padding tokens; the pool). Of a case whose keys several
    devices share the first is this device's part: what its keys mix, float32, and the log of their sum of exponentials,
    float32 [T, N]; 0 and -inf for a query that saw no key here. The sinks are of place 0.
    """
    layout, place = Layout.of(case), rows[0].place
    tables = (group.table for group in rows)
    check("TPU", supports, pool_shape, scales_shape, case, q, k, v, pool, sinks, tables)
    if (case.context > 1) != (place is not None):
        raise ValueError(f"context={case.context}, but rows with place={place}; prepare them for the same context")
    table_width = rows[0].table.shape[0] // (rows[0].query_start.shape[0] - 2)
    blocks = blocks or choose_blocks(case, q.shape[0], table_width, chip_name())
    padding = ((0, 0), (0, layout.heads - case.num_heads), (0, layout.key_lanes - case.head_dim))
    queries = jnp.pad(q.astype(case.dtype), padding)
    new = None
    if k is not None:
        new = _as_written(case, layout, k, v)
    sink_rows = None
    if sinks is not None:
        if place is not None:
            sinks = jnp.where(place == 0, sinks, MASKED)
        sink_rows = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (case.num_heads, LANES))
        sink_rows = jnp.pad(sink_rows, ((0, layout.heads - case.num_heads), (0, 0)))
    out = None
    for group in rows:
        last = group is rows[-1]
        out, pool = _call(case, blocks, queries, new, pool, out, group, num_tokens, sink_rows, last, interpret)
    assert out is not None
    first, size = layout.value_start - layout.value_first, case.latent_dim or case.head_dim
    mixed = out[:, : case.num_heads, first : first + size]
    if case.context > 1:
        return (mixed, out[:, : case.num_heads, layout.value_lanes]), pool
    return mixed.astype(q.dtype), pool


def _as_written(case: Case, layout: Layout, k: jax.Array, v: jax.Array | None) -> tuple[jax.Array, ...]:
    """k and v [T, K, H], or k alone -> as in a page [T, padded K, W]; of a quantized pool the numbers it is to hold,
    in the case's dtype, which has them all, and scales [T, R, 128], each as often as a tile has tokens."""
    kinds = [k] if v is None else [k, v]
    scales = ()
    if case.kv_dtype is not None:
        kinds, parts = zip(*(quantize(kind, case.kv_dtype) for kind in kinds), strict=True)
        by_head = jnp.stack(parts, axis=-1).reshape(k.shape[0], -1)  # [T, K * kinds]
        by_head = jnp.pad(by_head, ((0, 0), (0, PIECES * layout.scale_rows - by_head.shape[1])))
        scales = (jnp.repeat(by_head, PIECE, axis=1).reshape(-1, layout.scale_rows, LANES),)
    k, *values = (kind.astype(case.dtype) for kind in kinds)
    return _side_by_side(case, layout, k, values[0] if values else None), *scales


def _side_by_side(case: Case, layout: Layout, k: jax.Array, v: jax.Array | None) -> jax.Array:
    """k and v [T, K, H], or k alone -> [T, padded K, W], as in a page."""
    head_dim, heads = case.head_dim, (0, layout.kv_heads - case.num_kv_heads)
    if v is None:
        return jnp.pad(k, ((0, 0), heads, (0, layout.width - head_dim)))
    k = jnp.pad(k, ((0, 0), heads, (0, layout.value_start - head_dim)))
    v = jnp.pad(v, ((0, 0), heads, (0, layout.width - layout.value_start - head_dim)))
    return jnp.concatenate([k, v], axis=-1)


def _call(
    case: Case,
    blocks: Blocks,
    queries: jax.Array,
    new: tuple[jax.Array, ...] | None,
    pool: Pool,
    out: jax.Array | None,
    rows: Rows,
    num_tokens: jax.Array,
    sinks: jax.Array | None,
    fills: bool,
    interpret: Any,
) -> tuple[jax.Array, Pool]:
    """One pallas_call, for some rows. out: of the calls before; fills: zero the padding tokens."""
    layout = Layout.of(case)
    numbers = jnp.stack([num_tokens] if rows.place is None else [num_tokens, rows.place])
    scalars = (rows.table, rows.query_start, rows.kv_len, rows.next_row, rows.next_chunk, numbers)
    in_memory = pl.BlockSpec(memory_space=pl.ANY)
    held = [pool.data, pool.scales] if isinstance(pool, QuantizedPool) else [pool]
    arrays: dict[str, jax.Array] = {"queries": queries}
    arrays |= zip(("pool_in", "scales_in"), held, strict=False)
    arrays |= zip(("new", "new_scales"), new or (), strict=False)
    if out is not None:
        arrays["out_in"] = out
    if sinks is not None:
        arrays["sinks"] = sinks
    names = tuple(arrays)
    aliases = {len(scalars) + names.index("pool_in") + index: 1 + index for index in range(len(held))}
    if out is not None:
        aliases[len(scalars) + names.index("out_in")] = 0
    scratch = _scratch(case, layout, blocks, writes=new is not None)
    # Scales are so few that XLA would bring them all to scratch memory before the call, and back after it.
    pool_array = pltpu.HBM if layout.kinds else jax.ShapeDtypeStruct
    out_shape = (queries.shape[0], layout.heads, layout.out_lanes)

    def kernel(*refs: Any) -> None:
        scalar_refs, refs = refs[: len(scalars)], refs[len(scalars) :]
        inputs, refs = refs[: len(names)], refs[len(names) :]
        (out_ref, *held_refs), buffers = refs[: 1 + len(held)], refs[1 + len(held) :]
        named = dict(zip(names, inputs, strict=True)) | dict(zip(scratch, buffers, strict=True))
        Kernel(case, layout, blocks, queries.shape[0], scalar_refs, out_ref, held_refs, named, fills).run()

    result, *held = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM) if n == "sinks" else in_memory for n in names],
            out_specs=[in_memory] * (1 + len(held)),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            jax.ShapeDtypeStruct(out_shape, _out_dtype(case)),
            *(pool_array(array.shape, array.dtype) for array in held),
        ],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=blocks.vmem_limit_bytes),
        cost_estimate=_cost(case, layout, queries, new, held, rows),
        interpret=interpret,
        name="paged_attention",
    )(*scalars, *arrays.values())
    return result, QuantizedPool(*held) if isinstance(pool, QuantizedPool) else held[0]


def _scratch(case: Case, layout: Layout, blocks: Blocks, writes: bool) -> dict[str, Any]:
    dtype, heads, tile = jnp.dtype(case.dtype), case.num_kv_heads, blocks.tile_tokens
    held = jnp.dtype(case.kv_dtype or case.dtype)
    rows = _state_rows(case, layout, blocks)
    flat = tile * layout.heads + layout.group
    scratch = {
        "pages": pltpu.VMEM((blocks.slots, blocks.pages, heads, case.page_size, layout.width), held),
        "pages_sem": pltpu.SemaphoreType.DMA((blocks.slots,)),
        "q": pltpu.VMEM((2, tile, layout.heads, layout.key_lanes), dtype),
        "q_sem": pltpu.SemaphoreType.DMA((2,)),
        "o": pltpu.VMEM((2, tile, layout.heads, layout.out_lanes), _out_dtype(case)),
        "o_sem": pltpu.SemaphoreType.DMA((2,)),
        "o_tokens": pltpu.SMEM((2,), jnp.int32),
        "q_flat": _flat(flat, layout.key_lanes),
        "o_flat": _flat(flat, layout.out_lanes),
        "q_rows": pltpu.VMEM((heads, rows, layout.key_lanes), dtype),
        "most": pltpu.VMEM((heads, rows, LANES), jnp.float32),
        "weight": pltpu.VMEM((heads, rows, LANES), jnp.float32),
        "mixed": pltpu.VMEM((heads, rows, layout.value_lanes), jnp.float32),
    }
    if writes:
        scratch |= {
            "fresh": pltpu.VMEM((layout.write_depth, layout.rows, layout.kv_heads, layout.width), dtype),
            "fresh_sem": pltpu.SemaphoreType.DMA((layout.write_depth,)),
            "fresh_flat": _flat(layout.rows * layout.kv_heads, layout.width),
            "stage": pltpu.VMEM((layout.write_depth, heads, layout.rows, layout.width), held),
            "read_sem": pltpu.SemaphoreType.DMA((layout.write_depth,)),
            "write_sem": pltpu.SemaphoreType.DMA((layout.write_depth,)),
            "writing": pltpu.SMEM((layout.write_depth,), jnp.int32),
        }
    if layout.kinds:
        slab, keys = (layout.scale_rows, LANES), blocks.pages * case.page_size
        scratch["scales"] = pltpu.VMEM((blocks.slots, *scales_shape(case, blocks.pages)), jnp.float32)
        scratch["head_scales"] = pltpu.VMEM((PIECES, layout.scale_rows, round_up(keys, LANES)), jnp.float32)
        if writes:
            scratch["fresh_scales"] = pltpu.VMEM((layout.write_depth, layout.rows, *slab), jnp.float32)
            scratch["scales_stage"] = pltpu.VMEM((layout.write_depth, *slab), jnp.float32)
    return scratch


def _out_dtype(case: Case) -> Any:
    return jnp.dtype(case.dtype if case.context == 1 else jnp.float32)


def _flat(rows: int, lanes: int) -> Any:
    """Rows that are loaded with a stride: of 32 bits, one tile of lanes apart from the next."""
    return pltpu.VMEM((lanes // LANES, rows, LANES), jnp.float32)


def _state_rows(case: Case, layout: Layout, blocks: Blocks) -> int:
    group = case.num_heads // case.num_kv_heads
    return layout.group if blocks.tile_tokens == 1 else max(layout.group, group * blocks.tile_tokens)


def _cost(
    case: Case,
    layout: Layout,
    queries: jax.Array,
    new: tuple[jax.Array, ...] | None,
    pool: list[jax.Array],
    rows: Rows,
) -> pl.CostEstimate:
    """The most that a batch of these shapes can cost: tables full, their pages all different, as far as the pool goes.

    Lengths are not known when the program is compiled.
    """
    num_tokens, num_rows = queries.shape[0], min(queries.shape[0], rows.kv_len.shape[0] - 1)
    pages = min(pool[0].shape[0], rows.table.shape[0])
    keys = pages * case.page_size
    if case.window is not None:
        keys = min(keys, num_rows * ((case.window + num_tokens // num_rows) // case.context + case.page_size))
    pairs = keys * -(-num_tokens // num_rows) * case.num_heads
    moved = keys * sum(math.prod(array.shape[1:]) * array.dtype.itemsize for array in pool) // case.page_size
    moved += num_tokens * layout.heads * layout.key_lanes * layout.itemsize
    moved += num_tokens * layout.heads * layout.out_lanes * _out_dtype(case).itemsize
    moved += 0 if new is None else 2 * sum(array.size * array.dtype.itemsize for array in new)
    return pl.CostEstimate(
        flops=2 * pairs * (layout.key_lanes + layout.value_lanes),
        transcendentals=pairs * (1 if case.soft_cap is None else 2),
        bytes_accessed=moved,
    )
