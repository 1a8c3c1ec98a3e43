"""Flash attention for TPUs (Mosaic): FlashAttention, arXiv:2205.14135, on one grid of batch, kv heads, tiles of queries
and blocks of keys.

All query heads of a kv head are rows of one matrix, so that a block of keys is read once for the group. A tile visits
only blocks with keys that it may see: the last axis of the grid is as long as the longest visit, and steps past a
tile's own end name the block that is there already, which costs no copy. Blocks that every query sees whole are not
masked.
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
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.cases import FlashCase
from pallas_kernels.flash_attention.reference import Segments, check
from pallas_kernels.flash_attention.xla import MASKED, visible_blocks

DTYPES = ("float32", "bfloat16")
MAX_HEAD_DIM = 256
LANES = 128
MIN_QUERIES, MIN_KEYS = 16, 128  # of a tile and a block: whole tiles of the memory, of either dtype
_HEADROOM = 0.5  # part of the scratch memory left to the compiler's own temporaries


@dataclass(frozen=True)
class Blocks:
    """Sizes the kernel works in: queries of a tile, keys of a block, scratch memory the compiler may use."""

    queries: int
    keys: int
    vmem_limit_bytes: int


def supports(case: FlashCase) -> str | None:
    """None, or the reason why the kernel cannot serve the case."""
    if case.fault() is not None:
        return case.fault()
    if case.dtype not in DTYPES:
        return f"dtype {case.dtype} is not one of {', '.join(DTYPES)}"
    if max(case.head_dim, case.value_dim) > MAX_HEAD_DIM:
        return f"head dims {case.head_dim} and {case.value_dim} are not in 1..{MAX_HEAD_DIM}"
    needed, most = _vmem_bytes(case, MIN_QUERIES, MIN_KEYS), int(_tuned("default")["vmem_limit_bytes"] * _HEADROOM)
    if needed > most:
        return f"{case.group_size} query heads of a kv head need {needed} bytes of scratch memory, more than {most}"
    return None


def chip_name() -> str:
    """The TPU that is compiled for, as its tuned table is called; "default" where that is no TPU (interpret mode)."""
    return str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else "default"


@functools.cache
def _tuned(chip: str) -> dict[str, int]:
    """The table of a chip, or the conservative default's for one that nobody tuned."""
    folder = Path(__file__).parent / "tuned"
    path = folder / f"tpu_{chip}.json"
    return json.loads((path if path.exists() else folder / "tpu_default.json").read_text())["blocks"]


def choose_blocks(case: FlashCase, num_queries: int, num_keys: int, chip: str = "default") -> Blocks:
    """Blocks that fit the scratch memory, and are no longer than the sequences."""
    table = _tuned(chip)
    queries = max(_power_of_two(max(table["tile_rows"] // case.group_size, 1)), MIN_QUERIES)
    keys, limit = table["block_keys"], table["vmem_limit_bytes"]
    while queries > MIN_QUERIES and queries // 2 >= num_queries:
        queries //= 2
    while keys > MIN_KEYS and keys // 2 >= num_keys:
        keys //= 2
    while _vmem_bytes(case, queries, keys) > limit * _HEADROOM and (queries > MIN_QUERIES or keys > MIN_KEYS):
        if keys > MIN_KEYS:
            keys //= 2
        else:
            queries //= 2
    return Blocks(queries, keys, limit)


def _vmem_bytes(case: FlashCase, queries: int, keys: int) -> int:
    """Scratch memory of the kernel's own buffers: two of each block, the running softmax, and logits and weights."""
    rows, itemsize = case.group_size * queries, jnp.dtype(case.dtype).itemsize
    lanes = -(-case.head_dim // LANES) * LANES + -(-case.value_dim // LANES) * LANES
    blocks = 2 * (rows + keys) * lanes * itemsize + 2 * rows * 4
    segments = 2 * (queries * LANES + 8 * keys) * 4 if case.has_segments else 0
    state = rows * (lanes + 2 * LANES) * 4
    return blocks + segments + state + 3 * rows * keys * 4


def _power_of_two(value: int) -> int:
    return 1 << (value.bit_length() - 1)


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
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The contract is reference.flash_attention's. blocks: other than the table's; interpret: as of `pallas_call`."""
    reason = supports(case)
    if reason is not None:
        raise ValueError(f"the TPU kernel cannot serve {case}: {reason}")
    check(case, q, k, v, segments)
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    blocks = blocks or choose_blocks(case, num_queries, num_keys, chip_name())
    q_blocks, kv_blocks = -(-num_queries // blocks.queries), -(-num_keys // blocks.keys)
    group, rows = case.group_size, case.group_size * blocks.queries
    steps = kv_blocks
    if case.window is not None:
        steps = min(steps, -(-(case.window + blocks.queries - 2) // blocks.keys) + 1)

    def visible(tile: Any, starts: Any) -> tuple[jax.Array, jax.Array]:
        return visible_blocks(
            case, starts[0] + tile * blocks.queries, blocks.queries, starts[1], blocks.keys, kv_blocks
        )

    def key_block(tile: Any, step: Any, starts: Any) -> jax.Array:
        begin, end = visible(tile, starts)
        return jnp.clip(jnp.minimum(begin + step, end - 1), 0, kv_blocks - 1)

    arrays = [
        _padded(q, q_blocks * blocks.queries)
        .reshape(batch, -1, case.num_kv_heads, group, case.head_dim)
        .transpose(0, 2, 3, 1, 4),
        _padded(k, kv_blocks * blocks.keys).swapaxes(1, 2),
        _padded(v, kv_blocks * blocks.keys).swapaxes(1, 2),
    ]

    def of_keys(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, blocks.keys, width), lambda b, h, i, j, starts: (b, h, key_block(i, j, starts), 0))

    in_specs = [
        pl.BlockSpec((1, 1, group, blocks.queries, case.head_dim), lambda b, h, i, j, starts: (b, h, 0, i, 0)),
        of_keys(case.head_dim),
        of_keys(case.value_dim),
    ]
    if segments is not None:
        arrays += [
            _padded(segments[0], q_blocks * blocks.queries)[:, :, None],
            _padded(segments[1], kv_blocks * blocks.keys)[:, None],
        ]
        in_specs += [
            pl.BlockSpec((1, blocks.queries, 1), lambda b, h, i, j, starts: (b, i, 0)),
            pl.BlockSpec((1, 1, blocks.keys), lambda b, h, i, j, starts: (b, 0, key_block(i, j, starts))),
        ]
    out, lse = pl.pallas_call(
        functools.partial(_kernel, case, blocks, num_queries, num_keys, visible),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, case.num_kv_heads, q_blocks, steps),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, 1, group, blocks.queries, case.value_dim), lambda b, h, i, j, starts: (b, h, 0, i, 0)),
                pl.BlockSpec((1, 1, 1, 1, rows), lambda b, h, i, j, starts: (b, h, i, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, case.value_dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*arrays[0].shape[:-1], case.value_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, case.num_kv_heads, q_blocks, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_limit_bytes,
        ),
        cost_estimate=_cost(case, batch, num_queries, num_keys, blocks),
        interpret=interpret,
        name="flash_attention",
    )(jnp.stack([jnp.int32(q_start), jnp.int32(kv_start)]), *arrays)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, case.num_heads, case.value_dim)
    lse = lse.reshape(batch, case.num_kv_heads, q_blocks, group, blocks.queries).transpose(0, 2, 4, 1, 3)
    return out[:, :num_queries], lse.reshape(batch, -1, case.num_heads)[:, :num_queries]


def _padded(array: jax.Array, length: int) -> jax.Array:
    return jnp.pad(array, ((0, 0), (0, length - array.shape[1]), *((0, 0),) * (array.ndim - 2)))


def _cost(case: FlashCase, batch: int, num_queries: int, num_keys: int, blocks: Blocks) -> pl.CostEstimate:
    """As if both parts of the context began at the same position."""
    pairs = num_queries * num_keys
    if case.causal:
        pairs -= min(num_queries, num_keys) ** 2 // 2
    if case.window is not None:
        pairs = min(pairs, num_queries * case.window)
    pairs *= batch * case.num_heads
    lanes = case.head_dim + case.value_dim
    of_keys = pairs // (case.group_size * blocks.queries)  # each read once for a tile
    moved = (batch * num_queries * case.num_heads + of_keys) * lanes * jnp.dtype(case.dtype).itemsize
    return pl.CostEstimate(
        flops=2 * pairs * lanes,
        transcendentals=pairs * (1 if case.soft_cap is None else 2),
        bytes_accessed=moved + 4 * batch * num_queries * case.num_heads,
    )


def _kernel(
    case: FlashCase, blocks: Blocks, num_queries: int, num_keys: int, visible: Any, starts: Any, *refs: Any
) -> None:
    """One block of keys for one tile of queries."""
    q, k, v, *segments, out, lse, most, weight, mixed = refs
    tile, step = pl.program_id(2), pl.program_id(3)
    begin, end = visible(tile, starts)
    block = begin + step
    first_query, first_key = starts[0] + tile * blocks.queries, starts[1] + block * blocks.keys
    last_query = jnp.minimum(first_query + blocks.queries, starts[0] + num_queries) - 1  # the last that is real
    last_key = first_key + blocks.keys - 1

    @pl.when(step == 0)
    def _() -> None:
        most[...] = jnp.full(most.shape, MASKED, jnp.float32)
        weight[...] = jnp.zeros(weight.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)

    # Partial: some query of the tile does not see some slot of the block.
    partial = (block + 1) * blocks.keys > num_keys
    if case.causal:
        partial |= last_key > first_query
    if case.window is not None:
        partial |= first_key <= last_query - case.window

    def mix(masked: bool) -> None:
        precision = lax.Precision.HIGHEST if case.dtype == "float32" else lax.Precision.DEFAULT
        multiply = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        values = v[0, 0]
        logits = multiply(q[0, 0].reshape(-1, case.head_dim), k[0, 0], (((1,), (1,)), ((), ()))) * case.scale
        if case.soft_cap is not None:
            logits = case.soft_cap * jnp.tanh(logits / case.soft_cap)
        seen = None
        if masked:
            shape = (blocks.queries, blocks.keys)
            slot = lax.broadcasted_iota(jnp.int32, shape, 1)
            seen = slot < num_keys - block * blocks.keys
            distance = first_query - first_key + lax.broadcasted_iota(jnp.int32, shape, 0) - slot
            if case.causal:
                seen &= distance >= 0
            if case.window is not None:
                seen &= distance < case.window
            # What no query of the tile sees becomes 0: a weight of 0 does not cancel a NaN.
            slot = lax.broadcasted_iota(jnp.int32, values.shape, 0)
            alive = slot < num_keys - block * blocks.keys
            if case.causal:
                alive &= slot <= last_query - first_key
            if case.window is not None:
                alive &= slot > first_query - case.window - first_key
            values = jnp.where(alive, values.astype(jnp.float32), 0.0).astype(values.dtype)
        if segments:
            same = segments[0][0] == segments[1][0]
            seen = same if seen is None else seen & same
        if seen is not None:
            by_head = logits.reshape(case.group_size, blocks.queries, blocks.keys)
            logits = jnp.where(seen, by_head, -jnp.inf).reshape(logits.shape)
        old = most[...]
        new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        keep, weights = jnp.exp(old - new), jnp.exp(logits - new[:, :1])
        most[...] = new
        weight[...] = weight[...] * keep + jnp.sum(weights, axis=1, keepdims=True)
        mixed[...] = mixed[...] * keep[:, :1] + multiply(weights.astype(v.dtype), values, (((1,), (0,)), ((), ())))

    pl.when((block < end) & partial)(functools.partial(mix, masked=True))
    pl.when((block < end) & jnp.logical_not(partial))(functools.partial(mix, masked=False))

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        total = weight[...]
        out[0, 0] = (mixed[...] / jnp.where(total == 0, 1.0, total)[:, :1]).reshape(out.shape[2:]).astype(out.dtype)
        lse[0, 0, 0] = (most[...] + jnp.log(total)).T[:1]
