"""Ragged paged attention for Hopper GPUs (Mosaic GPU, sm_90): writes a step's keys and values into their pages and
attends, in one call.

A program of one warpgroup serves one kv head of one tile of queries: a decode, or some tokens of a chunk, with all
query heads of that kv head as rows of one WGMMA tile of 64. It walks blocks of pages with a running softmax in float32
(FlashAttention, arXiv:2205.14135); the tensor memory accelerator copies pages into a ring of buffers ahead of it. Where
there are few tiles, the keys of a decode are split over several programs, and their results merged (flash decoding).

The keys and values of this step's own tokens are read from where the model left them, and not from their pages. So no
program waits for another one's writes: each writes its own tile's tokens, and what lies in those slots is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.merge_attention.reference import merge
from pallas_kernels.paged_attention.arguments import check
from pallas_kernels.paged_attention.gpu_kernel import Kernel
from pallas_kernels.paged_attention.gpu_layout import (
    ALIGNMENT,
    TILE_ROWS,
    Blocks,
    chip_name,
    choose_blocks,
    pool_shape,
    supports,
)
from pallas_kernels.paged_attention.tpu_layout import Case, round_up

__all__ = ["Tiles", "paged_attention", "pool_shape", "prepare", "supports"]

_BLOCKS_OF_SPLIT, _MAX_SPLITS = 4, 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """The tiles of queries of one kind of row, decodes or chunks. All int32; Q tiles, T tokens.

    row [Q]       the row of the batch
    first [Q]     the first token
    count [Q]     tokens; 0: the tile is not in use
    position [Q]  the first token's position in its sequence
    cached [Q]    tokens of the sequence before this step
    of_token [T]  for each token, its place among all tiles' tokens; -1: it is in none of them
    """

    row: jax.Array
    first: jax.Array
    count: jax.Array
    position: jax.Array
    cached: jax.Array
    of_token: jax.Array


def prepare(
    case: Case, num_tokens: int, page_table: jax.Array, query_start: jax.Array, kv_len: jax.Array
) -> tuple[jax.Array, tuple[Tiles, ...]]:
    """What the kernel reads of a batch, the same for all layers of a case: the page table, and tiles.

    page_table [S, P], query_start [S + 1], kv_len [S].
    """
    num_rows = page_table.shape[0]
    if query_start.shape != (num_rows + 1,) or kv_len.shape != (num_rows,):
        raise ValueError(
            f"query_start {query_start.shape} and kv_len {kv_len.shape} do not fit page_table {page_table.shape}; "
            f"give {(num_rows + 1,)} and {(num_rows,)}"
        )
    lengths = jnp.diff(query_start)
    kinds = [(1, lengths == 1, min(num_tokens, num_rows))]
    if num_tokens > 1:
        size = _chunk_tokens(case)
        kinds.append((size, lengths > 1, num_tokens // size + min(num_rows, num_tokens // 2)))
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    row_of_token = _row_of(query_start, tokens)
    groups = []
    for size, wanted, capacity in kinds:
        counts = jnp.where(wanted, -(-lengths // size), 0)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
        index = jnp.arange(capacity, dtype=jnp.int32)
        row = _row_of(starts, index)
        first = query_start[row] + (index - starts[row]) * size
        count = jnp.where(index < starts[-1], jnp.minimum(query_start[row + 1] - first, size), 0)
        own = (starts[row_of_token]) * size + tokens - query_start[row_of_token]
        inside = wanted[row_of_token] & (tokens < query_start[-1])
        cached = kv_len[row] - lengths[row]
        groups.append(Tiles(row, first, count, cached + first - query_start[row], cached, jnp.where(inside, own, -1)))
    return page_table, tuple(groups)


def _row_of(starts: jax.Array, index: jax.Array) -> jax.Array:
    """The row in whose range [starts[row], starts[row + 1]) each index falls; rows may be empty."""
    return jnp.minimum(jnp.searchsorted(starts[1:], index, side="right").astype(jnp.int32), starts.shape[0] - 2)


def _chunk_tokens(case: Case) -> int:
    return TILE_ROWS // (case.num_heads // case.num_kv_heads)


def paged_attention(
    case: Case,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: jax.Array,
    prepared: tuple[jax.Array, tuple[Tiles, ...]],
    sinks: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Write k and v into their pages, then let every query see its sequence's keys up to its own position.

    q [T, N, H]; k and v [T, K, H], or None when the pool holds this step's keys and values already.
    pool: of `pool_shape`, updated in place where the caller donated it. prepared: of `prepare`.
    sinks [N] when the case has them. blocks: other than the tuned table gives.
    interpret: an `InterpretGPUParams`, to simulate on a CPU.
    Returns ([T, N, H] in q's dtype, zero for padding tokens; the pool).
    """
    check("GPU", supports, pool_shape, None, case, q, k, v, pool, sinks)
    blocks = blocks or choose_blocks(case, chip_name())
    padded = pool.shape[-1]

    def pad_heads(array: jax.Array, rows: int = 0) -> jax.Array:
        return jnp.pad(array.astype(pool.dtype), ((0, rows), (0, 0), (0, padded - case.head_dim)))

    queries = pad_heads(q)
    # A block of new keys may begin at the last token.
    rows = round_up(q.shape[0], ALIGNMENT) + blocks.keys - q.shape[0]
    new = None if k is None or v is None else (pad_heads(k, rows), pad_heads(v, rows))
    table, groups = prepared
    held = jax.new_ref(pool)
    result = jnp.zeros(queries.shape, jnp.float32)
    for tiles in groups:
        decodes = tiles is groups[0]
        size = 1 if decodes else _chunk_tokens(case)
        out, lse = _call(case, blocks, size, decodes, queries, new, held, table, tiles, interpret)
        own = jnp.maximum(tiles.of_token, 0)
        mixed = out[own]
        if sinks is not None:  # one more key for each head, with a value of 0
            mixed *= jax.nn.sigmoid(lse[own] - sinks.astype(jnp.float32))[..., None]
        result = jnp.where((tiles.of_token >= 0)[:, None, None], mixed, result)
    return result[..., : case.head_dim].astype(q.dtype), jax.freeze(held)


def _call(
    case: Case,
    blocks: Blocks,
    size: int,
    decodes: bool,
    queries: jax.Array,
    new: tuple[jax.Array, jax.Array] | None,
    pool: Any,
    table: jax.Array,
    tiles: Tiles,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the tiles of one kind, of `size` tokens each: [Q * size, N, H] float32, and log-sum-exps."""
    num_tiles, num_tokens, head_dim = tiles.row.shape[0], queries.shape[0], queries.shape[-1]
    group, num_kv_heads = case.num_heads // case.num_kv_heads, case.num_kv_heads
    rows = round_up(size * group, ALIGNMENT)
    tokens = jnp.minimum(tiles.first[:, None] + jnp.arange(size), num_tokens - 1)
    packed = queries[tokens].reshape(num_tiles, size, num_kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(num_tiles, num_kv_heads, size * group, head_dim)
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, rows - size * group), (0, 0)))
    splits = _splits(case, blocks, num_tiles, table.shape[1]) if decodes else 1
    keys = (new[0], new[1]) if new is not None else ()
    shape = (splits, num_tiles, num_kv_heads)
    body = Kernel(case, blocks, size, rows, splits, head_dim, table.shape[1], new is not None, decodes)
    out, lse = plgpu.kernel(
        body.run,
        out_type=[
            jax.ShapeDtypeStruct((*shape, rows, head_dim), jnp.float32 if splits > 1 else queries.dtype),
            jax.ShapeDtypeStruct((*shape, TILE_ROWS), jnp.float32),
        ],
        grid=(num_tiles, num_kv_heads, splits),
        grid_names=("tile", "head", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        cost_estimate=_cost(case, packed, splits, pool.shape, table.shape),
        interpret=interpret,
        kernel_name="paged_attention",
    )(packed, pool, *keys, table.reshape(-1), tiles.row, tiles.first, tiles.count, tiles.position, tiles.cached)
    out, lse = merge(out.astype(jnp.float32), lse[..., :rows])

    def by_token(array: jax.Array) -> jax.Array:
        """[Q, K, rows, ...] -> [Q * size, N, ...]"""
        array = array[:, :, : size * group].reshape(num_tiles, num_kv_heads, size, group, *array.shape[3:])
        return array.swapaxes(1, 2).reshape(num_tiles * size, case.num_heads, *array.shape[4:])

    return by_token(out), by_token(lse)


def _splits(case: Case, blocks: Blocks, num_tiles: int, width: int) -> int:
    """Programs for the keys of one decode: enough to fill the GPU, but none for less than some blocks."""
    most = width * case.page_size if case.window is None else min(width * case.page_size, case.window)
    wanted = -(-blocks.programs // (num_tiles * case.num_kv_heads))
    return max(1, min(wanted, most // (_BLOCKS_OF_SPLIT * blocks.keys), _MAX_SPLITS))


def _cost(case: Case, packed: jax.Array, splits: int, pool: tuple[int, ...], table: tuple[int, ...]) -> pl.CostEstimate:
    """The most that tiles of these shapes can cost: tables full, their pages all different, as far as the pool goes.

    Lengths are not known when the program is compiled. Every row of a tile of 64 is multiplied, real or not.
    """
    num_tiles, num_kv_heads, rows, head_dim = packed.shape
    keys = min(pool[0], num_tiles * table[1]) * case.page_size
    if case.window is not None:
        keys = min(keys, num_tiles * (case.window + rows + case.page_size))
    pairs = keys * num_kv_heads * TILE_ROWS
    moved = 2 * keys * num_kv_heads * head_dim * packed.dtype.itemsize
    moved += packed.size * (packed.dtype.itemsize + (packed.dtype.itemsize if splits == 1 else 4 * splits))
    return pl.CostEstimate(
        flops=4 * pairs * head_dim,
        transcendentals=pairs * (1 if case.soft_cap is None else 2),
        bytes_accessed=moved,
    )
