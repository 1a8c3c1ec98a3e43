"""Grouped products, by blocks and by XLA's ragged product, against the reference: whatever the groups' sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.ops import grouped_matmul as op
from pallas_kernels.grouped_matmul.reference import grouped_matmul as reference

NUM_GROUPS, IN, OUT = 5, 8, 6


@cache
def compiled(path: str) -> jax.stages.Wrapped:
    return jax.jit(getattr(op, path))


@pytest.mark.parametrize("path", ["grouped_matmul", "_ragged"])
@pytest.mark.parametrize("num_rows", [1, 4, 24, 64, 700])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_the_reference(path: str, num_rows: int, data: st.DataObject) -> None:
    """Empty groups, one group with all rows, and rows that belong to none."""
    cuts = sorted(data.draw(st.lists(st.integers(0, num_rows), min_size=NUM_GROUPS, max_size=NUM_GROUPS)))
    sizes = np.diff([0, *cuts]).astype(np.int32)
    rng = np.random.default_rng(num_rows)
    x = jnp.asarray(rng.normal(size=(num_rows, IN)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(NUM_GROUPS, IN, OUT)), jnp.float32)
    got = np.asarray(compiled(path)(x, weight, jnp.asarray(sizes)))
    assert np.all(np.isfinite(got))
    want = np.asarray(reference(x, weight, jnp.asarray(sizes)))
    np.testing.assert_allclose(got[: cuts[-1]], want[: cuts[-1]], atol=1e-5)
    assert not want[cuts[-1] :].any()


def test_the_reference_multiplies_row_by_row() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(6, IN)), rng.normal(size=(3, IN, OUT))
    got = reference(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), jnp.asarray([2, 0, 3]))
    want = [*(row @ weight[0] for row in x[:2]), *(row @ weight[2] for row in x[2:5]), np.zeros(OUT)]
    np.testing.assert_allclose(got, want, atol=1e-5)


def random_case(num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(num_rows)
    sizes = rng.multinomial(num_rows, [1 / NUM_GROUPS] * NUM_GROUPS).astype(np.int32)
    x, weight = rng.normal(size=(num_rows, IN)), rng.normal(size=(NUM_GROUPS, IN, OUT))
    return jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), jnp.asarray(sizes)


@pytest.mark.parametrize("num_rows", [4, 24])
def test_gradients_are_the_references(num_rows: int) -> None:
    x, weight, sizes = random_case(num_rows)

    def loss(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda x, weight: jnp.sum(jnp.sin(product(x, weight, sizes)))

    got, want = (jax.grad(loss(product), (0, 1))(x, weight) for product in (op.grouped_matmul, reference))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, want)


@pytest.mark.parametrize("num_rows", [4, 24])
def test_a_batch_is_one_after_another(num_rows: int) -> None:
    """Sequences of a batch share the matrices and nothing else."""
    x, weight, sizes = random_case(num_rows)
    several = jnp.stack([sizes, jnp.flip(sizes), jnp.zeros_like(sizes).at[2].set(num_rows)])
    xs = jnp.stack([x, -x, 2 * x])
    got = jax.vmap(op.grouped_matmul, (0, None, 0))(xs, weight, several)
    want = [reference(x, weight, sizes) for x, sizes in zip(xs, several, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-5)
