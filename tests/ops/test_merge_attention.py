"""Merging parts of an attention gives the whole."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.flash_attention.cases import FlashCase
from pallas_kernels.flash_attention.reference import flash_attention
from pallas_kernels.merge_attention.reference import merge, merge_across, merge_own_rows

CASE = FlashCase(4, 2, 8, 8, 0.35, dtype="float32")


@settings(max_examples=6, deadline=None)
@given(
    cuts=st.lists(st.sampled_from([7, 12]), max_size=2, unique=True),
    q_start=st.integers(-3, 20),
    seed=st.integers(0, 99),
)
def test_parts_make_the_whole(cuts: list[int], q_start: int, seed: int) -> None:
    """Keys cut anywhere, parts that some or all queries see nothing of among them."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape) * 3, jnp.float32) for shape in ((2, 6, 4, 8), (2, 20, 2, 8), (2, 20, 2, 8))
    )
    whole = flash_attention(CASE, q, k, v, q_start=q_start)
    edges = [0, *sorted(cuts), 20]
    parts = [
        flash_attention(CASE, q, k[:, a:b], v[:, a:b], q_start=q_start, kv_start=a)
        for a, b in itertools.pairwise(edges)
    ]
    out, lse = merge(jnp.stack([part[0] for part in parts]), jnp.stack([part[1] for part in parts]))
    np.testing.assert_allclose(out, whole[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, whole[1], rtol=1e-5, atol=1e-5)
    last = merge(jnp.stack([part[0] for part in parts], 2), jnp.stack([part[1] for part in parts], 2), axis=2)
    np.testing.assert_array_equal(last[0], out)


def test_parts_without_keys() -> None:
    """A part that saw nothing may hold anything; where none saw a key the result is 0 and -inf."""
    out = jnp.asarray([[[1.0, 2.0], [np.nan, np.inf]], [[np.nan, np.nan], [np.nan, np.nan]]])
    lse = jnp.asarray([[0.5, -np.inf], [-np.inf, -np.inf]], jnp.float32)
    merged, merged_lse = merge(out, lse)
    np.testing.assert_array_equal(merged, [[1.0, 2.0], [0.0, 0.0]])
    np.testing.assert_array_equal(merged_lse, np.asarray([0.5, -np.inf], np.float32))


def test_large_logits_do_not_overflow() -> None:
    out, lse = merge(jnp.asarray([[[2.0]], [[4.0]]]), jnp.asarray([[3000.0], [3000.0]], jnp.float32))
    np.testing.assert_allclose(out, [[3.0]])
    np.testing.assert_allclose(lse, [3000.0 + np.log(2)])


def test_a_part_that_is_wrong_shows() -> None:
    out, _ = merge(jnp.asarray([[[np.nan]], [[4.0]]]), jnp.asarray([[0.0], [0.0]], jnp.float32))
    assert np.isnan(out).all()


def test_across_devices_is_the_same() -> None:
    """Over a mesh axis; all the devices that this process has."""
    mesh = Mesh(np.array(jax.devices()), ("context",))
    rng = np.random.default_rng(0)
    out = jnp.asarray(rng.normal(size=(mesh.size, 3, 8)), jnp.float32)
    lse = jnp.asarray(rng.normal(size=(mesh.size, 3)), jnp.float32).at[0, 1].set(-np.inf)
    spec = PartitionSpec("context")

    def across(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        return merge_across(out[0], lse[0], "context")

    found = jax.shard_map(across, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec())(out, lse)
    for one, other in zip(found, merge(out, lse), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_own_rows_are_those_of_the_whole() -> None:
    """Three devices, as lanes of a `vmap`; what two of them saw of the first rows was nothing."""
    rng = np.random.default_rng(0)
    out = jnp.asarray(rng.normal(size=(3, 6, 2, 4)), jnp.float32).at[:2, 0].set(np.nan)
    lse = jnp.asarray(rng.normal(size=(3, 6, 2)), jnp.float32).at[:2, 0].set(-np.inf)
    own = jax.vmap(lambda out, lse: merge_own_rows(out, lse, "context"), axis_name="context")(out, lse)
    for parts, whole in zip(own, merge(out, lse), strict=True):
        np.testing.assert_allclose(parts.reshape(whole.shape), whole, rtol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"out \(2, 3, 8\) and lse \(2, 4\) do not fit; lse needs \(2, 3\)"):
        merge(jnp.zeros((2, 3, 8)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="lse is of bfloat16; it must be float32"):
        merge(jnp.zeros((2, 3, 8)), jnp.zeros((2, 3), jnp.bfloat16))
