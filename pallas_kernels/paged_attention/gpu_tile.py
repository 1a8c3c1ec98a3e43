"""What the GPU kernels share: a tile of queries, the pages of its row, and the writing of its tokens."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_layout import Layout
from pallas_kernels.paged_attention.tpu_layout import Case

KINDS = "keys", "values"


def copy_piece(source: Any, target: Any, barrier: Any) -> None:
    """One piece of memory to shared memory: without a promise about bounds it would go as a tensor, whose rows begin at
    multiples of 128 bytes and have up to 256 numbers."""
    plgpu.copy_gmem_to_smem(source, target, barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


class Tile:
    """A tile's place in its row, and the row's pages.

    memory: the references, by the names of gpu.py; width: pages of a row's table; index: of the tile. Positions are
    counted from the first that this device has a key of, and slots are where its keys are: of `context` positions, one.
    """

    def __init__(self, case: Case, layout: Layout, memory: dict[str, Any], width: int, index: jax.Array) -> None:
        self.case, self.layout, self.memory, self.width, self.tile = case, layout, memory, width, index
        self.heads = lax.axis_index("heads")
        self.head = lax.div(self.heads, layout.parts)
        names = "row", "start", "count", "position", "cached"
        self.row, self.start, self.count, self.position, self.cached = (memory[name][index] for name in names)
        self.end = self.slots_before(self.position + self.count)

    def slots_before(self, position: jax.Array) -> jax.Array:
        context = self.case.context
        return position if context == 1 else lax.div(position + (context - 1), context)

    def page(self, logical: jax.Array) -> jax.Array:
        """The page in the pool of one of the row's, counted from its sequence's first."""
        return self.memory["table"][self.row * self.width + lax.rem(logical, self.width)]

    @property
    def writes(self) -> jax.Array:
        """Whether this program writes its kv head's tokens: of several that share the head, one does."""
        return lax.rem(self.heads, self.layout.parts) == 0

    def write(self, stage: Any, barrier: Any, skipped: jax.Array | None = None) -> None:
        """Put the tile's own keys and values into their pages: all, or as many as the stage [kinds, tokens, lanes] has
        room for after those that are skipped."""
        first, room = self.slots_before(self.position), stage.shape[1]
        if skipped is not None:
            first += skipped
        token, count = self.start + first - self.cached, self.end - first
        if skipped is not None:
            count = lax.min(count, room)

        def fetch(index: jax.Array, _: None) -> None:
            for kind in range(self.layout.kinds):
                source = self.memory[f"new_{KINDS[kind]}"]
                copy_piece(source.at[token + index, self.head], stage.at[kind, index], barrier)

        lax.fori_loop(0, room, fetch, None)
        plgpu.barrier_wait(barrier)

        def one(index: jax.Array, _: None) -> None:
            slot = first + index
            page, within = self.page(lax.div(slot, self.case.page_size)), lax.rem(slot, self.case.page_size)
            for kind in range(self.layout.kinds):
                place = page, kind, self.head, within
                plgpu.copy_smem_to_gmem(stage.at[kind, index], self.memory["pool"].at[place])
                if self.case.kv_dtype is not None:
                    self.memory["scales"][place] = self.memory["new_scales"][kind, self.head, token + index]

        lax.fori_loop(0, count, one, None)
        plgpu.wait_smem_to_gmem(0)
