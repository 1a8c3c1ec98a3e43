"""Rows times an int4 weight, for TPUs (Mosaic), where XLA's fusion takes two to three times as long to unpack values as
the matrix unit takes to load them.

A weight is widened to bfloat16, which holds its values exactly, on the way from scratch memory to the matrix unit, and
is never scaled: a group of inputs is one product, and the scales go into its result, [T, out] numbers instead of
[out, in]. So nothing is rounded but the sum.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_matmul.cases import ProductCase

MAX_ROWS = 256  # beyond that XLA's product, whose weight is made once for all rows, is as fast
LANES, SUBLANES = 128, 8
# Outputs of a block, best first: with long ones the matrix unit drains less often, and 128 fill half of one of v6e.
_BLOCK_OUTPUTS = (512, 256, LANES)
_BLOCK_VALUES = 1 << 23  # a block is one stretch of program, and two are in scratch memory
_LONG_STEPS = 4  # with fewer blocks of 512 the first one's copy, which nothing covers, would be most of the time
_VMEM_LIMIT_BYTES = 48 << 20  # of the 64 MiB that the chips with the least have


def supports(case: ProductCase) -> str | None:
    """None, or the reason why the kernel cannot serve the case, or should not."""
    if case.bits != 4:
        return f"XLA's products with weights of {case.bits} bits keep the matrix unit as busy as a kernel could"
    if case.dtype != "bfloat16":
        return f"dtype {case.dtype} is not bfloat16"
    if case.num_in % case.num_groups or case.group_size % LANES:
        return f"{case.num_in} inputs with {case.num_groups} scales are not groups of a multiple of {LANES}"
    if case.num_out % LANES:
        return f"{case.num_out} outputs are not a multiple of {LANES}"
    needed = _vmem_bytes(case, MAX_ROWS, LANES)
    if needed > _VMEM_LIMIT_BYTES:
        return f"{case.num_in} inputs need {needed} bytes of scratch memory, more than {_VMEM_LIMIT_BYTES}"
    return None


def quantized_matmul(
    x: jax.Array, values: jax.Array, scales: jax.Array, *, block_outputs: int | None = None, interpret: Any = False
) -> jax.Array:
    """The contract is reference.quantized_matmul's, for up to MAX_ROWS rows.

    block_outputs: other than the kernel's own choice; interpret: as of `pallas_call`.
    """
    case = _case_of(x, values, scales)
    num_rows = -(-x.shape[0] // SUBLANES) * SUBLANES
    block = block_outputs or _choose_block(case, num_rows)
    y = pl.pallas_call(
        _kernel,
        grid=(case.num_out // block,),
        in_specs=[
            pl.BlockSpec((num_rows, case.num_in), lambda i: (0, 0)),
            pl.BlockSpec((block, case.num_in), lambda i: (i, 0)),
            pl.BlockSpec((case.num_groups, block), lambda i: (0, i)),
        ],
        out_specs=pl.BlockSpec((num_rows, block), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((num_rows, case.num_out), x.dtype),
        # Blocks are independent: v5p deals them out to its two cores.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_LIMIT_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * case.num_out * case.num_in,
            transcendentals=0,
            bytes_accessed=case.num_out * (case.num_in // 2 + 2 * case.num_groups)
            + 2 * num_rows * (case.num_in + case.num_out),
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(jnp.pad(x, ((0, num_rows - x.shape[0]), (0, 0))), values, scales.T)  # as XLA keeps so narrow an array: no copy
    return y[: x.shape[0]]


def _kernel(x: Any, values: Any, scales: Any, y: Any) -> None:
    """A block of outputs [T, block], of values [block, in] and scales [groups, block]."""
    num_groups = scales.shape[0]
    group_size = values.shape[1] // num_groups
    total = jnp.zeros(y.shape, jnp.float32)
    for group in range(num_groups):
        inputs = slice(group * group_size, (group + 1) * group_size)
        part = lax.dot_general(
            x[:, inputs],
            values[:, inputs].astype(x.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        total += part * scales[group : group + 1].astype(jnp.float32)
    y[...] = total.astype(y.dtype)


def _case_of(x: jax.Array, values: jax.Array, scales: jax.Array) -> ProductCase:
    """ValueError for arrays that do not go together, or that the kernel does not serve."""
    if not (x.ndim == values.ndim == scales.ndim == 2 and x.shape[1] == values.shape[1] and len(values) == len(scales)):
        raise ValueError(f"x {x.shape}, values {values.shape}, scales {scales.shape}: not [T, in], [out, in], [out, G]")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"{x.shape[0]} rows are not in 1..{MAX_ROWS}; multiply more with XLA")
    bits = {"int4": 4, "int8": 8}.get(values.dtype.name)
    if bits is None:
        raise ValueError(f"values are {values.dtype.name}, not int4 or int8")
    case = ProductCase(values.shape[0], values.shape[1], scales.shape[1], bits, x.dtype.name)
    reason = supports(case)
    if reason is not None:
        raise ValueError(f"the TPU kernel cannot serve {case}: {reason}")
    return case


def _choose_block(case: ProductCase, num_rows: int) -> int:
    """Outputs of a block."""

    def fits(block: int) -> bool:
        if block == _BLOCK_OUTPUTS[0] and case.num_out < _LONG_STEPS * block:
            return False
        small = block * case.num_in <= _BLOCK_VALUES and _vmem_bytes(case, num_rows, block) <= _VMEM_LIMIT_BYTES
        return case.num_out % block == 0 and small

    return next(filter(fits, _BLOCK_OUTPUTS), LANES)


def _vmem_bytes(case: ProductCase, num_rows: int, block: int) -> int:
    """Two buffers of all that is copied; the sum, one product, and a group's widened values."""
    copied = 2 * num_rows * (case.num_in + block) + block * case.num_in // 2 + 2 * case.num_groups * block
    return 2 * copied + 2 * 4 * num_rows * block + 2 * block * case.group_size
