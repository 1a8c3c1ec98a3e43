"""The body of the GPU kernel for chunks of prompts, with the structure of FlashAttention-3, arXiv:2407.08608.

A program of three warpgroups serves 128 rows: heads of one kv head times tokens of one chunk. One warpgroup only
copies, by the tensor memory accelerator, into a ring of blocks: pages, whose places it looks up in the table, then this
step's own keys and values from where the model left them. In between it writes those of its tile into their pages. The
other two have 64 rows each and mix the same blocks (pallas_kernels/flash_attention/gpu_turns.py).

Blocks that all of the tile's tokens see whole are not masked. They are those between the edge of the window and the
end of the pages, and between the first block of the step's own keys and the diagonal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.gpu_turns import BY_ROW, GROUPS, ROWS, WARPGROUPS, State, Turns, buffers, split
from pallas_kernels.paged_attention.gpu_layout import ALIGNMENT, WRITTEN_TOKENS, ChunkBlocks, Layout
from pallas_kernels.paged_attention.gpu_tile import KINDS, Tile
from pallas_kernels.paged_attention.tpu_layout import Case

_CLEANED = 64  # keys and lanes of the values that are cleaned at a time, beside accumulators in registers

_LOOKED_UP = 8  # pages that are looked up at a time, in few registers


@dataclass(frozen=True)
class ChunkKernel:
    """What is static: sizes in elements, and the references' names.

    size       tokens of a tile
    rows       its rows that are copied: query heads of its tokens, in whole tiles of 8
    width      pages of a row's table
    names      of the references that `run` gets
    simulated  without what JAX's simulation does not know; see gpu_turns.py
    """

    case: Case
    layout: Layout
    blocks: ChunkBlocks
    size: int
    rows: int
    width: int
    names: tuple[str, ...]
    simulated: bool

    @property
    def warpgroups(self) -> int:
        return GROUPS + 1

    @property
    def writes(self) -> bool:
        """Whether this step's keys and values are given."""
        return "new_keys" in self.names

    @property
    def written(self) -> int:
        """Tokens that are written at a time."""
        return min(WRITTEN_TOKENS, self.size)

    @property
    def piece(self) -> int:
        """Keys of one copy: a page, or a block of a page that is larger."""
        return min(self.case.page_size, self.blocks.keys)

    def run(self, *refs: Any) -> None:
        """References in memory: of `_call`'s arguments, then the outputs, each by tile and heads."""
        memory = dict(zip(self.names, refs, strict=True))
        # The last tiles of a prompt have the most to do: they go first.
        tile = memory["count"].shape[0] - 1 - lax.axis_index("tile")

        @pl.when(memory["count"][tile] > 0)
        def _() -> None:
            lanes, dtype = self.layout.lanes, jnp.dtype(self.case.dtype)
            copies = self.blocks.keys // self.piece
            sizes = self.blocks.keys, self.blocks.slots, lanes, lanes
            scratch = buffers(*sizes, dtype, simulated=self.simulated, copies=copies)
            scratch["clean"] = plgpu.Barrier(num_arrivals=GROUPS)
            if self.writes:
                scratch["stage"] = plgpu.SMEM((self.layout.kinds, self.written, lanes), dtype)
                scratch["staged"] = plgpu.Barrier(num_arrivals=self.layout.kinds * self.written)

            def body(*held: Any) -> None:
                # Each makes its own numbers: ptxas spills some of those that both kinds of warpgroup have.
                program = functools.partial(_Program, self, memory, dict(zip(scratch, held, strict=True)), tile)
                split(lambda: program().copy(), lambda group: program().attend(group))

            pl.run_scoped(body, *scratch.values(), collective_axes=WARPGROUPS)


class _Stretch(NamedTuple):
    """A stretch of keys that lie one after another: those in pages, or this step's own.

    before        blocks that are visited before its first
    end           the same, and its own
    origin        slot of the first key of its first block
    whole_begin, whole_end    those of its blocks that every token of the tile sees whole
    oldest, last  the slots that some token may see
    """

    before: jax.Array
    end: jax.Array
    origin: jax.Array
    whole_begin: jax.Array
    whole_end: jax.Array
    oldest: jax.Array
    last: jax.Array


class _Program(Tile):
    """One program's work. refs: shared memory and barriers."""

    def __init__(self, kernel: ChunkKernel, memory: dict[str, Any], refs: dict[str, Any], tile: jax.Array) -> None:
        super().__init__(kernel.case, kernel.layout, memory, kernel.width, tile)
        self.kernel, self.blocks, self.refs = kernel, kernel.blocks, refs
        oldest, piece = jnp.int32(0), kernel.piece
        if self.case.window is not None:
            oldest = jnp.maximum(self.position - self.case.window + 1, 0)
        held = self.cached if kernel.writes else self.end  # tokens that are read from pages
        self.pages = self.stretch(jnp.int32(0), lax.div(oldest, piece) * piece, oldest, held)
        self.stretches = [self.pages]
        if kernel.writes:
            oldest = jnp.maximum(oldest, self.cached)
            # Tiles of shared memory are filled from tiles of memory: from a multiple of 8, within others' tokens.
            self.first_token = lax.div(self.start + oldest - self.cached, ALIGNMENT) * ALIGNMENT
            origin = self.cached + self.first_token - self.start
            self.stretches.append(self.stretch(self.pages.end, origin, oldest, self.end))

    def stretch(self, before: jax.Array, origin: jax.Array, oldest: jax.Array, end: jax.Array) -> _Stretch:
        """Of the keys in slots oldest..end - 1, none if there are none; its first block begins at slot `origin`."""
        keys = self.blocks.keys
        num_blocks = jnp.where(end > oldest, lax.div(end - origin + (keys - 1), keys), 0)
        # Every token of the tile sees the slots from `all_from` on and up to the first one's own.
        all_from = oldest
        if self.case.window is not None:
            all_from = jnp.maximum(oldest, self.end - self.case.window)
        whole_begin = jnp.minimum(lax.div(all_from - origin + (keys - 1), keys), num_blocks)
        whole_end = lax.div(jnp.maximum(jnp.minimum(end, self.position + 1) - origin, 0), keys)
        whole_end = jnp.maximum(whole_begin, whole_end)
        whole = before + whole_begin, before + whole_end
        return _Stretch(before, before + num_blocks, origin, *whole, oldest, end - 1)

    def copy(self) -> None:
        """Fill the ring of blocks, and each of its slots again once both warpgroups are done with it; and write the
        tile's tokens, some after each block."""
        for group in range(GROUPS):
            rows = pl.ds(group * ROWS, min(ROWS, self.kernel.rows - group * ROWS))
            queries = self.memory["queries"].at[self.tile, self.heads].at[rows]
            target = self.refs["q"].at[group].at[pl.ds(0, rows.size)]
            plgpu.copy_gmem_to_smem(queries, target, self.refs["q_there"].at[group])
        num_blocks, written = self.stretches[-1].end, self.kernel.written
        # The ring is filled before anything is written; later there is time for it, until a slot is free again.
        begin, end = self.blocks.slots - 1, jnp.int32(0)
        if self.kernel.writes:
            end = begin + jnp.where(self.writes, lax.div(self.count + (written - 1), written), 0)

        def step(index: jax.Array, _: None) -> None:
            @pl.when(index < num_blocks)
            def _() -> None:
                self.send(index)

            if self.kernel.writes:

                @pl.when((index >= begin) & (index < end))
                def _() -> None:
                    self.write(self.refs["stage"], self.refs["staged"], (index - begin) * written)

        lax.fori_loop(0, jnp.maximum(num_blocks, end), step, None)

    def send(self, index: jax.Array) -> None:
        """Copy the block that is visited as the index-th."""
        keys, size, piece, slots = self.blocks.keys, self.case.page_size, self.kernel.piece, self.blocks.slots
        slot, num_pieces = lax.rem(index, slots), keys // piece

        def into(kind: int, sources: Callable[[int, list[Any]], list[Any]]) -> None:
            """sources: gives those of some pieces of the block. The barrier counts pieces."""
            name, at_once = KINDS[kind], min(num_pieces, _LOOKED_UP)

            def some(begin: Any) -> None:
                parts = [begin + part for part in range(at_once)]
                found = sources(kind, parts)

                @pl.when((index >= slots) & (begin == 0))
                def _() -> None:
                    plgpu.barrier_wait(self.refs[f"{name}_done"].at[slot])

                for part, source in zip(parts, found, strict=True):
                    target = self.refs[name].at[slot].at[pl.ds(_multiple(part * piece, piece), piece)]
                    plgpu.copy_gmem_to_smem(source, target, self.refs[f"{name}_there"].at[slot])

            if at_once == num_pieces:
                some(0)
            else:
                lax.fori_loop(0, num_pieces // at_once, lambda turn, _: some(turn * at_once), None)

        def of_pages(kind: int, parts: list[Any]) -> list[Any]:
            first = self.pages.origin + index * keys
            last_page = lax.div(self.pages.last, size)  # past it, it is copied again
            pages = [self.page(jnp.minimum(lax.div(first + part * piece, size), last_page)) for part in parts]
            found = [self.memory["pool"].at[page, kind, self.head] for page in pages]
            if piece == size:
                return found
            within = [_multiple(lax.rem(first + part * piece, size), piece) for part in parts]
            return [page.at[pl.ds(slot, piece)] for page, slot in zip(found, within, strict=True)]

        def of_new(kind: int, parts: list[Any]) -> list[Any]:
            first = self.first_token + (index - self.pages.end) * keys
            tokens = [pl.ds(_multiple(first + part * piece, ALIGNMENT), piece) for part in parts]
            return [self.memory[f"new_{KINDS[kind]}"].at[some, self.head] for some in tokens]

        def block_from(sources: Callable[[int, list[Any]], list[Any]]) -> None:
            for kind in range(self.layout.kinds):
                into(kind, sources)

        if self.kernel.writes:
            lax.cond(index < self.pages.end, lambda: block_from(of_pages), lambda: block_from(of_new))
        else:
            block_from(of_pages)

    def attend(self, group: jax.Array) -> None:
        """The rows of one warpgroup, over all blocks."""
        turns = Turns(self.refs, group, self.case.scale, self.case.soft_cap, self.kernel.simulated)
        row = group * ROWS + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
        position = self.position + lax.div(row, self.layout.group)
        state = turns.begin()

        def step(index: jax.Array, state: State) -> State:
            stretch = self.pages
            if len(self.stretches) > 1:
                inside = index < self.pages.end
                stretch = _Stretch(*(jnp.where(inside, *both) for both in zip(*self.stretches, strict=True)))
            offset = stretch.origin + (index - stretch.before) * self.blocks.keys

            def mask(logits: jax.Array) -> jax.Array:
                return jnp.where(self.seen(position, stretch, offset), logits, -jnp.inf)

            whole = (index >= stretch.whole_begin) & (index < stretch.whole_end)
            return turns.mix(
                lax.rem(index, self.blocks.slots),
                state,
                lambda logits: lax.cond(whole, lambda logits: logits, mask, logits),
                lambda values: self.clean(group, stretch, offset, values),
            )

        state = lax.fori_loop(0, self.stretches[-1].end, step, state)
        out, lse = turns.end(state)
        place = 0, self.tile, self.heads
        for index in range(GROUPS):
            rows = pl.ds(index * ROWS, min(ROWS, self.kernel.rows - index * ROWS))

            @pl.when(group == index)
            def _(rows: Any = rows) -> None:
                plgpu.copy_smem_to_gmem(out.at[pl.ds(0, rows.size)], self.memory["out"].at[place].at[rows])

        plgpu.copy_smem_to_gmem(lse, self.memory["lse"].at[place].at[pl.ds(group * ROWS, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    def seen(self, position: jax.Array, stretch: _Stretch, offset: jax.Array) -> jax.Array:
        """[64, keys]: which keys of a block, whose first is in slot `offset`, each row sees. position [64]: its own."""
        shape = (ROWS, self.blocks.keys)

        def by_row(slot: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(slot, shape, [0])

        slot = offset + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        seen = slot <= by_row(jnp.minimum(position, stretch.last))
        if self.case.window is None:
            return seen & (slot >= stretch.oldest)
        return seen & (slot >= by_row(jnp.maximum(position - self.case.window + 1, stretch.oldest)))

    def clean(self, group: jax.Array, stretch: _Stretch, offset: jax.Array, values: Any) -> None:
        """Zero what no row sees: weights of 0 do not cancel what a page's last owner may have left. The warpgroups do
        every other piece of the block's values each, and wait for one another."""

        @pl.when((offset < stretch.oldest) | (offset + self.blocks.keys > stretch.last + 1))
        def _() -> None:
            across = self.layout.value_lanes // _CLEANED

            def one(index: jax.Array, _: None) -> None:
                index = GROUPS * index + group
                first = pl.multiple_of(lax.div(index, across) * _CLEANED, _CLEANED)
                lane = pl.multiple_of(lax.rem(index, across) * _CLEANED, _CLEANED)
                piece = values.at[pl.ds(first, _CLEANED), pl.ds(lane, _CLEANED)]
                held = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
                slot = offset + first + plgpu.broadcasted_iota(jnp.int32, held.shape, 0, layout=plgpu.Layout.WGMMA)
                alive = (slot >= stretch.oldest) & (slot <= stretch.last)
                piece[...] = jnp.where(alive, held.astype(jnp.float32), 0.0).astype(held.dtype)

            num_pieces = self.blocks.keys // _CLEANED * across
            lax.fori_loop(0, lax.div(num_pieces - group + (GROUPS - 1), GROUPS), one, None)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.refs["clean"])
            plgpu.barrier_wait(self.refs["clean"])


def _multiple(number: Any, factor: int) -> Any:
    """A promise of what an index is a multiple of; a number that is known needs none."""
    return number if isinstance(number, int) else pl.multiple_of(number, factor)
