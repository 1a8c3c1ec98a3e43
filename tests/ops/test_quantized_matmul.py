"""Quantized weights: how they are rounded, and their products against a float64 oracle, on every path."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.ops import grouped_matmul as grouped
from jaxinfer.ops import quantized_matmul as op
from jaxinfer.ops.quantized_matmul import Quantized, dequantize, quantize
from pallas_kernels.quantized_matmul.reference import quantized_matmul as reference

PATHS: dict[str, Callable[..., jax.Array]] = {
    "chosen here": op.quantized_matmul,
    "with one scale": op._scaled_after,
    "on TPUs": lambda x, weight: op._in_whole_tiles(op._scaled_before, x, weight),
    "on GPUs": op._scaled_by_group,
    "reference": lambda x, weight: reference(x, *weight),
}


rounded_to = jax.jit(quantize, static_argnames=("bits", "scales_shape"))


def random_weight(rng: np.random.Generator, bits: int, shape: tuple[int, ...], scales: tuple[int, ...]) -> Quantized:
    limit = 2 ** (bits - 1)
    values = rng.integers(-limit, limit, shape)  # the smallest too, which published checkpoints have
    dtype = jnp.int8 if bits == 8 else jnp.int4
    return Quantized(jnp.asarray(values, jnp.int8).astype(dtype), jnp.asarray(rng.uniform(0.1, 2, scales), jnp.float32))


def in_float64(weight: Quantized) -> np.ndarray:
    """Block by block, as the format is described and not as it is computed."""
    values, scales = np.asarray(weight.values).astype(np.float64), np.asarray(weight.scales).astype(np.float64)
    numbers = np.empty(values.shape)
    for place in np.ndindex(values.shape):
        shared = tuple(i * count // size for i, count, size in zip(place, scales.shape, values.shape, strict=True))
        numbers[place] = values[place] * scales[shared]
    return numbers


@pytest.mark.parametrize("num_rows", [1, 20])
@pytest.mark.parametrize(
    ("path", "bits", "groups"),
    [*((path, 8, 1) for path in PATHS), *((path, 4, 3) for path in PATHS if path != "with one scale")],
)
def test_a_product_is_the_oracles(path: str, num_rows: int, bits: int, groups: int) -> None:
    rng = np.random.default_rng(num_rows)
    weight = random_weight(rng, bits, (10, 24), (10, groups))
    x = rng.normal(size=(num_rows, 24)).astype(np.float32)
    want = x.astype(np.float64) @ in_float64(weight).T
    run = jax.jit(PATHS[path])
    np.testing.assert_allclose(run(x, weight), want, rtol=2e-5, atol=1e-3)
    got = run(jnp.asarray(x, jnp.bfloat16), weight)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.03, atol=0.02 * np.abs(want).max())


def test_blocks_of_the_cpus_path_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the rows, more than one of them, and more cores than rows can be cut for."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    for num_out, cores in ((12, 2), (7, 2)):
        monkeypatch.setattr(op, "_BLOCKS", cores)
        monkeypatch.setattr(op, "_BLOCK_BYTES_OF_SEVERAL", 4 * 8 * 4)  # four rows
        weight = random_weight(rng, 4, (num_out, 8), (num_out, 2))
        np.testing.assert_allclose(jax.jit(op.quantized_matmul)(x, weight), reference(x, *weight), atol=1e-3)


@pytest.mark.parametrize(
    ("path", "bits", "scales"), [("grouped_matmul", 4, 2), ("grouped_matmul", 8, 1), ("_ragged_quantized", 8, 1)]
)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_experts_products_are_the_oracles(path: str, bits: int, scales: int, data: st.DataObject) -> None:
    num_rows, num_groups = 24, 5
    cuts = sorted(data.draw(st.lists(st.integers(0, num_rows), min_size=num_groups, max_size=num_groups)))
    sizes = jnp.asarray(np.diff([0, *cuts]), jnp.int32)
    rng = np.random.default_rng(cuts[0])
    weight = random_weight(rng, bits, (num_groups, 8, 6), (num_groups, scales, 6))
    x = jnp.asarray(rng.normal(size=(num_rows, 8)), jnp.float32)
    got = np.asarray(jax.jit(getattr(grouped, path))(x, weight, sizes))
    assert np.isfinite(got).all()
    numbers = in_float64(weight)
    for group, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
        np.testing.assert_allclose(got[start:stop], np.asarray(x)[start:stop] @ numbers[group], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("bits", "scales_shape"), [(8, (6, 1, 1)), (4, (6, 3, 2))])
def test_no_number_is_further_than_half_a_step(bits: int, scales_shape: tuple[int, ...], dtype: jax.typing.DTypeLike):
    numbers = np.random.default_rng(1).normal(size=(6, 3, 8)).astype(np.float32)
    numbers[0] = 0  # whose scales are 0
    weight = rounded_to(jnp.asarray(numbers, dtype), bits=bits, scales_shape=scales_shape)
    assert weight.values.dtype == (jnp.int8 if bits == 8 else jnp.int4)
    assert weight.scales.shape == scales_shape
    assert weight.scales.dtype == dtype
    values = np.asarray(weight.values).astype(np.int32)
    assert np.abs(values).max() == 2 ** (bits - 1) - 1
    steps = np.broadcast_to(in_float64(Quantized(jnp.ones_like(weight.values), weight.scales)), values.shape)
    rounded = np.asarray(jnp.asarray(numbers, dtype).astype(jnp.float32))
    slack = 0.5 + 2 ** (bits - 1) * float(jnp.finfo(dtype).eps)  # the largest may be a rounded scale's part beyond
    assert (np.abs(in_float64(weight) - rounded) <= slack * steps).all()
    np.testing.assert_allclose(np.asarray(dequantize(weight, jnp.float32)), in_float64(weight), rtol=1e-6)


def test_what_is_quantized_already_stays_as_it_is() -> None:
    rng = np.random.default_rng(2)
    numbers = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    once = rounded_to(numbers, bits=4, scales_shape=(4, 2))
    again = rounded_to(dequantize(once, jnp.float32), bits=4, scales_shape=(4, 2))
    np.testing.assert_array_equal(again.values, once.values)
    np.testing.assert_allclose(again.scales, once.scales, rtol=1e-6)
