"""Ragged paged attention for Hopper GPUs (Mosaic GPU, sm_90): writes a step's keys and values into their pages and
attends, in one call.

A program serves one kv head of one tile of queries: a decode, or some tokens of a chunk, with all query heads of that
kv head as rows of a WGMMA tile. It walks blocks of pages with a running softmax in float32 (FlashAttention,
arXiv:2205.14135); the tensor memory accelerator copies pages into a ring of buffers ahead of it. A decode's is of one
warpgroup and 64 rows (gpu_kernel.py), and where there are few, the keys of a decode are split over several programs,
and their results merged (flash decoding). A chunk's has 128 rows, one warpgroup that only copies and two that take
turns at the tensor cores (gpu_chunks.py); which chunks that cannot serve, gpu_layout.takes_turns says: they have the
decodes' kernel.

The keys and values of this step's own tokens are read from where the model left them, and not from their pages. So no
program waits for another one's writes: each writes its own tile's tokens, and what lies in those slots is never read.

Of a quantized pool (quantized.py) pages arrive as they are, and a block's keys, then its values, are widened into one
buffer that the tensor cores read. Scales arrive beside them, and logits and weights are multiplied with them.

Where more heads share a key than a tile has rows, they are cut into several tiles' worth. Where values are too wide for
one warpgroup's registers (latent attention), two share a tile: one makes the weights, each mixes half of the lanes.

Where the devices of a mesh share the keys of a sequence, one by one (striped attention, arXiv:2311.09431), each runs
the kernel over the keys it has, writes those of this step's that are its own, and gives its part of the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.flash_attention.gpu_turns import WARPGROUPS
from pallas_kernels.merge_attention.reference import merge
from pallas_kernels.paged_attention.arguments import check
from pallas_kernels.paged_attention.gpu_chunks import ChunkKernel
from pallas_kernels.paged_attention.gpu_kernel import Kernel
from pallas_kernels.paged_attention.gpu_layout import (
    ALIGNMENT,
    TILE_ROWS,
    Blocks,
    ChunkBlocks,
    Layout,
    chip_name,
    choose_blocks,
    choose_chunk_blocks,
    pool_shape,
    scales_shape,
    supports,
    takes_turns,
)
from pallas_kernels.paged_attention.quantized import QuantizedPool, quantize
from pallas_kernels.paged_attention.tpu_layout import Case, round_up

__all__ = ["Batch", "Pool", "Tiles", "paged_attention", "pool_shape", "prepare", "scales_shape", "supports"]

Pool = jax.Array | QuantizedPool

_BLOCKS_OF_SPLIT, _MAX_SPLITS = 4, 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """The tiles of queries of one kind of row, decodes or chunks. All int32; Q tiles, T tokens.

    row [Q]       the row of the batch
    first [Q]     the first token
    start [Q]     the row's first token among those whose keys this device has
    count [Q]     tokens; 0: the tile is not in use
    position [Q]  the first token's position in its sequence, counted from that of this device's first key
    cached [Q]    keys of the sequence that this device had before this step
    of_token [T]  for each token, its place among all tiles' tokens; -1: it is in none of them
    """

    row: jax.Array
    first: jax.Array
    start: jax.Array
    count: jax.Array
    position: jax.Array
    cached: jax.Array
    of_token: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What the kernel reads of a batch, the same for all layers of a case: the page table [S, P], and tiles.

    own [T]    the tokens whose keys this device has, in order; None: all
    place []   which of the devices that share the keys this one is; None where they do not
    """

    table: jax.Array
    groups: tuple[Tiles, ...]
    own: jax.Array | None = None
    place: jax.Array | None = None


def prepare(
    case: Case,
    num_tokens: int,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_len: jax.Array,
    place: jax.Array | None = None,
) -> Batch:
    """page_table [S, P], query_start [S + 1], kv_len [S].

    place: of the case's `context` devices, which share the keys of a sequence, this one has those of positions place,
    place + context, ... in its slots 0, 1, ...
    """
    num_rows = page_table.shape[0]
    if query_start.shape != (num_rows + 1,) or kv_len.shape != (num_rows,):
        raise ValueError(
            f"query_start {query_start.shape} and kv_len {kv_len.shape} do not fit page_table {page_table.shape}; "
            f"give {(num_rows + 1,)} and {(num_rows,)}"
        )
    if (case.context > 1) != (place is not None):
        raise ValueError(
            f"context={case.context}, but place={place}; give it where devices share the keys, and only so"
        )
    lengths = jnp.diff(query_start)
    kinds = [(1, lengths == 1, min(num_tokens, num_rows))]
    if num_tokens > 1:
        size = Layout.of(case).tile_tokens
        kinds.append((size, lengths > 1, num_tokens // size + min(num_rows, num_tokens // 2)))
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    row_of_token = _row_of(query_start, tokens)
    cached_tokens, cached, row_starts, own = kv_len - lengths, kv_len - lengths, query_start, None
    if place is not None:
        cached = _slots(cached_tokens, case.context, place)
        written = _slots(kv_len, case.context, place) - cached
        row_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(written, dtype=jnp.int32)])
        of_row = _row_of(row_starts, tokens)
        position = (cached[of_row] + tokens - row_starts[of_row]) * case.context + place
        own = jnp.clip(query_start[of_row] + position - cached_tokens[of_row], 0, num_tokens - 1)
    groups = []
    for size, wanted, capacity in kinds:
        counts = jnp.where(wanted, -(-lengths // size), 0)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
        index = jnp.arange(capacity, dtype=jnp.int32)
        row = _row_of(starts, index)
        first = query_start[row] + (index - starts[row]) * size
        count = jnp.where(index < starts[-1], jnp.minimum(query_start[row + 1] - first, size), 0)
        place_of = (starts[row_of_token]) * size + tokens - query_start[row_of_token]
        inside = wanted[row_of_token] & (tokens < query_start[-1])
        position = cached_tokens[row] + first - query_start[row] - (0 if place is None else place)
        of_token = jnp.where(inside, place_of, -1)
        groups.append(Tiles(row, first, row_starts[row], count, position, cached[row], of_token))
    return Batch(page_table, tuple(groups), own, place)


def _slots(length: jax.Array, context: int, place: jax.Array) -> jax.Array:
    """How many of a sequence's first keys this device has."""
    return (length + (context - 1) - place) // context


def _row_of(starts: jax.Array, index: jax.Array) -> jax.Array:
    """The row in whose range [starts[row], starts[row + 1]) each index falls; rows may be empty."""
    return jnp.minimum(jnp.searchsorted(starts[1:], index, side="right").astype(jnp.int32), starts.shape[0] - 2)


def paged_attention(
    case: Case,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Pool,
    batch: Batch,
    sinks: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    chunk_blocks: ChunkBlocks | None = None,
    interpret: Any = None,
) -> tuple[Any, Pool]:
    """Write k and v into their pages, then let every query see its sequence's keys up to its own position.

    q [T, N, H]; k and v [T, K, H], or None when the pool holds this step's keys and values already; v is None in a case
    with a latent_dim, whose keys begin with their values.
    pool: of `pool_shape` (quantized: and `scales_shape`), updated in place where the caller donated it. batch: of
    `prepare`.
    sinks [N] when the case has them. blocks, chunk_blocks: other than the tuned table gives.
    interpret: an `InterpretGPUParams`, to simulate on a CPU.
    Returns ([T, N, H or latent_dim] in q's dtype, zero for padding tokens; the pool). Of a case whose keys several
    devices share the first is this device's part: what its keys mix, float32, and the log of their sum of exponentials,
    float32 [T, N]; 0 and -inf for a query that saw no key here. The sinks are of place 0.
    """
    check("GPU", supports, pool_shape, scales_shape, case, q, k, v, pool, sinks, [batch.table])
    if (case.context > 1) != (batch.place is not None):
        raise ValueError(f"context={case.context}, but the batch's place is {batch.place}; prepare it for the case")
    blocks = blocks or choose_blocks(case, chip_name())
    chunk_blocks = (chunk_blocks or choose_chunk_blocks(case, chip_name())) if takes_turns(case) else None
    layout = Layout.of(case)
    queries = jnp.pad(q.astype(case.dtype), ((0, 0), (0, 0), (0, layout.lanes - case.head_dim)))
    held = jax.tree.map(jax.new_ref, pool)
    arrays: dict[str, Any] = dict(zip(("pool", "scales"), jax.tree.leaves(held), strict=False))
    if k is not None:
        most_keys = max(blocks.keys, 0 if chunk_blocks is None else chunk_blocks.keys)
        arrays |= _as_written(case, layout, k, v, batch.own, most_keys)
    result = jnp.zeros((*q.shape[:2], layout.value_lanes), jnp.float32)
    lse = jnp.full(q.shape[:2], -jnp.inf)
    for tiles in batch.groups:
        decodes = tiles is batch.groups[0]
        of_tiles = blocks if decodes or chunk_blocks is None else chunk_blocks
        parts = _call(case, layout, of_tiles, decodes, queries, arrays, batch.table, tiles, interpret)
        own = jnp.maximum(tiles.of_token, 0)
        inside = (tiles.of_token >= 0)[:, None]
        result = jnp.where(inside[..., None], parts[0][own], result)
        lse = jnp.where(inside, parts[1][own], lse)
    if sinks is not None:  # one more key for each head, with a value of 0
        sinks = sinks.astype(jnp.float32)
        if batch.place is not None:
            sinks = jnp.where(batch.place == 0, sinks, -jnp.inf)
        total = jnp.logaddexp(lse, sinks)
        result *= jnp.exp(lse - jnp.where(total == -jnp.inf, 0.0, total))[..., None]
        lse = total
    mixed = result[..., : case.latent_dim or case.head_dim]
    pool = jax.tree.map(jax.freeze, held)
    if case.context > 1:
        return (mixed, lse), pool
    return mixed.astype(q.dtype), pool


def _as_written(
    case: Case, layout: Layout, k: jax.Array, v: jax.Array | None, own: jax.Array | None, block_keys: int
) -> dict[str, jax.Array]:
    """This device's own of k and v [T, K, H] as in a page, [T', K, lanes]; of a quantized pool scales [2 or 1, K, T']
    too. T' is as much more as a block of keys has that begins at the last token."""
    new = {"new_keys": k} if v is None else {"new_keys": k, "new_values": v}
    if own is not None:
        new = {name: array[own] for name, array in new.items()}
    rows = round_up(k.shape[0], ALIGNMENT) + block_keys - k.shape[0]
    scales = []
    if case.kv_dtype is not None:
        for name, array in new.items():
            new[name], of_kind = quantize(array, case.kv_dtype)
            scales.append(jnp.pad(of_kind.T, ((0, 0), (0, rows))))
    padding = ((0, rows), (0, 0), (0, layout.lanes - case.head_dim))
    new = {name: jnp.pad(array.astype(case.kv_dtype or case.dtype), padding) for name, array in new.items()}
    return new | ({"new_scales": jnp.stack(scales)} if scales else {})


def _call(
    case: Case,
    layout: Layout,
    blocks: Blocks | ChunkBlocks,
    decodes: bool,
    queries: jax.Array,
    arrays: dict[str, Any],
    table: jax.Array,
    tiles: Tiles,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the tiles of one kind, of `size` tokens each: [Q * size, N, lanes] float32, and log-sum-exps.

    arrays: the pool's, as references, and this step's keys and values, by the kernel's names for them.
    """
    size = 1 if decodes else layout.tile_tokens
    num_tiles, num_tokens = tiles.row.shape[0], queries.shape[0]
    group, num_groups = layout.group, case.num_heads // layout.group
    rows = round_up(size * group, ALIGNMENT)
    tokens = jnp.minimum(tiles.first[:, None] + jnp.arange(size), num_tokens - 1)
    packed = queries[tokens].reshape(num_tiles, size, num_groups, group, layout.lanes).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(num_tiles, num_groups, size * group, layout.lanes)
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, rows - size * group), (0, 0)))
    arrays = {"queries": packed} | arrays | {"table": table.reshape(-1)}
    arrays |= {name: getattr(tiles, name) for name in ("row", "start", "count", "position", "cached")}
    names, simulated, splits = (*arrays, "out", "lse"), interpret is not None, 1
    if isinstance(blocks, ChunkBlocks):
        body = ChunkKernel(case, layout, blocks, size, rows, table.shape[1], names, simulated)
    else:
        splits = _splits(case, blocks, num_tiles * num_groups, table.shape[1]) if decodes else 1
        body = Kernel(case, layout, blocks, size, rows, splits, table.shape[1], names, decodes, simulated)
    shape = (splits, num_tiles, num_groups)
    out_dtype = jnp.float32 if splits > 1 or case.context > 1 else queries.dtype
    out, lse = plgpu.kernel(
        body.run,
        out_type=[
            jax.ShapeDtypeStruct((*shape, rows, layout.value_lanes), out_dtype),
            jax.ShapeDtypeStruct((*shape, TILE_ROWS if decodes else layout.chunk_rows), jnp.float32),
        ],
        grid=(*shape[1:], splits),
        grid_names=("tile", "heads", "split"),
        num_threads=body.warpgroups,
        thread_name=WARPGROUPS,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        **mosaic_gpu.cost(_cost(case, layout, packed, decodes, splits, arrays["pool"].shape, table.shape)),
        interpret=interpret,
        kernel_name="paged_attention",
    )(*arrays.values())
    out, lse = merge(out.astype(jnp.float32), lse[..., :rows])

    def by_token(array: jax.Array) -> jax.Array:
        """[Q, N / group, rows, ...] -> [Q * size, N, ...]"""
        array = array[:, :, : size * group].reshape(num_tiles, num_groups, size, group, *array.shape[3:])
        return array.swapaxes(1, 2).reshape(num_tiles * size, case.num_heads, *array.shape[4:])

    return by_token(out), by_token(lse)


def _splits(case: Case, blocks: Blocks, programs: int, width: int) -> int:
    """Programs for the keys of one decode: enough to fill the GPU, but none for less than some blocks."""
    most = width * case.page_size
    if case.window is not None:
        most = min(most, -(-case.window // case.context))
    wanted = -(-blocks.programs // programs)
    return max(1, min(wanted, most // (_BLOCKS_OF_SPLIT * blocks.keys), _MAX_SPLITS))


def _cost(
    case: Case,
    layout: Layout,
    packed: jax.Array,
    decodes: bool,
    splits: int,
    pool: tuple[int, ...],
    table: tuple[int, ...],
) -> pl.CostEstimate:
    """The most that tiles of these shapes can cost: tables full, their pages all different, as far as the pool goes.

    Lengths are not known when the program is compiled. Every row of a tile of 64 or 128 is multiplied, real or not.
    """
    num_tiles, num_groups, rows, lanes = packed.shape
    keys = min(pool[0], num_tiles * table[1]) * case.page_size
    if case.window is not None:
        keys = min(keys, num_tiles * (case.window + rows + case.page_size))
    pairs = keys * num_groups * (TILE_ROWS if decodes else layout.chunk_rows)
    held = packed.dtype.itemsize * lanes if case.kv_dtype is None else lanes + 4
    moved = layout.kinds * keys * case.num_kv_heads * held + packed.size * packed.dtype.itemsize
    moved += packed.size // lanes * layout.value_lanes * (packed.dtype.itemsize if splits == 1 else 4 * splits)
    return pl.CostEstimate(
        flops=2 * pairs * (lanes + layout.value_lanes),
        transcendentals=pairs * (1 if case.soft_cap is None else 2),
        bytes_accessed=moved,
    )
