"""The TPU kernel for products with int4 weights, simulated with race detection, against a float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from jaxinfer.ops import quantized_matmul as op
from jaxinfer.ops.quantized_matmul import Quantized, choose_backend
from pallas_kernels.quantized_matmul import tpu
from pallas_kernels.quantized_matmul.cases import CASES, ProductCase

INTERPRET = pltpu.InterpretParams(detect_races=True)
UP = CASES["Llama 3.1 8B, up"]

simulate = jax.jit(partial(tpu.quantized_matmul, interpret=INTERPRET), static_argnames="block_outputs")


def arrays(num_rows: int, num_out: int, num_in: int, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(num_rows)
    x = jnp.asarray(rng.normal(size=(num_rows, num_in)), jnp.bfloat16)
    values = jnp.asarray(rng.integers(-8, 8, (num_out, num_in)), jnp.int8).astype(jnp.int4)
    return x, values, jnp.asarray(rng.uniform(0.1, 2, (num_out, num_groups)), jnp.bfloat16)


def oracle(x: jax.Array, values: jax.Array, scales: jax.Array) -> np.ndarray:
    of_input = np.repeat(np.asarray(scales).astype(np.float64), values.shape[1] // scales.shape[1], 1)
    numbers = np.asarray(values.astype(jnp.int8)).astype(np.float64) * of_input
    return np.asarray(x).astype(np.float64) @ numbers.T


def check(got: jax.Array, given: tuple[jax.Array, jax.Array, jax.Array]) -> None:
    """Within what rounding to bfloat16 takes of the result, and float32 of a sum."""
    want = oracle(*given)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), want, rtol=2**-8, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(("shape", "block"), [((2, 256, 256, 2), None), ((17, 384, 512, 2), 128)])
def test_equals_the_oracle_and_a_row_of_nans_stays_one(shape: tuple[int, int, int, int], block: int | None) -> None:
    """One block, and three of groups of 256 inputs."""
    x, values, scales = arrays(*shape)
    got = simulate(x.at[1].set(jnp.nan), values, scales, block_outputs=block)
    assert jnp.isnan(got[1]).all()
    others = jnp.arange(len(x)) != 1
    check(got[others], (x[others], values, scales))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operation as it is on a TPU, its kernel interpreted."""
    monkeypatch.setattr(op, "choose_backend", lambda case, platform: choose_backend(case, "tpu"))
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        yield


def product(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    return op.quantized_matmul(x, Quantized(values, scales))


@pytest.mark.usefixtures("simulated")
def test_the_operation_runs_it_on_every_device_of_a_mesh() -> None:
    """Up to a number of rows, and only where a program says what each device does: XLA cuts no kernel."""
    mesh, whole = jax.make_mesh((1,), ("tensor",)), PartitionSpec()
    run = jax.shard_map(product, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    x, *weight = arrays(tpu.MAX_ROWS + 1, 128, 256, 2)
    assert "pallas_call" in str(jax.make_jaxpr(run)(x[1:], *weight))
    assert "pallas_call" not in str(jax.make_jaxpr(run)(x, *weight))
    assert "pallas_call" not in str(jax.make_jaxpr(product)(x[1:], *weight))
    few = arrays(2, 128, 256, 2)
    check(jax.jit(run)(*few), few)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 8}, "8 bits"),
        ({"dtype": "float32"}, "float32 is not bfloat16"),
        ({"num_groups": 64}, "4096 inputs with 64 scales are not groups of a multiple of 128"),
        ({"num_out": 96}, "96 outputs are not a multiple of 128"),
        ({"num_in": 1 << 17, "num_groups": 1 << 10}, "131072 inputs need"),
    ],
)
def test_says_what_it_does_not_serve(change: dict[str, Any], words: str) -> None:
    case = replace(UP, **change)
    assert words in str(tpu.supports(case))
    assert choose_backend(case, "tpu").name == "xla"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("num_rows", [8, tpu.MAX_ROWS])
def test_models_weights_are_served_in_whole_blocks_that_fit(case: ProductCase, num_rows: int) -> None:
    assert choose_backend(case, "tpu").name == "pallas_tpu"
    assert choose_backend(case, "gpu").name == "xla"
    block = tpu._choose_block(case, num_rows)
    assert case.num_out % block == 0
    assert tpu._vmem_bytes(case, num_rows, block) <= tpu._VMEM_LIMIT_BYTES


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, values, scales: (x[:, 1:], values, scales), "not [T, in]"),
        (lambda x, values, scales: (x[:0], values, scales), "0 rows"),
        (lambda x, values, scales: (x, values.astype(jnp.int32), scales), "int32"),
        (lambda x, values, scales: (x, values.astype(jnp.int8), scales), "8 bits"),
    ],
)
def test_refuses_what_does_not_go_together(change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        tpu.quantized_matmul(*change(*arrays(2, 128, 256, 2)))
