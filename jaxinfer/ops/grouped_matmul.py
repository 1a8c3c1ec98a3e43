"""Rows in ragged groups, each group times a matrix of its own: the product under every expert.

On TPU and GPU this is XLA's ragged product. On CPU XLA multiplies every row with every matrix for it, so here the first
rows of all groups, a little more than a group has on average, are one batch of products over the matrices as they lie
in memory. What is left of long groups goes block by block, each with a copy of its group's matrix (a slice of a
product's operand is a copy), and so does everything where rows are too few to use most of the matrices.

The matrices are [in, out], unlike other weights here: of [out, in] the TPU compiler makes a transposed copy in every
call, which takes longer than the product of a few rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.ops.quantized_matmul import Quantized, dequantize

_MOST_ROWS = 128  # of a block: beyond that a product is no faster

_RAGGED = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])


def grouped_matmul(x: jax.Array, weight: jax.Array | Quantized, group_sizes: jax.Array) -> jax.Array:
    """x [R, in], the rows of group 0, then of group 1, ...; weight [G, in, out]; group_sizes int32 [G] -> [R, out].

    Groups may be empty. Rows past the last group come out finite where x is, and mean nothing.
    """
    if isinstance(weight, Quantized):
        on_gpu = _ragged_quantized if weight.scales.shape[1] == 1 else _quantized_by_blocks
        return lax.platform_dependent(x, weight, group_sizes, cuda=on_gpu, default=_quantized_by_blocks)
    return lax.platform_dependent(x, weight, group_sizes, cpu=_on_cpu, default=_ragged)


def _ragged(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot_general(x, weight, group_sizes, _RAGGED)


def _ragged_quantized(x: jax.Array, weight: Quantized, group_sizes: jax.Array) -> jax.Array:
    """One scale for an output is left to the sum, so that XLA's ragged product reads the values as they are."""
    y = lax.ragged_dot_general(x, weight.values, group_sizes, _RAGGED, preferred_element_type=jnp.float32)
    group = jnp.repeat(jnp.arange(weight.shape[0]), group_sizes, total_repeat_length=x.shape[0])
    return (y * weight.scales[group, 0].astype(jnp.float32)).astype(x.dtype)


def _quantized_by_blocks(x: jax.Array, weight: Quantized, group_sizes: jax.Array) -> jax.Array:
    """Numbers are made of one group's matrix at a time: of all together they would fill the memory that was saved."""
    return _by_blocks(x, weight, group_sizes, 0, _rounded_up(min(x.shape[0] / weight.shape[0], _MOST_ROWS), 16))


@jax.custom_jvp
def _on_cpu(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    num_rows, num_groups = x.shape[0], weight.shape[0]
    if num_rows < num_groups:
        return _by_blocks(x, weight, group_sizes, 0, 1)
    in_batch = _rounded_up(1.5 * num_rows / num_groups, 4)
    first_row = jnp.cumsum(group_sizes) - group_sizes
    rows = jnp.minimum(first_row[:, None] + jnp.arange(in_batch), num_rows - 1)
    batch = lax.dot_general(x[rows], weight, (((2,), (1,)), ((0,), (0,))))  # [G, in_batch, out]
    rest = _by_blocks(x, weight, group_sizes, in_batch, min(in_batch, _MOST_ROWS))
    group = jnp.repeat(jnp.arange(num_groups), group_sizes, total_repeat_length=num_rows)
    place = jnp.arange(num_rows) - first_row[group]
    return jnp.where((place < in_batch)[:, None], batch[group, jnp.minimum(place, in_batch - 1)], rest)


@_on_cpu.defjvp
def _derivative(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """XLA's product has a derivative that can be transposed, a loop of as many turns as there are blocks has none."""
    (x, weight, group_sizes), (x_tangent, weight_tangent, _) = primals, tangents
    tangent = _ragged(x_tangent, weight, group_sizes) + _ragged(x, weight_tangent, group_sizes)
    return _on_cpu(x, weight, group_sizes), tangent


def _rounded_up(size: float, multiple: int) -> int:
    return -int(-size // multiple) * multiple


def _by_blocks(x: jax.Array, weight: jax.Array | Quantized, group_sizes: jax.Array, first: int, size: int) -> jax.Array:
    """The products of every group's rows from its `first` on, in blocks of `size`; other rows mean nothing."""
    num_rows, out = x.shape[0], weight.shape[2]
    blocks = -(-jnp.maximum(group_sizes - first, 0) // size)
    first_block = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(blocks, dtype=jnp.int32)])
    first_row = jnp.cumsum(group_sizes) - group_sizes + first
    padded = jnp.pad(x, ((0, size - 1), (0, 0)))

    def multiply(block: jax.Array, y: jax.Array) -> jax.Array:
        group = jnp.sum(first_block[1:] <= block)
        start = first_row[group] + (block - first_block[group]) * size
        rows = lax.dynamic_slice_in_dim(padded, start, size)
        matrix = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, group, keepdims=False), weight)
        if isinstance(matrix, Quantized):
            matrix = dequantize(matrix, x.dtype)
        # One row's product is a quarter faster with the matrix on the left.
        product = rows @ matrix if size > 1 else lax.dot_general(matrix, rows, (((0,), (1,)), ((), ()))).T
        # A group's last block also writes rows of the groups after it, whose own blocks come later.
        return lax.dynamic_update_slice_in_dim(y, product, start, 0)

    y = jnp.zeros((num_rows + size - 1, out), x.dtype)
    return lax.fori_loop(0, first_block[-1], multiply, y)[:num_rows]
