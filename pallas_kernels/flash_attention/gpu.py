"""Flash attention for Hopper GPUs (Mosaic GPU, sm_90), as in FlashAttention-3, arXiv:2407.08608.

A program serves 128 queries of one head with three warpgroups. One only copies: blocks of keys and values, by the
tensor memory accelerator, into a ring of buffers. The other two have 64 queries each, and take turns at the tensor
cores: while one multiplies, the other is at its softmax. The weights go from registers into the second product
(gpu_turns.py).

Blocks that every query of the program sees whole are not masked; those of which none sees anything are not visited.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.flash_attention.cases import FlashCase
from pallas_kernels.flash_attention.gpu_turns import BY_ROW, GROUPS, ROWS, WARPGROUPS, State, Turns, buffers, split
from pallas_kernels.flash_attention.reference import Segments, check
from pallas_kernels.flash_attention.xla import visible_blocks

DTYPES = ("bfloat16", "float16")
HEAD_MULTIPLE = 64  # 128 bytes, the widest swizzle, of a 16-bit type
MAX_HEAD_DIM = 256
_QUERIES = GROUPS * ROWS


@dataclass(frozen=True)
class Blocks:
    """Sizes the kernel works in: keys of a block, and how many blocks shared memory holds."""

    keys: int
    slots: int


def supports(case: FlashCase) -> str | None:
    """None, or the reason why the kernel cannot serve the case."""
    if case.fault() is not None:
        return case.fault()
    if (reason := mosaic_gpu.refusal()) is not None:
        return reason
    if case.dtype not in DTYPES:
        return f"dtype {case.dtype} is not one of {', '.join(DTYPES)}"
    if case.scale <= 0:
        return f"scale {case.scale} is not above 0"
    if max(case.head_dim, case.value_dim) > MAX_HEAD_DIM:
        return f"head dims {case.head_dim} and {case.value_dim} are not in 1..{MAX_HEAD_DIM}"
    return None


@functools.cache
def _tuned() -> dict[str, int]:
    return json.loads((Path(__file__).parent / "tuned" / "gpu_default.json").read_text())["blocks"]


def choose_blocks(case: FlashCase) -> Blocks:
    table = _tuned()
    wide = max(case.head_dim, case.value_dim) > 128
    return Blocks(table["keys_above_128_lanes"] if wide else table["keys"], table["slots"])


def flash_attention(
    case: FlashCase,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_start: jax.Array | int = 0,
    kv_start: jax.Array | int = 0,
    segments: Segments | None = None,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The contract is reference.flash_attention's. blocks: other than the table's; interpret: an `InterpretGPUParams`,
    to simulate on a CPU."""
    reason = supports(case)
    if reason is not None:
        raise ValueError(f"the GPU kernel cannot serve {case}: {reason}")
    check(case, q, k, v, segments)
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    blocks = blocks or choose_blocks(case)
    if case.causal:
        v = _without_unseen(case, v, q_start - kv_start, num_queries)
    q, k, v = _padded(q, _QUERIES), _padded(k, blocks.keys), _padded(v, blocks.keys)
    starts = jnp.stack([jnp.int32(q_start), jnp.int32(kv_start)])
    of_segments = () if segments is None else (_long(segments[0], _QUERIES), _long(segments[1], blocks.keys))
    kernel = Kernel(case, blocks, num_queries, num_keys, q.shape[-1], v.shape[-1], simulated=interpret is not None)
    out, lse = plgpu.kernel(
        kernel.run,
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), q.dtype),
            jax.ShapeDtypeStruct((batch, case.num_heads, q.shape[1]), jnp.float32),
        ],
        grid=(case.num_heads, q.shape[1] // _QUERIES, batch),
        grid_names=("head", "tile", "batch"),
        num_threads=GROUPS + 1,
        thread_name=WARPGROUPS,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **mosaic_gpu.cost(_cost(case, batch, num_queries, num_keys)),
        interpret=interpret,
        kernel_name="flash_attention",
    )(q, k, v, *of_segments, starts)
    return out[:, :num_queries, :, : case.value_dim], lse[..., :num_queries].swapaxes(1, 2)


def _long(array: jax.Array, multiple: int) -> jax.Array:
    """Zeros behind the tokens, up to a whole number of blocks."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % multiple), *((0, 0),) * (array.ndim - 2)))


def _padded(array: jax.Array, multiple: int) -> jax.Array:
    """The same, and zeros behind the head dim, up to whole tiles."""
    return _long(jnp.pad(array, ((0, 0),) * 3 + ((0, -array.shape[3] % HEAD_MULTIPLE),)), multiple)


def _without_unseen(case: FlashCase, v: jax.Array, first: jax.Array | int, num_queries: int) -> jax.Array:
    """Values of keys that no query of the call sees as 0, since a weight of 0 does not cancel a NaN. first: the slot of
    the newest key that the first query sees. Nothing is done where all are seen, which is known of whole sequences."""
    oldest, end = 0 if case.window is None else first - case.window + 1, first + num_queries
    if isinstance(oldest, int) and isinstance(end, int) and oldest <= 0 and end >= v.shape[1]:
        return v
    slot = jnp.arange(v.shape[1])
    return jnp.where(((slot >= oldest) & (slot < end))[None, :, None, None], v, 0)


def _cost(case: FlashCase, batch: int, num_queries: int, num_keys: int) -> pl.CostEstimate:
    """As if both parts of the context began at the same position."""
    pairs = num_queries * num_keys
    if case.causal:
        pairs -= min(num_queries, num_keys) ** 2 // 2
    if case.window is not None:
        pairs = min(pairs, num_queries * case.window)
    pairs *= batch * case.num_heads
    lanes = case.head_dim + case.value_dim
    moved = batch * num_queries * case.num_heads * lanes + pairs // _QUERIES * lanes
    return pl.CostEstimate(
        flops=2 * pairs * lanes,
        transcendentals=pairs * (1 if case.soft_cap is None else 2),
        bytes_accessed=2 * moved + 4 * batch * num_queries * case.num_heads,
    )


@dataclass(frozen=True)
class Kernel:
    """What is static: sizes in elements. simulated: without what JAX's simulation does not know; see gpu_turns.py."""

    case: FlashCase
    blocks: Blocks
    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int
    simulated: bool

    def run(self, q: Any, k: Any, v: Any, *refs: Any) -> None:
        """References in memory: of the call's arguments, then the outputs."""
        segments, (starts, out, lse) = refs[:-3], refs[-3:]
        scratch = buffers(
            self.blocks.keys,
            self.blocks.slots,
            self.head_dim,
            self.value_dim,
            jnp.dtype(self.case.dtype),
            simulated=self.simulated,
        )

        def body(*held: Any) -> None:
            named = dict(zip(scratch, held, strict=True))
            own = _Program(self, (q, k, v, *segments), starts, out, lse, named)
            split(own.copy, own.attend)

        pl.run_scoped(body, *scratch.values(), collective_axes=WARPGROUPS)


class _Program:
    """One program's work. arrays: queries, keys, values and segments, in memory; refs: in shared memory, barriers."""

    def __init__(
        self, kernel: Kernel, arrays: tuple[Any, ...], starts: Any, out: Any, lse: Any, refs: dict[str, Any]
    ) -> None:
        self.kernel, self.case, self.refs, self.out, self.lse = kernel, kernel.case, refs, out, lse
        self.q, self.k, self.v, *self.segments = arrays
        self.head, self.batch = lax.axis_index("head"), lax.axis_index("batch")
        # The last tiles of a causal prompt have the most to do: they go first.
        tile = lax.axis_index("tile")
        self.tile = (kernel.num_queries - 1) // _QUERIES - tile if self.case.causal else tile
        self.q_start, self.kv_start = starts[0], starts[1]
        keys = kernel.blocks.keys
        first = self.q_start + self.tile * _QUERIES  # the position of the first query
        last = jnp.minimum(first + _QUERIES, self.q_start + kernel.num_queries) - 1
        num_blocks = -(-kernel.num_keys // keys)
        self.begin, self.end = visible_blocks(self.case, first, _QUERIES, self.kv_start, keys, num_blocks)
        # The blocks that every query sees whole.
        self.whole_begin, whole_end = self.begin, jnp.minimum(self.end, kernel.num_keys // keys)
        if self.case.window is not None:
            unseen = jnp.maximum(last - self.case.window + 1 - self.kv_start, 0)
            self.whole_begin = jnp.clip(lax.div(unseen + (keys - 1), keys), self.begin, self.end)
        if self.case.causal:
            whole_end = jnp.minimum(whole_end, lax.div(jnp.maximum(first + 1 - self.kv_start, 0), keys))
        if self.segments:
            whole_end = self.begin
        self.whole_end = jnp.maximum(whole_end, self.whole_begin)

    def copy(self) -> None:
        """Fill the ring of blocks, and each of its slots again once both warpgroups are done with it."""
        keys, slots = self.kernel.blocks.keys, self.kernel.blocks.slots
        kv_head = lax.div(self.head, self.case.group_size)

        def send(index: jax.Array) -> None:
            slot = lax.rem(index, slots)
            tokens = pl.ds((self.begin + index) * keys, keys)
            for name, source in (("keys", self.k), ("values", self.v)):

                @pl.when(index >= slots)
                def _(name: str = name) -> None:
                    plgpu.barrier_wait(self.refs[f"{name}_done"].at[slot])

                there = self.refs[f"{name}_there"].at[slot]
                plgpu.copy_gmem_to_smem(source.at[self.batch, tokens, kv_head], self.refs[name].at[slot], there)

        lax.fori_loop(0, self.end - self.begin, lambda index, _: send(index), None)

    def attend(self, group: jax.Array) -> None:
        """The queries of one warpgroup, over all blocks."""
        turns = Turns(self.refs, group, self.case.scale, self.case.soft_cap, self.kernel.simulated)
        first = self.tile * _QUERIES + group * ROWS
        q = self.refs["q"].at[group]
        plgpu.copy_gmem_to_smem(self.q.at[self.batch, pl.ds(first, ROWS), self.head], q, self.refs["q_there"].at[group])
        own_segments = None
        if self.segments:
            own_segments = plgpu.load(self.segments[0].at[self.batch, pl.ds(first, ROWS)], layout=BY_ROW)
        state = turns.begin()

        def step(block: jax.Array, state: State, *, masked: bool) -> State:
            slot = lax.rem(block - self.begin, self.kernel.blocks.slots)
            return turns.mix(slot, state, functools.partial(mask, block) if masked else None)

        def mask(block: jax.Array, logits: jax.Array) -> jax.Array:
            return jnp.where(self.seen(first, own_segments, block), logits, -jnp.inf)

        masked, whole = functools.partial(step, masked=True), functools.partial(step, masked=False)
        if self.case.window is not None:
            state = lax.fori_loop(self.begin, self.whole_begin, masked, state)
        if not self.segments:
            state = lax.fori_loop(self.whole_begin, self.whole_end, whole, state)
        if self.case.causal or self.segments or self.kernel.num_keys % self.kernel.blocks.keys:
            state = lax.fori_loop(self.whole_end, self.end, masked, state)

        out, lse = turns.end(state)
        plgpu.copy_smem_to_gmem(out, self.out.at[self.batch, pl.ds(first, ROWS), self.head])
        plgpu.copy_smem_to_gmem(lse, self.lse.at[self.batch, self.head, pl.ds(first, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    def seen(self, first: jax.Array, own_segments: jax.Array | None, block: jax.Array) -> jax.Array:
        """[64, keys]: which keys of a block each query sees. first: the first query, of the call's."""
        keys = self.kernel.blocks.keys
        shape = (ROWS, keys)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        slot = block * keys + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        seen = slot < self.kernel.num_keys
        distance = (self.q_start - self.kv_start + first) + row - slot
        if self.case.causal:
            seen &= distance >= 0
        if self.case.window is not None:
            seen &= distance < self.case.window
        if own_segments is not None:
            there = self.segments[1].at[self.batch, pl.ds(block * keys, keys)]
            of_keys = plgpu.load(there, layout=plgpu.Layout.WGMMA.reduce(0))
            same = lax.broadcast_in_dim(own_segments, shape, [0]) == lax.broadcast_in_dim(of_keys, shape, [1])
            seen &= same
        return seen
