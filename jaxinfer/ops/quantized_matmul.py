"""x [T, in] times a quantized weight [out, in], whose numbers are made where they are used.

The contract, and the table of backends that implement it, of which one is chosen for every weight, with reasons.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.ops.backends import Backend, chosen
from pallas_kernels.quantized_matmul.cases import ProductCase

_FEW_ROWS = 16  # up to which a product for every group of inputs moves less than numbers made of the whole weight
_TILE_ROWS = 8  # of a TPU
_BY_INPUTS = (((1,), (1,)), ((), ()))
_BLOCKS = os.cpu_count() or 1
# Of a block's float32 numbers: for one row what a core's own cache holds, for more what pays for calling a library.
_BLOCK_BYTES, _BLOCK_BYTES_OF_SEVERAL = 1 << 17, 1 << 22


class Quantized(NamedTuple):
    """A weight of any shape: values int8 or int4, and as many dimensions of scales, each shorter by how many neighbours
    along it share one."""

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Product = Callable[[jax.Array, Quantized], jax.Array]


def quantize(weight: jax.Array, *, bits: int, scales_shape: tuple[int, ...]) -> Quantized:
    """The nearest values, the largest of those that share a scale being the largest there is; scales in weight's dtype.

    Values go by the scale that is kept: what its dtype rounds off is not lost.
    """
    limit = 2 ** (bits - 1) - 1
    wide = weight.reshape(_split(weight.shape, scales_shape)).astype(jnp.float32)
    shared = tuple(range(1, wide.ndim, 2))
    scales = (jnp.abs(wide).max(axis=shared, keepdims=True) / limit).astype(weight.dtype)
    steps = jnp.where(scales == 0, 1, scales).astype(jnp.float32)
    values = jnp.clip(jnp.round(wide / steps), -limit, limit)
    dtype = jnp.int8 if bits == 8 else jnp.int4
    return Quantized(values.astype(jnp.int8).astype(dtype).reshape(weight.shape), scales.reshape(scales_shape))


def dequantize(weight: Quantized, dtype: Any) -> jax.Array:
    """The numbers that a weight stands for, each rounded to `dtype` once."""
    values, scales = weight
    split = _split(values.shape, scales.shape)
    wide = values.reshape(split).astype(jnp.float32) * jnp.expand_dims(
        scales.astype(jnp.float32), tuple(range(1, len(split), 2))
    )
    return wide.astype(dtype).reshape(values.shape)


def _split(shape: tuple[int, ...], scales_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Every dimension as two: how many scales there are along it, and how many numbers share one."""
    assert len(shape) == len(scales_shape), (shape, scales_shape)
    assert all(size % count == 0 for size, count in zip(shape, scales_shape, strict=True)), (shape, scales_shape)
    return tuple(part for size, count in zip(shape, scales_shape, strict=True) for part in (count, size // count))


def quantized_matmul(x: jax.Array, weight: Quantized) -> jax.Array:
    """x [T, in] in float32 or a 16-bit dtype; weight [out, in], scales [out, 1] or [out, groups] -> [T, out] in x's
    dtype, summed in float32."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names or not mesh.are_all_axes_manual:
        return _xla(x, weight)  # XLA cuts this program's arrays, as it cannot cut a kernel's
    (num_out, num_in), num_groups = weight.values.shape, weight.scales.shape[1]
    bits = 4 if weight.values.dtype == jnp.int4 else 8
    case = ProductCase(num_out, num_in, num_groups, bits, x.dtype.name)
    device = mesh.abstract_device
    return choose_backend(case, jax.default_backend() if device is None else device.platform).run(x, weight)


def choose_backend(case: ProductCase, platform: str) -> Backend:
    """See backends.chosen."""
    return chosen(f"product with int{case.bits} [{case.num_out}, {case.num_in}]", BACKENDS, case, platform)


# Pallas is imported where it is used, since a process on another platform need not load it.
def _tpu_supports(case: ProductCase) -> str | None:
    from pallas_kernels.quantized_matmul import tpu

    return tpu.supports(case)


def _tpu_run(x: jax.Array, weight: Quantized) -> jax.Array:
    from pallas_kernels.quantized_matmul import tpu

    return _xla(x, weight) if x.shape[0] > tpu.MAX_ROWS else tpu.quantized_matmul(x, *weight)


def _xla(x: jax.Array, weight: Quantized) -> jax.Array:
    """XLA's compilers for TPUs and GPUs make numbers of values as a product reads them. One scale for an output is left
    to the sum; scales of groups are where platforms differ."""
    one_scale = weight.scales.shape[1] == 1
    return lax.platform_dependent(
        x,
        weight,
        cpu=_on_cpu,
        tpu=partial(_in_whole_tiles, _scaled_after if one_scale else _scaled_before),
        default=_scaled_after if one_scale else _scaled_by_group,
    )


# Best first; "xla" serves every case.
BACKENDS: tuple[Backend[ProductCase], ...] = (
    Backend("pallas_tpu", "tpu", _tpu_supports, _tpu_run),
    Backend("xla", None, lambda case: None, _xla),
)


def _scaled_after(x: jax.Array, weight: Quantized) -> jax.Array:
    y = lax.dot_general(x, weight.values.astype(x.dtype), _BY_INPUTS, preferred_element_type=jnp.float32)
    return (y * weight.scales[:, 0].astype(jnp.float32)).astype(x.dtype)


def _in_whole_tiles(product: Product, x: jax.Array, weight: Quantized) -> jax.Array:
    """For fewer rows than a tile has, the TPU compiler leaves the matrix unit idle and takes ten times as long."""
    padded = jnp.pad(x, ((0, max(0, _TILE_ROWS - x.shape[0])), (0, 0)))
    return product(padded, weight)[: x.shape[0]]


def _scaled_before(x: jax.Array, weight: Quantized) -> jax.Array:
    """A weight times its scales, each repeated along its group by a product with ones, which the TPU compiler fuses. A
    reshape into groups would be a copy of the whole weight, tile by tile."""
    values, scales = (leaf.astype(x.dtype) for leaf in weight)
    num_groups, width = scales.shape[1], values.shape[1]
    ones = (jnp.arange(width) // (width // num_groups) == jnp.arange(num_groups)[:, None]).astype(x.dtype)
    repeated = lax.dot_general(scales, ones, (((1,), (0,)), ((), ())))  # a higher precision would not be fused
    return lax.dot_general(x, values * repeated, _BY_INPUTS, preferred_element_type=jnp.float32).astype(x.dtype)


def _scaled_by_group(x: jax.Array, weight: Quantized) -> jax.Array:
    """Each group's product is scaled; or, where rows are many and all groups' products would be large, numbers are made
    of the whole weight, and the copy lasts as long as the product."""
    values, scales = weight
    num_rows, num_groups = x.shape[0], scales.shape[1]
    if num_rows > _FEW_ROWS:
        return lax.dot_general(x, dequantize(weight, x.dtype), _BY_INPUTS)
    grouped = x.reshape(num_rows, num_groups, -1)
    numbers = values.astype(x.dtype).reshape(values.shape[0], num_groups, -1)
    y = lax.dot_general(grouped, numbers, (((2,), (2,)), ((1,), (1,))), preferred_element_type=jnp.float32)
    return (y * scales.T[:, None].astype(jnp.float32)).sum(0).astype(x.dtype)  # of [groups, T, out]


def _on_cpu(x: jax.Array, weight: Quantized) -> jax.Array:
    """Blocks of rows, one a core at a time, whose numbers stay in its cache: XLA's CPU compiler fuses nothing into a
    product, and the whole weight in float32 would be written and read again."""
    num_out, width = weight.shape
    cores = _BLOCKS if num_out % _BLOCKS == 0 else 1
    of_core = num_out // cores
    block_bytes = _BLOCK_BYTES if x.shape[0] == 1 else _BLOCK_BYTES_OF_SEVERAL
    size = _largest_divisor(of_core, max(1, block_bytes // 4 // width))
    parts = jax.tree.map(lambda leaf: leaf.reshape(cores, of_core, -1), weight)
    columns = jnp.broadcast_to(x.astype(jnp.float32).T, (cores, width, x.shape[0]))

    def multiply(number: jax.Array, y: jax.Array) -> jax.Array:
        start = number * size
        block = dequantize(
            jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size, 1), parts), jnp.float32
        )
        product = lax.dot_general(block, columns, (((2,), (1,)), ((0,), (0,))))
        return lax.dynamic_update_slice_in_dim(y, product, start, 1)

    y = lax.fori_loop(0, of_core // size, multiply, jnp.zeros((cores, of_core, x.shape[0]), jnp.float32))
    return y.reshape(num_out, x.shape[0]).T.astype(x.dtype)


def _largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of `size` that is at most `limit`."""
    return next(divisor for divisor in range(min(size, limit), 0, -1) if size % divisor == 0)
