"""The body of the GPU kernel for decodes, and for the chunks that gpu_chunks.py does not serve: one tile of queries,
heads of one kv head, one share of the keys. See gpu.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.gpu_turns import WARPGROUPS
from pallas_kernels.paged_attention.gpu_layout import ALIGNMENT, TILE_ROWS, Blocks, Layout
from pallas_kernels.paged_attention.gpu_tile import KINDS, Tile, copy_piece
from pallas_kernels.paged_attention.tpu_layout import Case

MASKED = -1e30  # finite: a block of which a query sees nothing yields numbers, which are then weighed with 0
_LOG2_E = math.log2(math.e)

_COLUMNS = 128  # lanes of the mixed values in one accumulator
_CLEANED = 64  # lanes that are cleaned at a time, beside accumulators in registers

Mixed = tuple[jax.Array, ...]  # a warpgroup's share of the mixed values, [64, up to 128 lanes] each
# Of the running softmax, by row: the largest logit, to base 2; the sum of weights; what earlier sums are scaled by.
_MOST, _WEIGHT, _KEEP = range(3)
_BY_ROW, _BY_KEY = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def _matrix(rows: tuple[int, ...], lanes: int, dtype: Any) -> Any:
    """Shared memory for matrices, as tensor cores and the copies of 128 bytes read them; 64 where lanes are so few."""
    width = _swizzle(lanes, dtype)
    # JAX leaves a method of their base class abstract, that these are never asked for.
    tiling = plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM((*rows, lanes), dtype, transforms=(tiling, swizzle))


def _swizzle(lanes: int, dtype: Any) -> int:
    """Bytes of a row of a tile."""
    return 128 if lanes * jnp.dtype(dtype).itemsize % 128 == 0 else 64


@dataclass(frozen=True)
class Kernel:
    """What is static: sizes in elements, and the references' names.

    size       tokens of a tile
    rows       its rows that are copied: query heads of its tokens, in whole tiles of 8
    splits     programs that share the keys of a tile
    width      pages of a row's table
    names      of the references that `run` gets
    decodes    whether the tiles are rows of one token
    simulated  without what JAX's simulation does not know; see `add`
    """

    case: Case
    layout: Layout
    blocks: Blocks
    size: int
    rows: int
    splits: int
    width: int
    names: tuple[str, ...]
    decodes: bool
    simulated: bool

    @property
    def writes(self) -> bool:
        """Whether this step's keys and values are given."""
        return "new_keys" in self.names

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.case.dtype)

    @property
    def held(self) -> Any:
        """The dtype of the pool."""
        return jnp.dtype(self.case.kv_dtype or self.case.dtype)

    @property
    def quantized(self) -> bool:
        return self.case.kv_dtype is not None

    @property
    def warpgroups(self) -> int:
        return self.layout.warpgroups

    @property
    def own_lanes(self) -> int:
        """Lanes of the mixed values that a warpgroup has."""
        return self.layout.value_lanes // self.layout.warpgroups

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """First lane and lanes of each accumulator of a warpgroup's mixed values."""
        return [(first, min(_COLUMNS, self.own_lanes - first)) for first in range(0, self.own_lanes, _COLUMNS)]

    def run(self, *refs: Any) -> None:
        """References in memory: of `_call`'s arguments, then the outputs, each by split, tile and heads."""
        memory = dict(zip(self.names, refs, strict=True))

        @pl.when(memory["count"][lax.axis_index("tile")] > 0)
        def _() -> None:
            scratch = self.scratch()

            def attend(*buffers: Any) -> tuple[Mixed, jax.Array, jax.Array]:
                return _Program(self, memory, dict(zip(scratch, buffers, strict=True))).attend()

            mixed, most, weight = _scoped(attend, *scratch.values())
            program = _Program(self, memory, {})
            if self.writes:
                stage = plgpu.SMEM((self.layout.kinds, self.size, self.layout.lanes), self.held)
                barrier = plgpu.Barrier(num_arrivals=self.layout.kinds * self.size)
                last = program.writes & (program.split == self.splits - 1) & (program.warpgroup == 0)
                _scoped(lambda *buffers: pl.when(last)(lambda: program.write(*buffers)), stage, barrier)
            _scoped(
                functools.partial(program.send, mixed, most, weight),
                _matrix((self.layout.warpgroups, TILE_ROWS), self.own_lanes, memory["out"].dtype),
                plgpu.SMEM((TILE_ROWS,), jnp.float32),
            )

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers while keys are walked. gpu_layout.shared_bytes counts the former."""
        keys, kinds, slots = self.blocks.keys, self.layout.kinds, self.blocks.slots
        copies = kinds * (2 if self.quantized else 1)  # of a page, and of a block of new keys
        scratch = {
            "q": _matrix((TILE_ROWS,), self.layout.lanes, self.dtype),
            "keys": _matrix((slots, keys), self.layout.lanes, self.held),
            "weights": _matrix((TILE_ROWS,), keys, self.dtype),
            "state": plgpu.SMEM((3, TILE_ROWS), jnp.float32),
            "q_there": plgpu.Barrier(),
            "there": plgpu.Barrier(num_arrivals=copies * keys // self.case.page_size, num_barriers=slots),
            "new_there": plgpu.Barrier(num_arrivals=copies),
        }
        if kinds > 1:
            scratch["values"] = scratch["keys"]
        if self.quantized:
            scratch["scales"] = plgpu.SMEM((slots, kinds, keys), jnp.float32)
            scratch["wide"] = _matrix((keys,), self.layout.lanes, self.dtype)
        if self.layout.warpgroups > 1:
            scratch["met"] = plgpu.Barrier(num_arrivals=self.layout.warpgroups)
        return scratch


def _scoped(function: Callable[..., Any], *buffers: Any) -> Any:
    return pl.run_scoped(function, *buffers, collective_axes=WARPGROUPS)


class _Program(Tile):
    """One program's work, on every warpgroup of it. The first leads: it begins all copies, and turns queries and keys
    into weights; each mixes its own lanes of the values.

    refs: shared memory and barriers while keys are walked.
    """

    def __init__(self, kernel: Kernel, memory: dict[str, Any], refs: dict[str, Any]) -> None:
        super().__init__(kernel.case, kernel.layout, memory, kernel.width, lax.axis_index("tile"))
        self.kernel, self.blocks, self.refs = kernel, kernel.blocks, refs
        self.split, self.warpgroup = lax.axis_index("split"), lax.axis_index(WARPGROUPS)

    def leads(self, function: Callable[[], None]) -> None:
        """Run it on the first warpgroup."""
        if self.layout.warpgroups == 1:
            function()
        else:
            pl.when(self.warpgroup == 0)(function)

    def meet(self) -> None:
        """Let no warpgroup go on before all have come here, and see what the others wrote."""
        plgpu.commit_smem()
        if self.layout.warpgroups > 1:
            plgpu.barrier_arrive(self.refs["met"])
            plgpu.barrier_wait(self.refs["met"])

    def lanes(self, first: int, size: int) -> Any:
        """Lanes of the values, of this warpgroup's own."""
        if self.layout.warpgroups == 1:
            return pl.ds(first, size)
        return pl.ds(pl.multiple_of(self.warpgroup * self.kernel.own_lanes + first, 64), size)

    def attend(self) -> tuple[Mixed, jax.Array, jax.Array]:
        """Walk this split's blocks of pages, then, in the last split, the blocks of new tokens. Returns sums of values,
        and by row the largest logit, to base 2, and the sum of weights."""
        block_keys, slots, window = self.blocks.keys, self.blocks.slots, self.case.window
        oldest = jnp.int32(0)
        if window is not None:
            oldest = self.slots_before(jnp.maximum(self.position - window + 1, 0))
        held = self.cached if self.kernel.writes else self.end  # tokens that are read from pages
        begin, end = lax.div(oldest, block_keys), lax.div(held + block_keys - 1, block_keys)
        share = lax.div(jnp.maximum(end - begin, 0) + self.kernel.splits - 1, self.kernel.splits)
        begin = begin + self.split * share
        end = jnp.minimum(begin + share, end)

        def fetch(block: jax.Array, slot: Any) -> None:
            @pl.when(block < end)
            def _() -> None:
                self.leads(lambda: self.copy_block(block, lax.div(held - 1, self.case.page_size), slot))

        for slot in range(slots):
            fetch(begin + slot, slot)
        queries = self.memory["queries"].at[self.tile, self.heads]
        self.leads(
            lambda: plgpu.copy_gmem_to_smem(
                queries, self.refs["q"].at[pl.ds(0, self.kernel.rows)], self.refs["q_there"]
            )
        )
        plgpu.barrier_wait(self.refs["q_there"])

        @self.leads
        def _() -> None:
            for name, value in ((_MOST, MASKED), (_WEIGHT, 0.0)):
                self.refs["state"][name] = plgpu.layout_cast(jnp.full((TILE_ROWS,), value, jnp.float32), _BY_ROW)

        self.meet()

        def step(index: jax.Array, mixed: Mixed) -> Mixed:
            slot = lax.rem(index, slots)
            block = begin + index
            plgpu.barrier_wait(self.refs["there"].at[slot])
            mixed = self.mix(slot, block * block_keys, oldest, held, mixed)
            self.meet()  # all are done with the slot
            fetch(block + slots, slot)
            return mixed

        mixed = tuple(
            plgpu.layout_cast(jnp.zeros((TILE_ROWS, lanes), jnp.float32), plgpu.Layout.WGMMA)
            for _, lanes in self.kernel.pieces
        )
        mixed = lax.fori_loop(0, jnp.maximum(end - begin, 0), step, mixed)
        if self.kernel.writes:
            mixed = self.attend_new(oldest, mixed)
        most, weight = map(self.state, (_MOST, _WEIGHT))
        return mixed, most, weight

    def attend_new(self, oldest: jax.Array, mixed: Mixed) -> Mixed:
        """The blocks of this step's own keys, which are read from where the model left them."""
        block_keys = self.blocks.keys
        # Tiles of shared memory are filled from tiles of memory: so from a multiple of 8, within other rows' tokens.
        aligned = lax.div(self.start, ALIGNMENT) * ALIGNMENT
        zeroth = self.cached - (self.start - aligned)  # slot that the first key would have
        oldest = jnp.maximum(oldest, self.cached)
        begin, end = lax.div(oldest - zeroth, block_keys), lax.div(self.end - zeroth - 1, block_keys) + 1
        end = jnp.where((self.split == self.kernel.splits - 1) & (self.end > oldest), end, begin)

        # A decode's own key is in the first rows; what is behind them in the block is not seen.
        copied = ALIGNMENT if self.kernel.decodes else block_keys

        def copy(token: jax.Array, slot: jax.Array) -> None:
            for kind in range(self.layout.kinds):
                some = self.memory[f"new_{KINDS[kind]}"].at[pl.ds(token, copied), self.head]
                target = self.refs[KINDS[kind]].at[slot].at[pl.ds(0, copied)]
                plgpu.copy_gmem_to_smem(some, target, self.refs["new_there"])
                if self.kernel.quantized:
                    scales = self.memory["new_scales"].at[kind, self.head].at[pl.ds(token, copied)]
                    target = self.refs["scales"].at[slot, kind].at[pl.ds(0, copied)]
                    copy_piece(scales, target, self.refs["new_there"])

        def step(block: jax.Array, mixed: Mixed) -> Mixed:
            slot = lax.rem(block, self.blocks.slots)
            self.leads(lambda: copy(pl.multiple_of(aligned + block * block_keys, ALIGNMENT), slot))
            plgpu.barrier_wait(self.refs["new_there"])
            mixed = self.mix(slot, zeroth + block * block_keys, oldest, self.end, mixed)
            self.meet()
            return mixed

        return lax.fori_loop(begin, end, step, mixed)

    def copy_block(self, block: jax.Array, last_page: jax.Array, slot: Any) -> None:
        """Every copy of a block is made, for the barrier counts them; past the last page, it is of that one again."""
        size, there = self.case.page_size, self.refs["there"].at[slot]
        pages = self.blocks.keys // size
        for index in range(pages):
            logical = jnp.minimum(block * pages + index, last_page)
            page = self.page(logical)
            within = pl.ds(index * size, size)
            for kind in range(self.layout.kinds):
                source = self.memory["pool"].at[page, kind, self.head]
                plgpu.copy_gmem_to_smem(source, self.refs[KINDS[kind]].at[slot].at[within], there)
                if self.kernel.quantized:
                    source = self.memory["scales"].at[page, kind, self.head]
                    copy_piece(source, self.refs["scales"].at[slot, kind].at[within], there)

    def mix(self, slot: Any, offset: jax.Array, oldest: jax.Array, end: jax.Array, mixed: Mixed) -> Mixed:
        """Take a block of keys and values, whose first key is in slot `offset`, into the running softmax.

        oldest, end: the slots that some query may see.
        """
        value = self.layout.kinds - 1
        values = self.refs["wide"] if self.kernel.quantized else self.refs[KINDS[value]].at[slot]

        def lead() -> None:
            if self.kernel.quantized:
                self.widen(slot, 0, offset, oldest, end)
            else:
                pl.when((offset < oldest) | (offset + self.blocks.keys > end))(
                    lambda: self.clean(values, offset, oldest, end)
                )
            self.weigh(slot, offset, oldest, end)
            if self.kernel.quantized and value:
                plgpu.commit_smem()  # all warps are done with the keys
                self.widen(slot, value, offset, oldest, end)

        self.leads(lead)
        self.meet()
        keep = self.state(_KEEP)
        return tuple(
            self.add(old * lax.broadcast_in_dim(keep, old.shape, [0]), values.at[:, self.lanes(*place)])
            for place, old in zip(self.kernel.pieces, mixed, strict=True)
        )

    def add(self, mixed: jax.Array, values: Any) -> jax.Array:
        """mixed + weights @ values. JAX's simulation knows no accumulator that begins with a value."""

        def accumulate(total: Any) -> None:
            plgpu.wgmma(total, self.refs["weights"], values)

        if not self.kernel.simulated:
            run: Any = pl.run_state(accumulate)
            return run(plgpu.WGMMAAccumulatorRef.init(mixed))

        def multiply(total: Any) -> jax.Array:
            accumulate(total)
            return total[...]

        return mixed + pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE_ROWS, mixed.shape[1]), jnp.float32))

    def state(self, index: int) -> jax.Array:
        """A number of each row of the running softmax."""
        return plgpu.load(self.refs["state"].at[index], layout=_BY_ROW)

    def clean(self, values: Any, offset: jax.Array, oldest: jax.Array, end: jax.Array) -> None:
        """Zero what no query sees: weights of 0 do not cancel what a page's last owner may have left."""
        for first in range(0, self.layout.value_lanes, _CLEANED):
            lanes = pl.ds(first, _CLEANED)
            held = plgpu.load(values.at[:, lanes], layout=plgpu.Layout.WGMMA)
            place = offset + plgpu.broadcasted_iota(jnp.int32, held.shape, 0, layout=plgpu.Layout.WGMMA)
            alive = (place >= oldest) & (place < end)
            values[:, lanes] = jnp.where(alive, held.astype(jnp.float32), 0.0).astype(held.dtype)
        plgpu.commit_smem()

    def widen(self, slot: Any, kind: int, offset: jax.Array, oldest: jax.Array, end: jax.Array) -> None:
        """Keys or values of 8 bits, as the tensor cores read them; their scales are for logits and weights. Of float8
        what no query sees is 0, as in `clean`; every pattern of int8 is a finite number."""
        held, wide, size = self.refs[KINDS[kind]].at[slot], self.refs["wide"], _swizzle(self.layout.lanes, jnp.int8)
        layout = plgpu.Layout.WGMMA_UPCAST_2X

        def some(index: jax.Array, _: None) -> None:
            lanes = pl.ds(pl.multiple_of(index * size, size), size)
            part = plgpu.load(held.at[:, lanes], layout=layout)
            if self.kernel.held != jnp.int8:
                part = part.astype(jnp.float16).astype(jnp.float32)  # as the instructions have it
                place = offset + plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=layout)
                part = jnp.where((place >= oldest) & (place < end), part, 0.0)
            wide[:, lanes] = part.astype(wide.dtype)

        lax.fori_loop(0, self.layout.lanes // size, some, None)
        plgpu.commit_smem()

    def scales(self, slot: Any, kind: int, shape: tuple[int, int]) -> jax.Array:
        """Of a block's keys or values, the same in every row."""
        row = plgpu.load(self.refs["scales"].at[slot, kind], layout=_BY_KEY)
        return lax.broadcast_in_dim(row, shape, [1])

    def weigh(self, slot: Any, offset: jax.Array, oldest: jax.Array, end: jax.Array) -> None:
        """Weights of a block, by which the running softmax goes on; they pass through shared memory, since JAX's
        simulation knows no WGMMA from registers."""
        keys = self.refs["wide"] if self.kernel.quantized else self.refs["keys"].at[slot]
        shape = (TILE_ROWS, self.blocks.keys)

        def multiply(total: Any) -> jax.Array:
            plgpu.wgmma(total, self.refs["q"], keys.transpose((1, 0)))
            return total[...]

        logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32)) * self.case.scale
        if self.kernel.quantized:
            logits *= self.scales(slot, 0, shape)
        if self.case.soft_cap is not None:
            logits = self.case.soft_cap * jnp.tanh(logits / self.case.soft_cap)
        layout, context = plgpu.Layout.WGMMA, self.case.context
        token = lax.div(plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout), self.layout.group)
        place = offset + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        seen = (place >= oldest) & (place < end) & (context * place <= self.position + token)
        if self.case.window is not None:
            seen &= context * place > self.position + token - self.case.window
        logits = jnp.where(seen, logits * _LOG2_E, -jnp.inf)
        old_most, weight = map(self.state, (_MOST, _WEIGHT))
        most = jnp.maximum(old_most, jnp.max(logits, axis=1))
        keep = jnp.exp2(old_most - most)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(most, shape, [0]))
        self.refs["state"][_MOST] = most
        self.refs["state"][_WEIGHT] = weight * keep + jnp.sum(weights, axis=1)
        self.refs["state"][_KEEP] = keep
        if self.kernel.quantized:  # scales that are not finite are of keys that are not, or of none
            scales = self.scales(slot, self.layout.kinds - 1, shape)
            weights = jnp.where(seen & (scales < jnp.inf), weights * scales, 0.0)
        self.refs["weights"][...] = weights.astype(self.kernel.dtype)

    def send(self, mixed: Mixed, most: jax.Array, weight: jax.Array, mixed_smem: Any, lse_smem: Any) -> None:
        """The mixed values and log-sum-exps, which are finite for the rows that saw a key."""
        total = jnp.where(weight == 0.0, 1.0, weight)
        own = mixed_smem.at[self.warpgroup]
        for (first, size), part in zip(self.kernel.pieces, mixed, strict=True):
            result = part / lax.broadcast_in_dim(total, part.shape, [0])
            own[:, pl.ds(first, size)] = result.astype(own.dtype)
        self.leads(
            lambda: lse_smem.__setitem__(..., jnp.where(weight == 0.0, -jnp.inf, most / _LOG2_E + jnp.log(total)))
        )
        plgpu.commit_smem()
        place = self.split, self.tile, self.heads
        target = self.memory["out"].at[place].at[:, self.lanes(0, self.kernel.own_lanes)]
        plgpu.copy_smem_to_gmem(own.at[pl.ds(0, self.kernel.rows)], target)
        self.leads(lambda: plgpu.copy_smem_to_gmem(lse_smem, self.memory["lse"].at[place]))
        plgpu.wait_smem_to_gmem(0)
