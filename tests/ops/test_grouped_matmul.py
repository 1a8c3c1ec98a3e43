"""Grouped products, by blocks and by XLA's ragged product, against the reference: whatever the groups' sizes."""

from __future__ import annotations

from functools import cache

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
    weight = jnp.asarray(rng.normal(size=(NUM_GROUPS, OUT, IN)), jnp.float32)
    got = np.asarray(compiled(path)(x, weight, jnp.asarray(sizes)))
    assert np.all(np.isfinite(got))
    want = np.asarray(reference(x, weight, jnp.asarray(sizes)))
    np.testing.assert_allclose(got[: cuts[-1]], want[: cuts[-1]], atol=1e-5)
    assert not want[cuts[-1] :].any()


def test_the_reference_multiplies_row_by_row() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(6, IN)), rng.normal(size=(3, OUT, IN))
    got = reference(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), jnp.asarray([2, 0, 3]))
    want = [*(weight[0] @ row for row in x[:2]), *(weight[2] @ row for row in x[2:5]), np.zeros(OUT)]
    np.testing.assert_allclose(got, want, atol=1e-5)
