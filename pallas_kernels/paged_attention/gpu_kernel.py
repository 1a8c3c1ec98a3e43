"""The body of the GPU kernel: one tile of queries, one kv head, one share of the keys. See gpu.py."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_layout import ALIGNMENT, TILE_ROWS, Blocks
from pallas_kernels.paged_attention.tpu_layout import Case

MASKED = -1e30  # finite: a block of which a query sees nothing yields numbers, which are then weighed with 0
_LOG2_E = math.log2(math.e)

_COLUMNS = 128  # of the mixed values in one accumulator: two of them and what they are added to fit the registers

# Mixed values [64, up to 128 lanes] for all lanes; the largest logit [64], to base 2; the sum of weights [64].
State = tuple[tuple[jax.Array, ...], jax.Array, jax.Array]


def _tiled(itemsize: int) -> tuple[Any, Any]:
    """How a matrix lies in shared memory, as tensor cores and the copies of 128 bytes read it."""
    # JAX leaves a method of their base class abstract, that these are never asked for.
    tiling = plgpu.TilingTransform((8, 128 // itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


@dataclass(frozen=True)
class Kernel:
    """What is static: sizes in elements, and whether this step's keys and values are given.

    size       tokens of a tile
    rows       its rows that are copied: query heads of its tokens, in whole tiles of 8
    splits     programs that share the keys of a tile
    width      pages of a row's table
    decodes    whether the tiles are rows of one token
    """

    case: Case
    blocks: Blocks
    size: int
    rows: int
    splits: int
    head_dim: int
    width: int
    writes: bool
    decodes: bool

    @property
    def group(self) -> int:
        return self.case.num_heads // self.case.num_kv_heads

    @property
    def columns(self) -> list[Any]:
        """The lanes of a head, in pieces."""
        starts = range(0, self.head_dim, _COLUMNS)
        return [pl.ds(start, min(_COLUMNS, self.head_dim - start)) for start in starts]

    def run(self, queries: Any, pool: Any, *refs: Any) -> None:
        """References in memory: of `_call`'s arguments, then the outputs, each by split, tile and head."""
        new, (table, row, first, count, position, cached, out, lse) = refs[:-8], refs[-8:]
        tile, head, split = lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index("split")
        tokens = count[tile]

        @pl.when(tokens > 0)
        def _() -> None:
            dtype = jnp.dtype(self.case.dtype)
            shape = (self.blocks.slots, self.blocks.keys, self.head_dim)
            own = _Tile(
                self, pool, new, table, head, split, row[tile], first[tile], tokens, position[tile], cached[tile]
            )

            def attend(q: Any, barrier: Any) -> State:
                plgpu.copy_gmem_to_smem(queries.at[tile, head], q.at[pl.ds(0, self.rows)], barrier)
                plgpu.barrier_wait(barrier)
                return pl.run_scoped(
                    functools.partial(own.attend, q),
                    plgpu.SMEM(shape, dtype, transforms=_tiled(dtype.itemsize)),
                    plgpu.SMEM(shape, dtype, transforms=_tiled(dtype.itemsize)),
                    plgpu.SMEM((TILE_ROWS, self.blocks.keys), dtype, transforms=_tiled(dtype.itemsize)),
                    plgpu.Barrier(
                        num_arrivals=2 * self.blocks.keys // self.case.page_size, num_barriers=self.blocks.slots
                    ),
                    plgpu.Barrier(num_arrivals=2),
                )

            mixed, most, weight = pl.run_scoped(
                attend,
                plgpu.SMEM((TILE_ROWS, self.head_dim), dtype, transforms=_tiled(dtype.itemsize)),
                plgpu.Barrier(),
            )

            def send(mixed_smem: Any, lse_smem: Any) -> None:
                total = jnp.where(weight == 0.0, 1.0, weight)
                for columns, part in zip(self.columns, mixed, strict=True):
                    result = part / lax.broadcast_in_dim(total, part.shape, [0])
                    mixed_smem[:, columns] = result.astype(mixed_smem.dtype)
                lse_smem[...] = jnp.where(weight == 0.0, -jnp.inf, most / _LOG2_E + jnp.log(total))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(mixed_smem.at[pl.ds(0, self.rows)], out.at[split, tile, head])
                plgpu.copy_smem_to_gmem(lse_smem, lse.at[split, tile, head])
                plgpu.wait_smem_to_gmem(0)

            if self.writes:
                pl.when(split == self.splits - 1)(own.write)
            pl.run_scoped(
                send,
                plgpu.SMEM((TILE_ROWS, self.head_dim), out.dtype, transforms=_tiled(out.dtype.itemsize)),
                plgpu.SMEM((TILE_ROWS,), jnp.float32),
            )


@dataclass(frozen=True)
class _Tile:
    """One program's work: the kernel, references, and the tile's numbers as in gpu.Tiles."""

    kernel: Kernel
    pool: Any
    new: tuple[Any, ...]
    table: Any
    head: jax.Array
    split: jax.Array
    row: jax.Array
    first: jax.Array
    count: jax.Array
    position: jax.Array
    cached: jax.Array

    def attend(self, q: Any, keys: Any, values: Any, weights: Any, arrived: Any, new_arrived: Any) -> State:
        """Walk this split's blocks of pages, then, in the last split, the blocks of new tokens."""
        block_keys, slots, window = self.kernel.blocks.keys, self.kernel.blocks.slots, self.kernel.case.window
        oldest = jnp.int32(0) if window is None else jnp.maximum(self.position - window + 1, 0)
        last = self.position + self.count - 1
        held = self.cached if self.kernel.writes else last + 1  # tokens that are read from pages
        begin, end = lax.div(oldest, block_keys), lax.div(held + block_keys - 1, block_keys)
        share = lax.div(jnp.maximum(end - begin, 0) + self.kernel.splits - 1, self.kernel.splits)
        begin = begin + self.split * share
        end = jnp.minimum(begin + share, end)

        def fetch(block: jax.Array, slot: Any) -> None:
            @pl.when(block < end)
            def _() -> None:
                self.copy_block(block, lax.div(held - 1, self.kernel.case.page_size), keys, values, slot, arrived)

        for slot in range(slots):
            fetch(begin + slot, slot)

        def step(index: jax.Array, state: State) -> State:
            slot = lax.rem(index, slots)
            block = begin + index
            plgpu.barrier_wait(arrived.at[slot])
            state = self.mix(q, keys.at[slot], values.at[slot], weights, block * block_keys, oldest, held, state)
            plgpu.commit_smem()  # all warps are done with the slot
            fetch(block + slots, slot)
            return state

        rows = jnp.full((TILE_ROWS,), MASKED, jnp.float32), jnp.zeros((TILE_ROWS,), jnp.float32)
        most, weight = (plgpu.layout_cast(part, plgpu.Layout.WGMMA.reduce(1)) for part in rows)
        mixed = tuple(
            plgpu.layout_cast(jnp.zeros((TILE_ROWS, columns.size), jnp.float32), plgpu.Layout.WGMMA)
            for columns in self.kernel.columns
        )
        state = lax.fori_loop(0, jnp.maximum(end - begin, 0), step, (mixed, most, weight))
        if not self.kernel.writes:
            return state
        # Tiles of shared memory are filled from tiles of memory: so from a multiple of 8, within other rows' tokens.
        start = self.first - (self.position - self.cached)
        aligned = lax.div(start, ALIGNMENT) * ALIGNMENT
        zeroth = self.cached - (start - aligned)  # position that the first key would have
        oldest = jnp.maximum(oldest, self.cached)
        begin, end = lax.div(oldest - zeroth, block_keys), lax.div(last - zeroth, block_keys) + 1
        end = jnp.where(self.split == self.kernel.splits - 1, end, begin)

        # A decode's own key is in the first rows; what is behind them in the block is not seen.
        copied = ALIGNMENT if self.kernel.decodes else block_keys

        def new_step(block: jax.Array, state: State) -> State:
            token = pl.multiple_of(aligned + block * block_keys, ALIGNMENT)
            for source, target in zip(self.new, (keys, values), strict=True):
                some = source.at[pl.ds(token, copied), self.head]
                plgpu.copy_gmem_to_smem(some, target.at[0].at[pl.ds(0, copied)], new_arrived)
            plgpu.barrier_wait(new_arrived)
            offset = zeroth + block * block_keys
            state = self.mix(q, keys.at[0], values.at[0], weights, offset, oldest, last + 1, state)
            plgpu.commit_smem()
            return state

        return lax.fori_loop(begin, end, new_step, state)

    def copy_block(self, block: jax.Array, last_page: jax.Array, keys: Any, values: Any, slot: Any, sem: Any) -> None:
        """Every copy of a block is made, for the barrier counts them; past the last page, it is of that one again."""
        size = self.kernel.case.page_size
        pages = self.kernel.blocks.keys // size
        for index in range(pages):
            logical = jnp.minimum(block * pages + index, last_page)
            page = self.table[self.row * self.kernel.width + lax.rem(logical, self.kernel.width)]
            for which, target in enumerate((keys, values)):
                source = self.pool.at[page, which, self.head]
                plgpu.copy_gmem_to_smem(source, target.at[slot].at[pl.ds(index * size, size)], sem.at[slot])

    def mix(
        self,
        q: Any,
        keys: Any,
        values: Any,
        weights_smem: Any,
        offset: jax.Array,
        oldest: jax.Array,
        end: jax.Array,
        state: State,
    ) -> State:
        """Take a block of keys and values, whose first key is at position `offset`, into the running softmax.

        oldest, end: the positions that some query may see. weights_smem: the weights pass through shared memory, since
        JAX's simulation knows no WGMMA from registers.
        """
        case, block_keys = self.kernel.case, self.kernel.blocks.keys
        mixed, old_most, weight = state

        @pl.when((offset < oldest) | (offset + block_keys > end))
        def _() -> None:
            # What no query sees becomes 0: weights of 0 do not cancel what a page's last owner may have left.
            for columns in self.kernel.columns:
                held = plgpu.load(values.at[:, columns], layout=plgpu.Layout.WGMMA)
                place = offset + plgpu.broadcasted_iota(jnp.int32, held.shape, 0, layout=plgpu.Layout.WGMMA)
                alive = (place >= oldest) & (place < end)
                values[:, columns] = jnp.where(alive, held.astype(jnp.float32), 0.0).astype(held.dtype)
            plgpu.commit_smem()

        def multiply(total: Any) -> jax.Array:
            plgpu.wgmma(total, q, keys.transpose((1, 0)))
            return total[...]

        shape = (TILE_ROWS, block_keys)
        logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32)) * case.scale
        if case.soft_cap is not None:
            logits = case.soft_cap * jnp.tanh(logits / case.soft_cap)
        token = lax.div(plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA), self.kernel.group)
        place = offset + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        seen = (place >= oldest) & (place < end) & (place <= self.position + token)
        if case.window is not None:
            seen &= place > self.position + token - case.window
        logits = jnp.where(seen, logits * _LOG2_E, -jnp.inf)
        most = jnp.maximum(old_most, jnp.max(logits, axis=1))
        keep = jnp.exp2(old_most - most)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(most, shape, [0]))
        weight = weight * keep + jnp.sum(weights, axis=1)

        weights_smem[...] = weights.astype(weights_smem.dtype)
        plgpu.commit_smem()

        def add(total: Any, *, columns: Any) -> jax.Array:
            plgpu.wgmma(total, weights_smem, values.at[:, columns])
            return total[...]

        def part(columns: Any, old: jax.Array) -> jax.Array:
            own = pl.run_scoped(
                functools.partial(add, columns=columns),
                plgpu.WGMMAAccumulatorRef((TILE_ROWS, columns.size), jnp.float32),
            )
            return old * lax.broadcast_in_dim(keep, old.shape, [0]) + own

        return tuple(map(part, self.kernel.columns, mixed)), most, weight

    def write(self) -> None:
        """Put the tile's own keys and values into their pages."""
        size, width = self.kernel.case.page_size, self.kernel.width

        def send(stage: Any, barrier: Any) -> None:
            for which, source in enumerate(self.new):
                target = stage.at[which]
                plgpu.copy_gmem_to_smem(source.at[pl.ds(self.first, self.kernel.size), self.head], target, barrier)
            plgpu.barrier_wait(barrier)

            def one(index: jax.Array, _: None) -> None:
                position = self.position + index
                page = self.table[self.row * width + lax.rem(lax.div(position, size), width)]
                for which in range(2):
                    place = self.pool.at[page, which, self.head, lax.rem(position, size)]
                    plgpu.copy_smem_to_gmem(stage.at[which, index], place)

            lax.fori_loop(0, self.count, one, None)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            send,
            plgpu.SMEM((2, self.kernel.size, self.kernel.head_dim), jnp.dtype(self.kernel.case.dtype)),
            plgpu.Barrier(num_arrivals=2),
        )
