"""The TPU kernel's body: walks rows, tiles of queries and blocks of pages, copies ahead of its work. See tpu.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.quantized import value_scales
from pallas_kernels.paged_attention.tpu_layout import LANES, PIECE, PIECES, Blocks, Case, Layout

MASKED = -1e30  # finite: a block of which a query sees nothing yields numbers, which the next maximum wipes out

Cursor = tuple[jax.Array, jax.Array, jax.Array]  # row, first query of its tile, first page of the block


def _load(ref: Any, rows: Any) -> jax.Array:
    """Rows of a flat buffer, [rows, lanes]."""
    return jnp.concatenate([ref[column, rows] for column in range(ref.shape[0])], axis=1)


def _store(ref: Any, rows: Any, values: jax.Array) -> None:
    for column in range(ref.shape[0]):
        ref[column, rows] = values[:, column * LANES : (column + 1) * LANES]


def _narrow(values: jax.Array, dtype: Any) -> jax.Array:
    """float32 numbers as the pool holds them; whole numbers go to 8 bits by way of 32."""
    return values.astype(jnp.int32).astype(dtype) if dtype == jnp.int8 else values.astype(dtype)


class Kernel:
    """The kernel's body: references, sizes, and the steps of the work. Made while it is traced."""

    def __init__(
        self,
        case: Case,
        layout: Layout,
        blocks: Blocks,
        num_tokens: int,
        scalars: tuple[Any, ...],
        out: Any,
        pool: list[Any],
        refs: dict[str, Any],
        fills: bool,
    ) -> None:
        self.case, self.layout, self.blocks, self.refs, self.fills = case, layout, blocks, refs, fills
        self.table, self.query_start, self.kv_len, self.next_row, self.next_chunk, self.numbers = scalars
        self.out, self.num_tokens = out, num_tokens
        self.pool, *self.pool_scales = pool  # of a quantized pool one more
        self.num_rows = self.kv_len.shape[0] - 1
        self.table_width = self.table.shape[0] // self.num_rows
        self.group = case.num_heads // case.num_kv_heads
        self.writes = "new" in refs
        self.dtype, self.held_dtype = jnp.dtype(case.dtype), jnp.dtype(case.kv_dtype or case.dtype)
        self.block_keys = blocks.pages * case.page_size
        self.has_chunks = blocks.tile_tokens > 1
        self.gives_parts = case.context > 1
        self.writes_ahead = layout.write_depth // 2  # tiles of a chunk read ahead; as many are being written back

    def run(self) -> None:
        for index in range(2):
            self.refs["o_tokens"][index] = 0
        if self.writes:
            for index in range(self.layout.write_depth):
                self.refs["writing"][index] = 0
            if self.has_chunks:
                self.write_chunks()
        self.attend()
        for index in range(2):
            self.finish_output(index)
        if self.writes:
            for index in range(self.layout.write_depth):
                self.finish_write(index)
        if self.fills:
            self.zero_padding()

    # Where things are. Positions are those of the sequence; slots, pages and what is said of them are this device's. Of
    # `context` devices the one at place c has position p in its slot (p - c) / context, where that is a whole number.

    def place(self) -> Any:
        return self.numbers[1] if self.gives_parts else 0

    def num_slots(self, length: jax.Array) -> jax.Array:
        """How many of a sequence's first `length` keys this device has."""
        context = self.case.context
        return lax.div(length + (context - 1) - self.place(), context) if self.gives_parts else length

    def position(self, slot: jax.Array) -> jax.Array:
        """The position of the key in a slot."""
        return slot * self.case.context + self.place() if self.gives_parts else slot

    def page(self, row: jax.Array, logical: jax.Array) -> jax.Array:
        return self.table[row * self.table_width + lax.rem(logical, self.table_width)]

    def tile(self, row: jax.Array, first: jax.Array) -> tuple[jax.Array, ...]:
        """Of the tile of queries at `first`: how many, the first one's and the last one's position, and the slots that
        some see: the oldest, and the end."""
        end = self.query_start[row + 1]
        count = jnp.minimum(end - first, self.blocks.tile_tokens)
        position = self.kv_len[row] - end + first
        last = position + count - 1
        oldest = jnp.zeros_like(position)
        if self.case.window is not None:
            oldest = jnp.maximum(position - self.case.window + 1, 0)
        return count, position, last, self.num_slots(oldest), self.num_slots(last + 1)

    def pages_end(self, row: jax.Array, first: jax.Array) -> jax.Array:
        """The page past the last that a tile sees."""
        return lax.div(self.tile(row, first)[4] + (self.case.page_size - 1), self.case.page_size)

    def first_page(self, row: jax.Array, first: jax.Array) -> jax.Array:
        return lax.div(self.tile(row, first)[3], self.case.page_size)

    def block_pages(self, cursor: Cursor) -> jax.Array:
        """Pages of the block that hold visible keys."""
        row, first, page = cursor
        return jnp.minimum(self.pages_end(row, first) - page, self.blocks.pages)

    def next_tile(self, row: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next tile's row (num_rows where there is none) and first query."""
        after = first + self.blocks.tile_tokens
        stays = after < self.query_start[row + 1]
        next_row = jnp.where(stays, row, self.next_row[row + 1])
        return next_row, jnp.where(stays, after, self.query_start[next_row])

    def start(self) -> Cursor:
        row = self.next_row[0]
        first = self.query_start[row]
        return row, first, self.first_page(row, first)

    def advance(self, cursor: Cursor) -> Cursor:
        """The next block of a cursor whose row exists."""
        row, first, page = cursor
        after = page + self.blocks.pages
        stays = after < self.pages_end(row, first)
        next_row, next_first = self.next_tile(row, first)
        next_row, next_first = jnp.where(stays, row, next_row), jnp.where(stays, first, next_first)
        return next_row, next_first, jnp.where(stays, after, self.first_page(next_row, next_first))

    # Copies. A copy of so many tokens is a few copies of powers of two, whose sizes are static.

    def tokens(self, count: jax.Array, most: int, copy: Callable[[Any, int], Any], *, wait: bool) -> None:
        size = most
        while size:

            @pl.when((count & size) != 0)
            def _(size: int = size) -> None:
                copied = copy(count & -(2 * size), size)
                (copied.wait if wait else copied.start)()

            size //= 2

    def copy_block(self, cursor: Cursor, slot: jax.Array, *, wait: bool) -> None:
        row, _, first = cursor
        buffer, sem = self.refs["pages"].at[slot], self.refs["pages_sem"].at[slot]

        def one(index: jax.Array, _: None) -> None:
            source = 0 if wait else self.page(row, first + index)
            copy = pltpu.make_async_copy(self.pool.at[source], buffer.at[index], sem)
            (copy.wait if wait else copy.start)()
            for scales in self.pool_scales:
                copy = pltpu.make_async_copy(scales.at[source], self.refs["scales"].at[slot, index], sem)
                (copy.wait if wait else copy.start)()

        lax.fori_loop(0, self.block_pages(cursor), one, None)

    def copy_queries(self, row: jax.Array, first: jax.Array, index: jax.Array, *, wait: bool) -> None:
        """The queries of a tile, and a decode's key and value."""
        count = self.tile(row, first)[0]
        buffer, sem, source = self.refs["q"].at[index], self.refs["q_sem"].at[index], self.refs["queries"]

        def some(offset: Any, size: int) -> Any:
            return pltpu.make_async_copy(source.at[pl.ds(first + offset, size)], buffer.at[pl.ds(offset, size)], sem)

        self.tokens(count, self.blocks.tile_tokens, some, wait=wait)
        if self.writes:

            @pl.when(self.is_decode(row))
            def _() -> None:
                target, sem = self.refs["fresh"].at[index], self.refs["fresh_sem"].at[index]
                copy = pltpu.make_async_copy(self.refs["new"].at[pl.ds(first, 1)], target.at[pl.ds(0, 1)], sem)
                (copy.wait if wait else copy.start)()
                if self.pool_scales:
                    source, target = self.refs["new_scales"], self.refs["fresh_scales"].at[index]
                    copy = pltpu.make_async_copy(source.at[pl.ds(first, 1)], target.at[pl.ds(0, 1)], sem)
                    (copy.wait if wait else copy.start)()

    def send_output(self, first: jax.Array, count: jax.Array, index: jax.Array, *, wait: bool) -> None:
        buffer, sem = self.refs["o"].at[index], self.refs["o_sem"].at[index]

        def some(offset: Any, size: int) -> Any:
            return pltpu.make_async_copy(buffer.at[pl.ds(offset, size)], self.out.at[pl.ds(first + offset, size)], sem)

        self.tokens(count, self.blocks.tile_tokens, some, wait=wait)

    def finish_output(self, index: Any) -> None:
        """Wait until what was sent from this buffer has left it."""
        self.send_output(jnp.int32(0), self.refs["o_tokens"][index], index, wait=True)
        self.refs["o_tokens"][index] = 0

    def send_write(self, page: jax.Array, slot: jax.Array, index: Any) -> None:
        """Copy a tile of a page back to the pool."""
        for copy in self._stored(page, slot, index):
            copy.start()
        self.refs["writing"][index] = 1

    def finish_write(self, index: Any) -> None:
        @pl.when(self.refs["writing"][index] == 1)
        def _() -> None:
            for copy in self._stored(jnp.int32(0), jnp.int32(0), index):
                copy.wait()
            self.refs["writing"][index] = 0

    def _stored(self, page: jax.Array, slot: jax.Array, index: Any) -> list[Any]:
        sem, target = self.refs["write_sem"].at[index], self.pool.at[page, :, pl.ds(slot, self.layout.rows)]
        copies = [pltpu.make_async_copy(self.refs["stage"].at[index], target, sem)]
        for scales in self.pool_scales:
            target = scales.at[page, lax.div(slot, PIECE)]
            copies.append(pltpu.make_async_copy(self.refs["scales_stage"].at[index], target, sem))
        return copies

    def zero_padding(self) -> None:
        """Padding tokens come out as zeros, whatever the memory held."""
        first, tile = self.numbers[0], self.blocks.tile_tokens
        count = self.num_tokens - first

        @pl.when(count > 0)
        def _() -> None:
            self.refs["o"][0] = jnp.zeros(self.refs["o"].shape[1:], self.refs["o"].dtype)

        def some(index: jax.Array, _: None) -> None:
            begin = first + index * tile
            size = jnp.minimum(self.num_tokens - begin, tile)
            self.send_output(begin, size, jnp.int32(0), wait=False)
            self.send_output(begin, size, jnp.int32(0), wait=True)

        lax.fori_loop(0, lax.div(count + tile - 1, tile), some, None)

    # Writing chunks.

    def write_chunks(self) -> None:
        """Put the keys and values of rows of more than one token into their pages, one tile of a page after another."""
        rows = self.layout.rows

        def start(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            length, count = self.kv_len[row], self.query_start[row + 1] - self.query_start[row]
            return row, lax.div(self.num_slots(length - count), rows)

        def advance(row: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
            stays = (tile + 1) * rows < self.num_slots(self.kv_len[row])
            next_row, next_tile = start(self.next_chunk[jnp.minimum(row + 1, self.num_rows)])
            return jnp.where(stays, row, next_row), jnp.where(stays, tile + 1, next_tile)

        def fill(row: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """The tile's first new slot, the number of them, and the token of the first."""
            begin, length = self.query_start[row], self.kv_len[row]
            old = length - (self.query_start[row + 1] - begin)
            low = jnp.maximum(tile * rows, self.num_slots(old))
            count = jnp.minimum(tile * rows + rows, self.num_slots(length)) - low
            return low - tile * rows, count, begin + self.position(low) - old

        def place(row: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
            page = self.page(row, lax.div(tile * rows, self.case.page_size))
            return page, pl.multiple_of(lax.rem(tile * rows, self.case.page_size), rows)

        def fetch(row: jax.Array, tile: jax.Array, index: jax.Array, *, wait: bool) -> None:
            slot, count, token = fill(row, tile)
            buffer, sem = self.refs["fresh"].at[index], self.refs["fresh_sem"].at[index]

            def some(offset: Any, size: int) -> Any:
                source = self.refs["new"].at[pl.ds(token + offset * self.case.context, size)]
                return pltpu.make_async_copy(source, buffer.at[pl.ds(slot + offset, size)], sem)

            def some_scales(offset: Any, size: int) -> Any:
                source = self.refs["new_scales"].at[pl.ds(token + offset * self.case.context, size)]
                target = self.refs["fresh_scales"].at[index, pl.ds(slot + offset, size)]
                return pltpu.make_async_copy(source, target, sem)

            for copies in (some, some_scales) if self.pool_scales else (some,):
                if self.gives_parts:  # the tokens in between are the other devices'
                    one = functools.partial(copies, size=1)
                    lax.fori_loop(0, count, lambda i, _, one=one: one(i).wait() if wait else one(i).start(), None)
                else:
                    self.tokens(count, rows, copies, wait=wait)

            @pl.when(count < rows)
            def _() -> None:
                page, first = place(row, tile)
                source = self.pool.at[page, :, pl.ds(first, rows)]
                copy = pltpu.make_async_copy(source, self.refs["stage"].at[index], self.refs["read_sem"].at[index])
                (copy.wait if wait else copy.start)()
                for scales in self.pool_scales:
                    source, target = scales.at[page, lax.div(first, PIECE)], self.refs["scales_stage"].at[index]
                    copy = pltpu.make_async_copy(source, target, self.refs["read_sem"].at[index])
                    (copy.wait if wait else copy.start)()

        def fetch_if(ahead: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[jax.Array, jax.Array]:
            exists = ahead[0] < self.num_rows

            @pl.when(exists)
            def _() -> None:
                self.finish_write(index)
                fetch(*ahead, index, wait=False)

            row, tile = advance(*ahead)
            return jnp.where(exists, row, ahead[0]), jnp.where(exists, tile, ahead[1])

        def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            row, tile, ahead_row, ahead_tile, number = state
            ahead = fetch_if((ahead_row, ahead_tile), lax.rem(number + self.writes_ahead, self.layout.write_depth))
            index = lax.rem(number, self.layout.write_depth)
            fetch(row, tile, index, wait=True)
            slot, count, _ = fill(row, tile)
            self.flatten_fresh(index)
            which = lax.broadcasted_iota(jnp.int32, (rows, self.layout.width), 0)
            is_new = (which >= slot) & (which < slot + count)
            for head in range(self.case.num_kv_heads):
                fresh = _load(self.refs["fresh_flat"], pl.ds(head, rows, stride=self.layout.kv_heads))
                old = self.refs["stage"][index, head].astype(jnp.float32)
                self.refs["stage"][index, head] = _narrow(jnp.where(is_new, fresh, old), self.held_dtype)
            if self.pool_scales:
                shape = (rows, self.layout.scale_rows, LANES)
                token, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 2))
                own = lax.rem(lane, PIECE) == token
                fresh = jnp.sum(jnp.where(own, self.refs["fresh_scales"][index], 0.0), axis=0)
                place_of = lax.rem(lax.broadcasted_iota(jnp.int32, shape[1:], 1), PIECE)
                is_new = (place_of >= slot) & (place_of < slot + count)
                self.refs["scales_stage"][index] = jnp.where(is_new, fresh, self.refs["scales_stage"][index])
            self.send_write(*place(row, tile), index)
            return *advance(row, tile), *ahead, number + 1

        current = ahead = start(self.next_chunk[0])
        for index in range(self.writes_ahead):
            ahead = fetch_if(ahead, jnp.int32(index))
        lax.while_loop(lambda state: state[0] < self.num_rows, step, (*current, *ahead, jnp.int32(0)))
        for index in range(self.layout.write_depth):
            self.finish_write(index)

    def flatten_fresh(self, index: jax.Array) -> None:
        fresh = self.refs["fresh"][index].astype(jnp.float32)
        flat = self.refs["fresh_flat"]
        _store(flat, pl.ds(0, flat.shape[1]), fresh.reshape(flat.shape[1], -1))

    # Attention.

    def is_decode(self, row: jax.Array) -> jax.Array:
        return self.query_start[row + 1] - self.query_start[row] == 1

    def attend(self) -> None:
        slots = self.blocks.slots

        def fetch(ahead: Cursor, slot: jax.Array) -> Cursor:
            exists = ahead[0] < self.num_rows

            @pl.when(exists)
            def _() -> None:
                self.copy_block(ahead, slot, wait=False)

            after = self.advance((jnp.minimum(ahead[0], self.num_rows - 1), ahead[1], ahead[2]))
            row, first, page = (jnp.where(exists, new, old) for new, old in zip(after, ahead, strict=True))
            return row, first, page

        def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
            cursor, ahead, slot, index = state
            row, first, page = cursor
            previous = jnp.where(slot == 0, slots - 1, slot - 1)
            ahead = fetch(ahead, previous)
            begins = page == self.first_page(row, first)
            following = self.next_tile(row, first)

            @pl.when(begins)
            def _() -> None:
                self.copy_queries(row, first, index, wait=True)

                @pl.when(following[0] < self.num_rows)
                def _() -> None:
                    self.copy_queries(*following, 1 - index, wait=False)

            self.copy_block(cursor, slot, wait=True)
            after = self.advance(cursor)
            ends = (after[0] != row) | (after[1] != first)
            work = functools.partial(self.work, cursor, slot, index, begins, ends)
            if self.has_chunks:
                pl.when(self.is_decode(row))(functools.partial(work, decode=True))
                pl.when(jnp.logical_not(self.is_decode(row)))(functools.partial(work, decode=False))
            else:
                work(decode=True)
            return after, ahead, jnp.where(slot == slots - 1, 0, slot + 1), jnp.where(ends, 1 - index, index)

        cursor = ahead = self.start()

        @pl.when(cursor[0] < self.num_rows)
        def _() -> None:
            self.copy_queries(cursor[0], cursor[1], jnp.int32(0), wait=False)

        for slot in range(slots - 1):
            ahead = fetch(ahead, jnp.int32(slot))
        zero = jnp.int32(0)
        lax.while_loop(lambda state: state[0][0] < self.num_rows, step, (cursor, ahead, zero, zero))

    def work(
        self,
        cursor: Cursor,
        slot: jax.Array,
        index: jax.Array,
        begins: jax.Array,
        ends: jax.Array,
        *,
        decode: bool,
    ) -> None:
        """One block of keys for one tile of queries. index: the buffer of the tile's queries and outputs."""
        row, first, page = cursor
        count, position, last, oldest, slots_end = self.tile(row, first)
        offset = page * self.case.page_size
        alive, end = oldest - offset, slots_end - offset  # the block's keys that some query sees

        @pl.when(begins)
        def _() -> None:
            self.begin_tile(index, decode=decode)

        if decode and self.writes:
            writes = ends & (self.position(slots_end - 1) == last) if self.gives_parts else ends
            pl.when(writes)(functools.partial(self.write_decode, row, slots_end - 1, page, slot, index))
        if self.pool_scales:
            self.sort_scales(slot)

        # Every query sees every key, or some do not see some.
        partial = self.position(offset + self.block_keys - 1) > position
        if self.case.window is not None:
            partial |= self.position(offset) <= last - self.case.window

        @pl.when(partial)
        def _() -> None:
            if self.held_dtype != jnp.int8:  # of which every pattern is a finite number
                pl.when((alive > 0) | (end < self.block_keys))(functools.partial(self.clean, slot, alive, end))
            held = None
            if self.pool_scales:
                keys = lax.broadcasted_iota(jnp.int32, (1, self.block_keys), 1)
                held = (keys >= alive) & (keys < end)
            self.mix(slot, self.visible(position - self.position(offset), decode=decode), held, decode=decode)

        @pl.when(jnp.logical_not(partial))
        def _() -> None:
            self.mix(slot, None, None, decode=decode)

        @pl.when(ends)
        def _() -> None:
            self.finish_output(index)
            self.end_tile(index, decode=decode)
            self.send_output(first, count, index, wait=False)
            self.refs["o_tokens"][index] = count

    def rows(self, decode: bool) -> int:
        return self.layout.group if decode else self.group * self.blocks.tile_tokens

    def begin_tile(self, index: jax.Array, *, decode: bool) -> None:
        """Sort the queries by kv head, scaled, and start the running softmax.

        The rows of a kv head are its query heads, for a chunk one after another with a row for each token. Rows past
        the real ones hold what is there; nothing mixes rows, and they are never sent.
        """
        heads, rows, tile = self.layout.heads, self.rows(decode), self.blocks.tile_tokens
        flat, q_rows = self.refs["q_flat"], self.refs["q_rows"]
        most, weight = self.refs["most"], self.refs["weight"]
        if decode:
            _store(flat, pl.ds(0, heads), self.refs["q"][index, 0].astype(jnp.float32) * self.case.scale)
        else:

            def some(i: jax.Array, _: None) -> None:
                tokens = self.refs["q"][index, pl.ds(i * 8, 8)].astype(jnp.float32) * self.case.scale
                _store(flat, pl.ds(pl.multiple_of(i * 8 * heads, 8), 8 * heads), tokens.reshape(8 * heads, -1))

            lax.fori_loop(0, tile // 8, some, None)
        for kv_head in range(self.case.num_kv_heads):
            if decode:
                q_rows[kv_head, pl.ds(0, rows)] = _load(flat, pl.ds(kv_head * self.group, rows)).astype(self.dtype)
                continue
            for member in range(self.group):
                strided = _load(flat, pl.ds(kv_head * self.group + member, tile, stride=heads))
                q_rows[kv_head, pl.ds(member * tile, tile)] = strided.astype(self.dtype)
        self.refs["mixed"][:, pl.ds(0, rows)] = jnp.zeros(
            (self.case.num_kv_heads, rows, self.layout.value_lanes), jnp.float32
        )
        state = (self.case.num_kv_heads, rows, LANES)
        weight[:, pl.ds(0, rows)] = jnp.full(state, 1.0 if self.case.has_sinks else 0.0, jnp.float32)
        if not self.case.has_sinks:
            most[:, pl.ds(0, rows)] = jnp.full(state, MASKED, jnp.float32)
            return
        for head in range(self.case.num_heads):
            sink = self.refs["sinks"][pl.ds(head, 1)]
            kv_head, member = divmod(head, self.group)
            if decode:
                most[kv_head, pl.ds(member, 1)] = sink
            else:
                most[kv_head, pl.ds(member * tile, tile)] = jnp.broadcast_to(sink, (tile, LANES))

    def write_decode(self, row: jax.Array, newest: jax.Array, page: jax.Array, slot: jax.Array, index: Any) -> None:
        """Put a decode's key and value into the block at hand, and the tile around them back into the pool."""
        rows, pages = self.layout.rows, self.refs["pages"]
        logical = lax.div(newest, self.case.page_size)
        within = lax.rem(newest, self.case.page_size)
        first = pl.multiple_of(lax.div(within, rows) * rows, rows)
        self.finish_write(index)
        fresh = self.refs["fresh"][index, 0].astype(jnp.float32)
        is_new = lax.broadcasted_iota(jnp.int32, (rows, self.layout.width), 0) == within - first
        for head in range(self.case.num_kv_heads):
            place = (slot, logical - page, head, pl.ds(first, rows))
            old = pages[place].astype(jnp.float32)
            tile = jnp.where(is_new, jnp.broadcast_to(fresh[head : head + 1], old.shape), old)
            tile = _narrow(tile, self.held_dtype)
            pages[place] = tile
            self.refs["stage"][index, head] = tile
        if self.pool_scales:
            place = (slot, logical - page, lax.div(first, PIECE))
            old = self.refs["scales"][place]
            own = lax.rem(lax.broadcasted_iota(jnp.int32, old.shape, 1), PIECE) == within - first
            slab = jnp.where(own, self.refs["fresh_scales"][index, 0], old)
            self.refs["scales"][place] = slab
            self.refs["scales_stage"][index] = slab
        self.send_write(self.page(row, logical), first, index)

    def clean(self, slot: jax.Array, alive: jax.Array, end: jax.Array) -> None:
        """Zero what no query of the tile sees: weights of 0 do not cancel what a page's last owner may have left."""
        size = self.case.page_size
        inside = lax.broadcasted_iota(jnp.int32, (size, self.layout.width), 0)

        def page(index: jax.Array, _: None) -> None:
            before = index * size

            @pl.when((before < alive) | (before + size > end))
            def _() -> None:
                seen = (inside >= alive - before) & (inside < end - before)
                for head in range(self.case.num_kv_heads):
                    values = self.refs["pages"][slot, index, head].astype(jnp.float32)
                    self.refs["pages"][slot, index, head] = jnp.where(seen, values, 0.0).astype(self.held_dtype)

        lax.fori_loop(0, self.blocks.pages, page, None)

    def sort_scales(self, slot: jax.Array) -> None:
        """The scales of a block's keys, which lie tile after tile of tokens, into a row for each head and kind: the
        n-th of them, n = kinds * head + kind, is piece n % 4 of row n // 4 of every tile."""
        tiles = self.case.page_size // PIECE
        for first in range(0, self.blocks.pages * tiles, PIECES):
            slabs = [
                self.refs["scales"][(slot, *divmod(tile, tiles))]
                for tile in range(first, min(first + PIECES, self.blocks.pages * tiles))
            ]
            lane = lax.broadcasted_iota(jnp.int32, slabs[0].shape, 1)
            for piece in range(PIECES):
                row = slabs[0] if piece == 0 else pltpu.roll(slabs[0], (PIECES - piece) * PIECE, 1)
                for index, slab in enumerate(slabs[1:], 1):
                    turn = (index - piece) % PIECES * PIECE
                    row = jnp.where(lane >= index * PIECE, slab if turn == 0 else pltpu.roll(slab, turn, 1), row)
                self.refs["head_scales"][piece, :, pl.ds(first * PIECE, LANES)] = row

    def scales_of(self, head: Any, kind: int) -> jax.Array:
        """[1, keys] of the block at hand, a head's keys' (kind 0) or values'."""
        row, piece = divmod(head * self.layout.kinds + kind, PIECES)
        return self.refs["head_scales"][piece, pl.ds(row, 1), pl.ds(0, self.block_keys)]

    def visible(self, position: jax.Array, *, decode: bool) -> jax.Array:
        """[1 or tile_tokens, keys]: which keys of a block each query sees; position: the first query's, counted from
        that of the block's first key."""
        shape = (1 if decode else self.blocks.tile_tokens, self.block_keys)
        keys = self.case.context * lax.broadcasted_iota(jnp.int32, shape, 1)
        own = position + lax.broadcasted_iota(jnp.int32, shape, 0)
        seen = keys <= own
        if self.case.window is not None:
            seen &= keys > own - self.case.window
        return seen

    def mix(self, slot: jax.Array, seen: jax.Array | None, held: jax.Array | None, *, decode: bool) -> None:
        """Take a block of keys and values into the running softmax of every head.

        seen: of `visible`, and held [1, keys], which some query sees (of quantized ones, whose scales elsewhere may be
        anything); None where every query sees every key.
        """
        one = functools.partial(self.mix_head, slot, seen=seen, held=held, decode=decode)
        if decode and self.case.num_kv_heads <= 8:
            for head in range(self.case.num_kv_heads):
                one(head)
        else:
            lax.fori_loop(0, self.case.num_kv_heads, lambda head, _: one(head), None)

    def mix_head(
        self, slot: jax.Array, head: Any, *, seen: jax.Array | None, held: jax.Array | None, decode: bool
    ) -> None:
        layout, rows = self.layout, self.rows(decode)
        place = (head, pl.ds(0, rows))
        precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else lax.Precision.DEFAULT
        multiply = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        values_at = pl.ds(layout.value_first, layout.value_lanes)
        keys = self.refs["pages"][slot, :, head, :, pl.ds(0, layout.key_lanes)].reshape(self.block_keys, -1)
        values = self.refs["pages"][slot, :, head, :, values_at].reshape(self.block_keys, -1)
        if self.pool_scales:
            keys, values = (part.astype(jnp.float32).astype(self.dtype) for part in (keys, values))
        logits = multiply(self.refs["q_rows"][place], keys, (((1,), (1,)), ((), ())))
        if self.pool_scales:
            logits *= self.scales_of(head, 0)
        if self.case.soft_cap is not None:
            logits = self.case.soft_cap * jnp.tanh(logits / self.case.soft_cap)
        if seen is not None and decode:
            logits = jnp.where(seen, logits, MASKED)
        elif seen is not None:
            by_head = logits.reshape(self.group, self.blocks.tile_tokens, self.block_keys)
            logits = jnp.where(seen, by_head, MASKED).reshape(logits.shape)
        old_most = self.refs["most"][place]
        most = jnp.maximum(old_most, jnp.max(logits, axis=1, keepdims=True))
        keep = jnp.exp(old_most - most)
        weights = jnp.exp(logits - most[:, :1])
        shares = weights
        if self.pool_scales:
            scales = self.scales_of(head, self.layout.kinds - 1)
            shares = weights * (scales if held is None else jnp.where(held, value_scales(scales), 0.0))
        mixed = multiply(shares.astype(self.dtype), values, (((1,), (0,)), ((), ())))
        self.refs["most"][place] = most
        self.refs["weight"][place] = self.refs["weight"][place] * keep + jnp.sum(weights, axis=1, keepdims=True)
        self.refs["mixed"][place] = self.refs["mixed"][place] * keep[:, :1] + mixed

    def end_tile(self, index: jax.Array, *, decode: bool) -> None:
        """Divide by the weights, and sort by token."""
        heads, rows, tile = self.layout.heads, self.rows(decode), self.blocks.tile_tokens
        flat, o = self.refs["o_flat"], self.refs["o"]
        for kv_head in range(self.case.num_kv_heads):
            place = (kv_head, pl.ds(0, rows))
            out = self.refs["mixed"][place] / self.refs["weight"][place][:, :1]
            if self.gives_parts:
                out = self.part(out, self.refs["most"][place], self.refs["weight"][place])
            if decode:
                # Rows past the group's are the next group's to overwrite.
                _store(flat, pl.ds(kv_head * self.group, rows), out)
                continue
            for member in range(self.group):
                own = out[member * tile : (member + 1) * tile]
                _store(flat, pl.ds(kv_head * self.group + member, tile, stride=heads), own)
        if decode:
            o[index, 0] = _load(flat, pl.ds(0, heads)).astype(o.dtype)
            return

        def some(i: jax.Array, _: None) -> None:
            tokens = _load(flat, pl.ds(pl.multiple_of(i * 8 * heads, 8), 8 * heads))
            o[index, pl.ds(i * 8, 8)] = tokens.reshape(8, heads, -1).astype(o.dtype)

        lax.fori_loop(0, tile // 8, some, None)

    def part(self, out: jax.Array, most: jax.Array, weight: jax.Array) -> jax.Array:
        """What is mixed, and behind it a tile of lanes that all hold the log of the sum of exponentials; 0 and -inf
        where a query saw no key of this device."""
        seen = most > MASKED
        lse = jnp.where(seen, most + jnp.log(weight), -jnp.inf)
        return jnp.concatenate([jnp.where(seen[:, :1], out, 0.0), lse], axis=1)
